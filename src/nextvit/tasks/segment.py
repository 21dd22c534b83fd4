"""Semantic segmentation: one class for each pixel of an image."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextvit.data.images import LEAST_SIDE, nearest, normalise, preprocess
from nextvit.data.rle import rle
from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.heads.units import resized
from nextvit.metadata import Metadata, Preprocess

Run = Callable[[np.ndarray], np.ndarray]  # float32 (1, 3, h, w), normalised -> (1, classes, h / 4, w / 4) logits
PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the paper's multi-scale results, each mirrored too
WINDOW_STRIDE = 2 / 3  # of a window's side
TILE_STRIDE = 7 / 8
AT_ONCE = 2**25  # values of logits that are held at the size of the image
MOST_BYTES = 255  # the largest number of a class that a byte holds
LARGEST_OVERLAY = 2048  # pixels of the longer side


# ---- the answer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The most probable class of each pixel of one image."""

    classes: np.ndarray  # uint8 (H, W), of the image's own size; uint16 for more than 256 classes
    labels: tuple[str, ...]

    @cached_property
    def pixels(self) -> np.ndarray:
        """int64 (classes,): how many have each."""
        counts = np.zeros(len(self.labels), np.int64)
        for rows in np.array_split(self.classes, max(1, self.classes.size // AT_ONCE)):  # bincount makes int64 of them
            counts += np.bincount(rows.ravel(), minlength=len(self.labels))
        return counts

    @property
    def present(self) -> list[int]:
        """The classes that are there, the largest first."""
        return [int(number) for number in np.argsort(-self.pixels, kind="stable") if self.pixels[number]]

    def to_dict(self) -> dict[str, Any]:
        """As `nextvit predict` writes it: each class that is there, its pixels, and where they are as COCO's runs."""
        found = [
            {
                "label": self.labels[number],
                "class": number,
                "pixels": int(self.pixels[number]),
                "segmentation": rle(self.classes == number),
            }
            for number in self.present
        ]
        return {"mask": found}

    def polygons(self) -> dict[str, Any]:
        """A FeatureCollection as GeoJSON has it, a feature a class, in pixels: x to the right, y down.

        Corners are the centres of a region's outermost pixels; holes are rings of their own behind the outer one.
        """
        found: dict[str, Any] = json.loads("".join(self.geojson()))
        return found

    def geojson(self) -> Iterator[str]:
        """The same as text, in pieces: all corners of a large image as Python's numbers would take gigabytes."""
        yield '{"type": "FeatureCollection", "features": ['
        for place, number in enumerate(self.present):
            properties = {"label": self.labels[number], "class": number, "pixels": int(self.pixels[number])}
            yield f'{", " * bool(place)}{{"type": "Feature", "properties": {json.dumps(properties)}, '
            yield '"geometry": {"type": "MultiPolygon", "coordinates": ['
            for first, polygon in enumerate(self._regions(number)):
                yield ", " * bool(first)
                yield f"[{', '.join(json.dumps(ring.tolist()) for ring in polygon)}]"
            yield "]}}"
        yield "]}"

    def _regions(self, number: int) -> Iterable[list[np.ndarray]]:
        """Of a class: each region's outer ring, then those of its holes, (corners + 1, 2)."""
        cv2 = need("cv2", extra="segment")
        mask = (self.classes == number).astype(np.uint8)
        contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        polygons: dict[int, list[np.ndarray]] = {}
        for index, (contour, (_, _, _, parent)) in enumerate(zip(contours, hierarchy[0], strict=True)):
            ring = np.concatenate([contour[:, 0], contour[:1, 0]])
            own = polygons.setdefault(index if parent < 0 else int(parent), [])
            own.insert(0 if parent < 0 else len(own), ring)
        return polygons.values()

    def image(self) -> Image.Image:
        """The numbers of the classes as an image with a palette; of more than 256 classes with 16 bits and none."""
        found = Image.fromarray(self.classes)
        if self.classes.dtype == np.uint8:
            found.putpalette(palette(len(self.labels)).tobytes())
        return found

    def overlay(self, image: Image.Image) -> Image.Image:
        """The image with the colours of the classes laid over it, half transparent, at most LARGEST_OVERLAY pixels."""
        factor = min(1.0, LARGEST_OVERLAY / max(image.size))
        width, height = (max(1, round(side * factor)) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BILINEAR) if factor < 1 else image
        colours = palette(len(self.labels))[nearest(self.classes, (height, width))]
        return Image.blend(small.convert("RGB"), Image.fromarray(colours), 0.5)


def palette(classes: int) -> np.ndarray:
    """uint8 (classes, 3): the colours of Pascal VOC from its number 1 on, where bits of the number become high bits."""
    number, found = np.arange(1, classes + 1), np.zeros((classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            found[:, channel] |= ((number >> (3 * bit + channel)) & 1) << (7 - bit)
    return found.astype(np.uint8)


# ---- from an image to it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How an image is looked at: at several scales, mirrored too, whole or through a window that slides over it."""

    scales: tuple[float, ...] = (1.0,)  # of the sides that preprocessing asks for
    flip: bool = False
    window: int | None = None  # pixels a side; None: the whole image at once


ONCE = View()


def class_map(run: Run, image: Image.Image, m: Metadata, view: View = ONCE) -> np.ndarray:
    """uint8 (H, W), of the image's own size: the number of the most probable class of each pixel.

    As the authors evaluate: logits are enlarged to the network's input, then to the image. Of several views the
    probabilities at the image's size are averaged. A file of one size looks through a window of that size. UserError
    for views that a file which gives classes cannot be asked for.
    """
    size = image.height, image.width
    if m.fixed_sides:
        view = replace(view, window=m.preprocess.image_size)
    if m.gives_classes:
        if len(view.scales) > 1 or view.flip:
            raise UserError("this file gives classes and no probabilities, so views of an image cannot be averaged.")
        x = preprocess(image, _scaled(m.preprocess, view.scales[0]))
        window, sides = view.window or max(x.shape[1:]), (x.shape[1], x.shape[2])
        return nearest(_patched(run, sides, window, WINDOW_STRIDE, m, lambda box: x[:, box[0], box[1]]), size)
    if len(view.scales) == 1 and not view.flip:
        return enlarged_argmax(_logits(run, image, m, view.scales[0], view.window), size)
    total = torch.zeros(())
    for scale in view.scales:
        for mirrored in (False, True)[: 1 + view.flip]:
            seen = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            shares = resized(_logits(run, seen, m, scale, view.window)[None], size)[0].softmax(0)
            total = total + (shares.flip(2) if mirrored else shares)
    return total.argmax(0).to(torch.uint8 if m.num_classes <= MOST_BYTES + 1 else torch.uint16).numpy()


def tiled_map(run: Run, image: Image.Image, m: Metadata, tile: int) -> np.ndarray:
    """The same of an image as large as it is, in tiles of `tile` pixels a side that overlap; of each its inner part.

    Beside the image and the answer no more is held than a tile needs.
    """
    if m.fixed_sides and tile != m.preprocess.image_size:
        raise UserError(f"this file takes {m.preprocess.image_size} pixels a side and no other; take such tiles.")

    def prepared(box: tuple[slice, slice]) -> np.ndarray:
        rows, columns = box
        part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        return normalise(np.asarray(part), m.preprocess)

    return _patched(run, (image.height, image.width), tile, TILE_STRIDE, m, prepared)


def _scaled(p: Preprocess, scale: float) -> Preprocess:
    """The authors round the sides of the box, before the image is fitted into it, down."""
    long = p.long_side if p.long_side is None else int(p.long_side * scale)
    return replace(p, image_size=int(p.image_size * scale), long_side=long)


def _logits(run: Run, image: Image.Image, m: Metadata, scale: float, window: int | None) -> Tensor:
    """(classes, h, w) at the size of the network's input; where windows overlap, their mean."""
    x = preprocess(image, _scaled(m.preprocess, scale))
    height, width = x.shape[1:]
    if window is None:
        return _answer(run, x, m)
    total, count = torch.zeros(()), torch.zeros(height, width)
    for rows in _windows(height, window, WINDOW_STRIDE):
        for columns in _windows(width, window, WINDOW_STRIDE):
            logits = _answer(run, x[:, rows, columns], m)
            if total.ndim == 0:
                total = torch.zeros(len(logits), height, width)
            total[:, rows, columns] += logits
            count[rows, columns] += 1
    return total / count


def _answer(run: Run, x: np.ndarray, m: Metadata) -> Tensor:
    """(3, h, w) -> what the network gives for it at that size: (classes, h, w) logits, or (h, w) classes."""
    height, width = x.shape[1:]
    least = m.preprocess.image_size if m.fixed_sides else LEAST_SIDE
    below, right = max(0, least - height), max(0, least - width)
    if below or right:
        x = np.pad(x, ((0, 0), (0, below), (0, right)))
    found = torch.from_numpy(run(np.ascontiguousarray(x[None])))
    whole = found if m.gives_classes else resized(found, x.shape[1:])
    return whole[0, ..., :height, :width]


def _patched(
    run: Run,
    size: tuple[int, int],
    window: int,
    stride: float,
    m: Metadata,
    part: Callable[[tuple[slice, slice]], np.ndarray],
) -> np.ndarray:
    """The class of each pixel of `size`, window by window; where two overlap, each has the half that is nearer to it.

    part: gives the input of a window, (3, h, w).
    """
    classes = np.empty(size, np.uint8 if m.num_classes <= MOST_BYTES + 1 else np.uint16)
    columns = list(_kept(size[1], window, stride))
    for rows, kept_rows in _kept(size[0], window, stride):
        for across, kept_across in columns:
            found = _answer(run, part((rows, across)), m)
            answer = (found if m.gives_classes else found.argmax(0)).numpy()
            inner = (_within(kept_rows, rows), _within(kept_across, across))
            classes[kept_rows, kept_across] = answer[inner]
    return classes


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _kept(side: int, window: int, stride: float) -> Iterator[tuple[slice, slice]]:
    """Windows, and what each decides: they part in the middle of where they overlap."""
    windows = list(_windows(side, window, stride))
    cuts = [0, *((a.stop + b.start) // 2 for a, b in pairwise(windows)), side]
    for place, (start, stop) in zip(windows, pairwise(cuts), strict=True):
        yield place, slice(start, stop)


def _windows(side: int, window: int, stride: float) -> Iterator[slice]:
    """Of `window` pixels each, or the whole side where that is less; the last one ends where the side does."""
    step = max(1, int(window * stride))
    for number in range(max(side - window + step - 1, 0) // step + 1):
        end = min(number * step + window, side)
        yield slice(max(end - window, 0), end)


def enlarged_argmax(logits: Tensor, size: Sequence[int]) -> np.ndarray:
    """uint8 (H, W) of logits (classes, h, w) enlarged to H x W, some rows at a time: all of them may not fit."""
    height, width = size
    top, bottom, low = _neighbours(logits.shape[1], height)
    step = max(1, AT_ONCE // (len(logits) * width))
    found = np.empty((height, width), np.uint8 if len(logits) <= MOST_BYTES + 1 else np.uint16)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        share = low[rows, None]
        band = logits[:, top[rows]] * (1 - share) + logits[:, bottom[rows]] * share
        found[rows] = resized(band[None], (band.shape[1], width))[0].argmax(0).numpy()
    return found


def _neighbours(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `target` pixels of a side: the two of `source` that it lies between, and the share of the second."""
    place = ((torch.arange(target) + 0.5) * (source / target) - 0.5).clamp(min=0)
    first = place.long().clamp(max=source - 1)
    return first, (first + 1).clamp(max=source - 1), (place - first).float()
