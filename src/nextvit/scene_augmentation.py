"""Training images of detection: an image and its objects, mirrored, resized, cut and pasted over as one.

As the authors trained: mirrored first; every step and its rounding are those of their pipeline, but that images are
resized by torch, a level apart at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nextvit.augmentation import Normalise
from nextvit.data.images import fitted, nearest
from nextvit.data.loader import Transform
from nextvit.extras import need
from nextvit.heads.boxes import PAD
from nextvit.recipe import Scenes

LEAST = 1.0  # pixels that both sides of an object keep, else it is left out
LEAST_PASTED = 16  # pixels of an object that is laid over, or that is left of one below it
BITS = 8


@dataclass(frozen=True)
class Sample:
    """An image with N objects, on its way to the network."""

    image: Tensor  # uint8 (H, W, 3)
    boxes: Tensor  # float32 (N, 4)
    labels: Tensor  # int64 (N,)
    masks: Tensor  # uint8 (N, H, ceil(W / 8)): eight pixels a byte

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.image, self.boxes, self.labels, self.masks))


@dataclass(frozen=True)
class _Scene:
    """The same on the way to a sample."""

    image: np.ndarray  # uint8 (H, W, 3)
    boxes: np.ndarray  # float32 (N, 4)
    labels: np.ndarray  # int64 (N,)
    masks: np.ndarray  # uint8 (N, H, W) of 0 and 1

    def only(self, which: np.ndarray) -> "_Scene":
        return replace(self, boxes=self.boxes[which], labels=self.labels[which], masks=self.masks[which])


def scene_transform(scenes: Scenes) -> Transform:
    """Of an image and its objects, from torch's generator."""
    need("faster_coco_eval.core.mask", extra="detect")

    def transform(read: Callable[..., Any]) -> Any:
        return sample_of(read, scenes, np.random.default_rng(int(torch.randint(2**62, ()))))

    return transform


def sample_of(read: Callable[..., Any], scenes: Scenes, rng: np.random.Generator) -> Sample:
    """read: gives an RGB image and its objects; with a number, those of the image so many further on."""
    scene = _drawn(read(), scenes, rng)
    if rng.random() < scenes.copy_paste:
        other = _drawn(read(int(rng.integers(1, 2**31))), scenes, rng)
        scene = _pasted(scene, other, rng)
    width = scene.image.shape[1]
    return Sample(
        image=torch.from_numpy(np.array(scene.image, order="C")),  # a copy: Pillow's pixels are not to be written
        boxes=torch.from_numpy(scene.boxes),
        labels=torch.from_numpy(scene.labels),
        masks=torch.from_numpy(np.packbits(scene.masks, axis=2)).view(-1, len(scene.image), -(-width // BITS)),
    )


def blank(scenes: Scenes) -> Sample:
    """A sample without an object, as large as they come."""
    short, long = max(scenes.short_sides), scenes.long_side
    image = torch.zeros(short, long, 3, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    return Sample(image, torch.zeros(0, 4), none, torch.zeros(0, short, -(-long // BITS), dtype=torch.uint8))


def _drawn(labelled: tuple[Any, Any], scenes: Scenes, rng: np.random.Generator) -> _Scene:
    image, objects = labelled
    objects = objects.chosen(~objects.crowd)
    masks = objects.masks() if len(objects) else np.zeros((0, image.height, image.width), np.uint8)
    scene = _Scene(np.asarray(image), objects.boxes, objects.labels, masks)
    if rng.random() < scenes.flip:
        scene = _mirrored(scene)
    if rng.random() < scenes.cut:
        scene = _resized(scene, int(rng.choice(scenes.cut_short_sides)), scenes.long_side)
        scene = _cut(scene, scenes.cut_sides, rng)
    scene = _resized(scene, int(rng.choice(scenes.short_sides)), scenes.long_side)
    sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
    return scene.only(np.all(sides >= LEAST, axis=1))


def _mirrored(scene: _Scene) -> _Scene:
    width = scene.image.shape[1]
    boxes = scene.boxes.copy()
    boxes[:, 0], boxes[:, 2] = width - scene.boxes[:, 2], width - scene.boxes[:, 0]
    return replace(scene, image=scene.image[:, ::-1], boxes=boxes, masks=scene.masks[:, :, ::-1])


def _resized(scene: _Scene, short: int, long: int) -> _Scene:
    """As large as fits into short x long pixels, either way round."""
    before = scene.image.shape[:2]
    image = fitted(np.ascontiguousarray(scene.image), short, long)
    size = image.shape[:2]
    if size == before:
        return scene
    scale = np.array([size[1] / before[1], size[0] / before[0]] * 2, np.float32)
    masks = [nearest(mask, size) for mask in scene.masks]
    return _within(replace(scene, image=image, boxes=scene.boxes * scale, masks=_stacked(masks, size)))


def _cut(scene: _Scene, sides: Sequence[int], rng: np.random.Generator) -> _Scene:
    """A place of height and width drawn from `sides`; what has no pixel there is gone."""
    size = scene.image.shape[:2]
    height, width = (int(rng.integers(min(side, sides[0]), min(side, sides[1]) + 1)) for side in size)
    top, left = (int(rng.integers(0, side - part + 1)) for side, part in zip(size, (height, width), strict=True))
    rows, columns = slice(top, top + height), slice(left, left + width)
    moved = replace(
        scene,
        image=scene.image[rows, columns],
        boxes=scene.boxes - np.array([left, top] * 2, np.float32),
        masks=scene.masks[:, rows, columns],
    )
    moved = _within(moved)
    return moved.only(np.all(moved.boxes[:, 2:] > moved.boxes[:, :2], axis=1))


def _within(scene: _Scene) -> _Scene:
    height, width = scene.image.shape[:2]
    return replace(scene, boxes=scene.boxes.clip(0, np.array([width, height] * 2, np.float32)))


def _pasted(scene: _Scene, other: _Scene, rng: np.random.Generator) -> _Scene:
    """Some objects of another scene laid over this one, where they were (Ghiasi et al. 2021); boxes follow masks."""
    size = scene.image.shape[:2]
    height, width = (min(a, b) for a, b in zip(size, other.image.shape[:2], strict=True))
    laid = np.zeros((len(other.masks), *size), np.uint8)
    laid[:, :height, :width] = other.masks[:, :height, :width]
    chosen = (rng.random(len(laid)) < 0.5) & (laid.sum((1, 2)) >= LEAST_PASTED)
    if not chosen.any():
        return scene
    laid = laid[chosen]
    over = laid.any(0)
    image = scene.image.copy()
    image[over] = other.image[:height, :width][over[:height, :width]]
    below = scene.masks * ~over
    kept = below.sum((1, 2)) >= np.minimum(LEAST_PASTED, scene.masks.sum((1, 2)))
    touched = (scene.masks * over).any((1, 2))
    boxes = np.where(touched[:, None], _boxes_of(below), scene.boxes)[kept]
    return _Scene(
        image=image,
        boxes=np.concatenate([boxes, _boxes_of(laid)]).astype(np.float32),
        labels=np.concatenate([scene.labels[kept], other.labels[chosen]]),
        masks=np.concatenate([below[kept], laid]).astype(np.uint8),
    )


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """float32 (N, 4): the smallest box around each mask."""
    found = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(found, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found


def _stacked(masks: Sequence[np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    return np.stack(masks) if masks else np.zeros((0, *size), np.uint8)


def as_scenes(
    samples: Sequence[Sample], normalise: Normalise
) -> tuple[Tensor, list[dict[str, Tensor]], list[tuple[int, int]]]:
    """What a detector learns from: images (B, 3, H, W) padded with 0 to multiples of PAD, targets, and their sizes."""
    sizes = [(sample.image.shape[0], sample.image.shape[1]) for sample in samples]
    height, width = (-(-max(sides) // PAD) * PAD for sides in zip(*sizes, strict=True))
    pixels = torch.stack(
        [F.pad(s.image, (0, 0, 0, width - w, 0, height - h)) for s, (h, w) in zip(samples, sizes, strict=True)]
    )
    images = normalise(pixels)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, h:], image[:, :, w:] = 0, 0
    place = normalise.device
    shifts = torch.arange(BITS - 1, -1, -1, device=place, dtype=torch.uint8)
    targets = []
    for sample, (_, w) in zip(samples, sizes, strict=True):
        bytes_of = sample.masks.to(place, non_blocking=True)
        masks = (bytes_of[..., None] >> shifts & 1).flatten(2)[..., :w]
        targets.append({"boxes": sample.boxes.to(place), "labels": sample.labels.to(place), "masks": masks})
    return images, targets, sizes
