"""Preprocessing as a graph: uint8 pixels of any size in, what `data.images.preprocess` makes of them out."""

import torch
from torch import Tensor, nn

from nextvit.errors import UserError
from nextvit.metadata import Interpolation, Preprocess


class Preprocessing(nn.Module):
    """uint8 (B, H, W, 3) -> float32 (B, 3, image_size, image_size), normalised.

    Resizing is Pillow's: columns, then rows, each rounded to 8 bits; filters widen where the image shrinks. Each is one
    product with a matrix of filter weights, of which only what the crop keeps is computed, so every runtime has the
    operators, and the output has a fixed size. Where a sum lies on the edge of rounding (a few pixels in 100,000), a
    pixel differs from Pillow's by one level of 255, or two where both passes do.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess):
        super().__init__()
        if preprocess.interpolation == "nearest":
            raise UserError("preprocessing by the nearest pixel has no graph; leave --preprocess out.")
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(preprocess.mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        height, width = (torch.scalar_tensor(side, dtype=torch.int64) for side in image.shape[1:3])
        short = torch.minimum(height, width)
        pixels = image.permute(0, 3, 1, 2).float()
        pixels = _rounded(pixels @ _filters(width, short, image.shape[2], self.preprocess).T)
        pixels = _rounded(_filters(height, short, image.shape[1], self.preprocess) @ pixels)
        return (pixels / 255 - self.mean) / self.std


def _rounded(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)


def _filters(side: Tensor, short: Tensor, count: int, p: Preprocess) -> Tensor:
    """(image_size, side): what each pixel along one side adds to each that resizing and cropping leave.

    Positions are whole numbers of half a pixel over the size after resizing, so that none is rounded.
    """
    resized = (side * p.resize_size // short).clamp(min=p.image_size)
    spare = resized - p.image_size
    first = spare // 2 + (spare % 2) * (spare // 2 % 2)  # spare / 2, rounded to even as Python does
    centre = (2 * (first + torch.arange(p.image_size)) + 1) * side
    place = (2 * torch.arange(count) + 1) * resized
    distance = (place[None, :] - centre[:, None]) / (2 * torch.maximum(side, resized))  # in widths of the filter
    weights = _weights(distance.abs(), p.interpolation)
    return weights / weights.sum(1, keepdim=True)


def _weights(x: Tensor, interpolation: Interpolation) -> Tensor:
    """Of Pillow's filters, at a distance of `x`; bicubic has a = -0.5."""
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
