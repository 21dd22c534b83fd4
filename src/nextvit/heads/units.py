"""What the heads are built of: a convolution with what follows it, and resizing."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1  # of whole channels, before a classifier


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU; either of the last two may be missing. (B, c_in, H, W) -> (B, c_out, H, W).

    The names are those of the released segmentation and detection checkpoints.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, norm: bool = True, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()
        if relu:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(self.conv.weight)
        zero(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def classifier(channels: int, classes: int) -> nn.Conv2d:
    """The 1x1 convolution that a segmentation head ends in."""
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    zero(conv)
    return conv


def zero(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Its bias, if it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear; the corners are not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
