"""Training images: what is drawn for a sample, what is drawn for a batch, and how both become the network's input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from nextvit.data.loader import Transform
from nextvit.data.seeds import generator, word
from nextvit.data.split import ReadImage
from nextvit.extras import need
from nextvit.metadata import Preprocess
from nextvit.recipe import Images, Mixing

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean, what RandAugment fills with


# ---- a sample --------------------------------------------------------------------------------------------------------


def sample_transform(images: Images, p: Preprocess) -> Transform:
    """An RGB image to uint8 (size, size, 3): random crop, resize, flip, RandAugment.

    The crop is drawn first, so that a JPEG of many more pixels than are wanted is not decoded in full. What timm calls
    RandAugment is timm's: it holds the operations that the released weights were trained with.
    """
    v2 = need("torchvision.transforms.v2", extra="train")
    area, aspect = (images.crop_area, 1.0), (1 / images.crop_aspect, images.crop_aspect)
    crop = v2.RandomResizedCrop(images.size, area, aspect)
    augment = randaugment(images) if images.randaugment else None

    def transform(read: ReadImage) -> Tensor:
        box = np.zeros(4)  # left, top, right, bottom in shares of the sides

        def draft(width: int, height: int) -> tuple[float, float]:
            drawn = crop.make_params([torch.empty(3, height, width, device="meta")])
            left, top, w, h = (drawn[side] for side in ("left", "top", "width", "height"))
            box[:] = left / width, top / height, (left + w) / width, (top + h) / height
            return width * images.size / w, height * images.size / h

        pixels = torch.from_numpy(np.array(read(draft)))
        height, width, _ = pixels.shape
        left, top, right, bottom = np.rint(box * (width, height, width, height)).astype(int)
        left, top = min(left, width - 1), min(top, height - 1)  # of a thin image a pixel at least is left
        part = pixels[top : max(bottom, top + 1), left : max(right, left + 1)].permute(2, 0, 1)[None]
        # Pillow's own filter, a level apart at most, in a third of its time: torch has vector code for it.
        part = F.interpolate(part, (images.size, images.size), mode=p.interpolation, antialias=True)[0].permute(1, 2, 0)
        if torch.rand(1) < images.flip:
            part = part.flip(1)
        if augment is None:
            return part.contiguous()
        return torch.from_numpy(np.array(augment(Image.fromarray(part.numpy()))))

    return transform


def randaugment(images: Images) -> Callable[[Image.Image], Image.Image]:
    """timm's, in its own notation."""
    augment = need("timm.data.auto_augment", extra="train")
    values = {"img_mean": MEAN_COLOUR, "interpolation": Image.Resampling[images.interpolation.upper()]}
    made: Any = augment.rand_augment_transform(images.randaugment, values)
    mend_posterize(made)
    return made


def mend_posterize(augment: Any) -> None:
    """In a RandAugment of timm's, which now and then asks Pillow for something that it refuses since version 12."""
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep so many bits of a level, 0 too."""
    return image if bits >= 8 else ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


# ---- a batch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """How a batch is mixed with itself reversed: by share everywhere, or within a box (top, bottom, left, right)."""

    share: float  # of the image itself
    box: tuple[int, int, int, int] | None


class Normalise:
    """uint8 (B, H, W, 3) -> what the network takes: float32 (B, 3, H, W), channels last in memory, on the device."""

    def __init__(self, p: Preprocess, device: torch.device):
        self.device = device
        self.mean, self.std = (255 * torch.tensor(v, device=device) for v in (p.mean, p.std))  # levels

    def __call__(self, images: Tensor) -> Tensor:
        width = images.shape[2]
        rows = images.to(self.device, non_blocking=True).flatten(2).float()  # whole rows: long loops without strides
        rows.sub_(self.mean.repeat(width)).div_(self.std.repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)


def erase(images: Tensor, indices: Tensor, probability: float, seed: tuple[int, ...]) -> None:
    """Random erasing in place (Zhong et al. 2017): in some images of (B, 3, H, W) a rectangle becomes normal noise."""
    noise = torch.Generator(images.device)
    for image, index in zip(images, indices.tolist(), strict=True):
        rng = generator(*seed, index, 1)
        if rng.random() < probability and (box := erasing_box(rng, *image.shape[-2:])) is not None:
            top, bottom, left, right = box
            noise.manual_seed(word(*seed, index, 2))
            image[:, top:bottom, left:right].normal_(generator=noise)


def erasing_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int] | None:
    """A box of 0.02 to 1/3 of the area and an aspect ratio of 0.3 to 1/0.3, or None where ten tries do not fit."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return top, top + h, left, left + w
    return None


def draw_mixing(mixing: Mixing, rng: np.random.Generator, height: int, width: int) -> Draw:
    """Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019); with both, either by a fair coin."""
    cut = mixing.cutmix > 0 and (mixing.mixup == 0 or rng.random() < 0.5)
    alpha = mixing.cutmix if cut else mixing.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Draw(share, None)
    h, w = (int(side * np.sqrt(1 - share)) for side in (height, width))
    y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
    left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
    return Draw(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix(images: Tensor, draw: Draw, *targets: Tensor) -> list[Tensor]:
    """Mix (B, 3, H, W) in place with itself reversed; returns the targets, (B, ...), mixed the same way."""
    if draw.box is None:
        images.copy_(images * draw.share + images.flip(0) * (1 - draw.share))
    else:
        top, bottom, left, right = draw.box
        images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return [target * draw.share + target.flip(0) * (1 - draw.share) for target in targets]


def smoothed(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class indices (B,) -> probabilities (B, classes): `smoothing` is spread over all classes evenly."""
    return F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes
