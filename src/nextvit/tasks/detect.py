"""Detection and instance segmentation: the boxes of objects in an image, their classes, and a mask of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nextvit.data.images import preprocess, printable
from nextvit.extras import need
from nextvit.metadata import Metadata
from nextvit.tasks.segment import palette

Run = Callable[[np.ndarray], Any]  # float32 (1, 3, h, w), normalised -> a dict an image; see `detect`
SURE = 0.5  # a mask has the pixels that are at least so probable; an object is sure from so high a score
LARGEST_PICTURE = 1333  # pixels of the longer side
LEAST = 96  # pixels a side that any file takes
DRAWN = 0.3  # score from which on a detection is drawn


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects of one image, the surest first."""

    boxes: np.ndarray  # float32 (N, 4): x1, y1, x2, y2 in pixels of the image, as it was before it was resized
    classes: np.ndarray  # int64 (N,)
    scores: np.ndarray  # float32 (N,)
    masks: np.ndarray  # float32 (N, 28, 28): probabilities within the boxes
    labels: tuple[str, ...]  # of the model
    size: tuple[int, int]  # height and width of the image

    def __len__(self) -> int:
        return len(self.classes)

    def mask(self, index: int) -> np.ndarray:
        """bool (H, W)."""
        return pasted(self.masks[index], self.boxes[index], self.size)

    def runs(self, index: int) -> dict[str, Any]:
        """The same as COCO's compressed runs."""
        encode = need("faster_coco_eval.core.mask", extra="detect").encode
        found = encode(np.asfortranarray(self.mask(index).astype(np.uint8)))
        return {"size": list(found["size"]), "counts": found["counts"].decode()}

    def to_dict(self) -> dict[str, Any]:
        """As `nextvit predict` writes it: each object, with its mask as COCO's compressed runs."""
        found = [
            {
                "label": self.labels[number],
                "class": int(number),
                "score": round(float(score), 6),
                "box": [round(float(place), 3) for place in box],
                "segmentation": self.runs(index),
            }
            for index, (number, score, box) in enumerate(zip(self.classes, self.scores, self.boxes, strict=True))
        ]
        return {"boxes": found}

    def as_coco(self, category_ids: Sequence[int], *, masks: bool = True) -> list[dict[str, Any]]:
        """Entries of COCO's results, less the image; without masks, boxes alone."""
        rows = []
        for index, (number, score, box) in enumerate(zip(self.classes, self.scores, self.boxes, strict=True)):
            x1, y1, x2, y2 = map(float, box)
            place = {"category_id": category_ids[number], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
            rows.append({**place, **({"segmentation": self.runs(index)} if masks else {})})
        return rows

    def drawn(self, image: Image.Image, least: float = DRAWN) -> Image.Image:
        """The image, at most LARGEST_PICTURE pixels, with boxes, masks and labels of what is at least so sure."""
        factor = min(1.0, LARGEST_PICTURE / max(image.size))
        width, height = (max(1, round(side * factor)) for side in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        shown = [index for index in range(len(self)) if self.scores[index] >= least]
        boxes, colours = self.boxes * factor, palette(len(self.labels))
        pixels = np.array(small)
        for index in shown[::-1]:
            mask = pasted(self.masks[index], boxes[index], (height, width))
            pixels[mask] = (pixels[mask] // 2 + colours[self.classes[index]] // 2).astype(np.uint8)
        picture = Image.fromarray(pixels)
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(11, min(width, height) // 40))
        for index in shown[::-1]:
            colour = tuple(colours[self.classes[index]].tolist())
            x1, y1, x2, y2 = boxes[index].tolist()
            pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
            text = f"{printable(self.labels[self.classes[index]])[:30]} {self.scores[index]:.0%}"
            place = max(0.0, min(x1 + 2, width - 2 - pen.textlength(text, font=font))), y1 + 1
            left, top, right, bottom = pen.textbbox(place, text, font=font)
            pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
            pen.text(place, text, fill="black" if sum(colour) > 300 else "white", font=font)
        return picture


def pasted(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W): where a mask within a box is SURE, asked at the centre of each pixel, between its cells bilinearly.

    mask: float (28, 28). box: x1, y1, x2, y2, float, not rounded. An empty box has no pixel.
    """
    found = np.zeros(size, bool)
    x1, y1, x2, y2 = map(float, box)
    if not (x2 > x1 and y2 > y1):
        return found
    rows, columns = (
        slice(max(int(np.floor(start)) - 1, 0), max(min(int(np.ceil(end)) + 1, side), 0))
        for start, end, side in ((y1, y2, size[0]), (x1, x2, size[1]))
    )
    down, across = _shares(rows, y1, y2, mask.shape[0]), _shares(columns, x1, x2, mask.shape[1])
    found[rows, columns] = down @ mask.astype(np.float64) @ across.T >= SURE
    return found


def _shares(pixels: slice, start: float, end: float, cells: int) -> np.ndarray:
    """(pixels, cells): what each cell of a mask has in the value of each pixel, 0 beyond its first and last."""
    centres = (np.arange(pixels.start, max(pixels.stop, pixels.start)) + 0.5 - start) / (end - start) * cells - 0.5
    return np.maximum(0.0, 1.0 - abs(centres[:, None] - np.arange(cells)))


def detect(run: Run, image: Image.Image, m: Metadata, labels: tuple[str, ...]) -> Detections:
    """The objects of an image, resized as the metadata says, in its own pixels.

    run: takes the image, and gives a dict an image, see `decode`. A file of one size, and any file where the image has
    less than LEAST pixels, is given it at the upper left and 0 beside it, which is what padding is in training.
    """
    x, sides = prepared(image, m)
    (found,) = run(x)
    return decode(found, sides, (image.height, image.width), labels)


def prepared(image: Image.Image, m: Metadata) -> tuple[np.ndarray, tuple[int, int]]:
    """float32 (1, 3, H, W), what a file takes of an image, and height and width of the image in it."""
    x = preprocess(image, m.preprocess)
    sides = x.shape[1], x.shape[2]
    least = m.preprocess.image_size if m.fixed_sides else LEAST
    padded = np.pad(x, ((0, 0), *((0, max(0, least - side)) for side in sides)))
    return np.ascontiguousarray(padded[None]), sides


def decode(
    found: dict[str, np.ndarray], sides: tuple[int, int], size: tuple[int, int], labels: tuple[str, ...]
) -> Detections:
    """Detections in an image of `size` = (H, W) of what the network gives for it resized to `sides`: boxes (N, 4) in
    pixels of that, labels (N,), scores (N,), masks (N, 28, 28). Boxes of which nothing lies in the image are left out.
    """
    (height, width), corner = sides, np.array(sides[::-1] * 2, np.float32)
    scale = np.array([size[1] / width, size[0] / height] * 2, np.float32)
    boxes = found["boxes"].clip(0, corner) * scale
    there = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return Detections(
        boxes=boxes[there],
        classes=found["labels"][there],
        scores=found["scores"][there],
        masks=found["masks"][there],
        labels=labels,
        size=size,
    )
