"""Semantic segmentation: one class for each pixel of an image."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextvit.data.images import preprocess
from nextvit.heads.units import resized
from nextvit.metadata import Preprocess

Run = Callable[[np.ndarray], np.ndarray]  # float32 (1, 3, h, w), normalised -> (1, classes, h / 4, w / 4) logits
PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the paper's multi-scale results, each mirrored too
WINDOW_STRIDE = 2 / 3  # of a window's side
AT_ONCE = 2**25  # values of logits that are held at the size of the image


@dataclass(frozen=True)
class View:
    """How an image is looked at: at several scales, mirrored too, whole or through a window that slides over it."""

    scales: tuple[float, ...] = (1.0,)  # of the sides that preprocessing asks for
    flip: bool = False
    window: int | None = None  # pixels a side; None: the whole image at once


def class_map(run: Run, image: Image.Image, p: Preprocess, view: View = View()) -> np.ndarray:
    """uint8 (H, W), of the image's own size: the number of the most probable class of each pixel.

    As the authors evaluate: logits are enlarged to the network's input, then to the image. Of several views the
    probabilities at the image's size are averaged.
    """
    size = image.height, image.width
    if len(view.scales) == 1 and not view.flip:
        return _argmax(_logits(run, image, _scaled(p, view.scales[0]), view.window), size)
    total = torch.zeros(())
    for scale in view.scales:
        for mirrored in (False, True)[: 1 + view.flip]:
            seen = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            logits = _logits(run, seen, _scaled(p, scale), view.window)
            shares = resized(logits[None], size)[0].softmax(0)
            total = total + (shares.flip(2) if mirrored else shares)
    return total.argmax(0).to(torch.uint8).numpy()


def _scaled(p: Preprocess, scale: float) -> Preprocess:
    """The authors round the sides of the box, before the image is fitted into it, down."""
    long = p.long_side if p.long_side is None else int(p.long_side * scale)
    return replace(p, image_size=int(p.image_size * scale), long_side=long)


def _logits(run: Run, image: Image.Image, p: Preprocess, window: int | None) -> Tensor:
    """(classes, h, w) at the size of the network's input; where windows overlap, their mean."""
    x = preprocess(image, p)[None]
    height, width = x.shape[2:]
    if window is None:
        return resized(torch.from_numpy(run(x)), (height, width))[0]
    total, count = torch.zeros(()), torch.zeros(height, width)
    for rows in _windows(height, window):
        for columns in _windows(width, window):
            part = np.ascontiguousarray(x[:, :, rows, columns])
            logits = resized(torch.from_numpy(run(part)), part.shape[2:])[0]
            if total.ndim == 0:
                total = torch.zeros(len(logits), height, width)
            total[:, rows, columns] += logits
            count[rows, columns] += 1
    return total / count


def _windows(side: int, window: int) -> Iterator[slice]:
    """Of `window` pixels each, or the whole side where that is less; the last one ends where the side does."""
    stride = max(1, int(window * WINDOW_STRIDE))
    for number in range(max(side - window + stride - 1, 0) // stride + 1):
        end = min(number * stride + window, side)
        yield slice(max(end - window, 0), end)


def _argmax(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) of logits (classes, h, w) enlarged to H x W, some rows at a time: all of them may not fit."""
    height, width = size
    top, bottom, low = _neighbours(logits.shape[1], height)
    step = max(1, AT_ONCE // (len(logits) * width))
    found = np.empty(size, np.uint8)
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
