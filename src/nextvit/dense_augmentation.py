"""Training images of segmentation: an image and its labels, scaled, cut, mirrored and distorted as one.

As the authors trained: every step, its order and its rounding are those of their pipeline, but that images are resized
by torch, a level apart at most.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextvit.augmentation import Normalise
from nextvit.data.images import fitted, nearest
from nextvit.data.loader import Transform
from nextvit.data.masks import IGNORED
from nextvit.extras import need
from nextvit.recipe import Crops

PADDED = 254  # a label of padding on its way to the network, where its pixels become 0 and the label IGNORED
HUE_LEVELS = 180


def crop_transform(crops: Crops) -> Transform:
    """Of an image and its labels, from torch's generator."""
    need("cv2", extra="train")

    def transform(read: Callable[[], tuple[Image.Image, np.ndarray]]) -> Tensor:
        return crop_of(*read(), crops, np.random.default_rng(int(torch.randint(2**62, ()))))

    return transform


def crop_of(image: Image.Image, labels: np.ndarray, crops: Crops, rng: np.random.Generator) -> Tensor:
    """An RGB image and uint8 labels (H, W) -> uint8 (size, size, 4): colours and label, the rest padding."""
    ratio = rng.uniform(*crops.scale)
    pixels = fitted(np.asarray(image), int(crops.short_side * ratio), int(crops.long_side * ratio))
    labels = nearest(labels, pixels.shape[:2])
    box = _box(labels, crops, rng)
    pixels, labels = pixels[box], labels[box]
    if rng.random() < crops.flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if crops.distortion:
        pixels = distorted(pixels, rng)
    sample = np.full((crops.size, crops.size, 4), PADDED, np.uint8)
    height, width = labels.shape
    sample[:height, :width, :3], sample[:height, :width, 3] = pixels, labels
    return torch.from_numpy(sample)


def _box(labels: np.ndarray, crops: Crops, rng: np.random.Generator) -> tuple[slice, slice]:
    """A place where no class has nearly all pixels and two or more are there, if one of some tries is such."""

    def drawn() -> tuple[slice, slice]:
        top, left = (int(rng.integers(0, max(side - crops.size, 0) + 1)) for side in labels.shape)
        return slice(top, top + crops.size), slice(left, left + crops.size)

    box = drawn()
    for _ in range(crops.tries):
        counts = np.bincount(labels[box].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < crops.largest_class * counts.sum():
            break
        box = drawn()
    return box


def distorted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue of uint8 (H, W, 3), each by a fair coin, contrast early or late."""
    if rng.integers(2):
        pixels = _levels(pixels, 1.0, rng.uniform(-32, 32))
    early = bool(rng.integers(2))
    if early and rng.integers(2):
        pixels = _levels(pixels, rng.uniform(0.5, 1.5), 0.0)
    if rng.integers(2):
        hue, saturation, value = _to_hsv(pixels)
        pixels = _to_rgb(hue, _levels(saturation, rng.uniform(0.5, 1.5), 0.0), value)
    if rng.integers(2):
        hue, saturation, value = _to_hsv(pixels)
        pixels = _to_rgb((hue.astype(int) + int(rng.integers(-18, 18))) % HUE_LEVELS, saturation, value)
    if not early and rng.integers(2):
        pixels = _levels(pixels, rng.uniform(0.5, 1.5), 0.0)
    return pixels


def _levels(pixels: np.ndarray, gain: float, offset: float) -> np.ndarray:
    """Cut to 0..255, and rounded down."""
    return (pixels.astype(np.float32) * np.float32(gain) + np.float32(offset)).clip(0, 255).astype(np.uint8)


def _to_hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in 0..179 (half degrees), saturation and value in 0..255, uint8 (H, W) each, as OpenCV rounds them."""
    cv2 = need("cv2", extra="train")
    hue, saturation, value = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))
    return hue, saturation, value


def _to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    cv2 = need("cv2", extra="train")
    pixels: np.ndarray = cv2.cvtColor(np.dstack([hue, saturation, value]).astype(np.uint8), cv2.COLOR_HSV2RGB)
    return pixels


def as_input(samples: Tensor, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """uint8 (B, H, W, 4) -> what the network takes, float32 (B, 3, H, W) with 0 for padding, and int64 (B, H, W)."""
    labels = samples[..., 3].to(normalise.device, non_blocking=True).long()
    padded = labels == PADDED
    images = normalise(samples[..., :3]) * ~padded[:, None]
    return images, labels.masked_fill(padded, IGNORED)
