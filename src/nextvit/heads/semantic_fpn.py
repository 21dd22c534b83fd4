"""Semantic FPN (Kirillov et al. 2019), read downwards: the pyramid, the upsampling branches, the classifier."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nextvit.heads.units import DROPOUT, Unit, classifier, resized

PYRAMID = 256  # channels of each level
BRANCH = 128  # channels of the head


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): a 1x1 and a 3x3 convolution a level, the coarser one added in between.

    Maps at strides 4, 8, 16, 32, finest first -> as many maps of PYRAMID channels, of the same sizes.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Unit(width, PYRAMID, 1, plain=True) for width in widths)
        self.fpn_convs = nn.ModuleList(Unit(PYRAMID, PYRAMID, 3, plain=True) for _ in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for fine, coarse in ((2, 3), (1, 2), (0, 1)):
            size = levels[fine].shape[2:]
            levels[fine] = levels[fine] + F.interpolate(levels[coarse], size=size, mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


class SemanticFPNHead(nn.Module):
    """Every level is brought to stride 4 by convolutions, each followed by doubling its size; their sum is classified.

    Four maps of PYRAMID channels at strides 4, 8, 16, 32 -> (B, classes, H / 4, W / 4) logits.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.conv_seg = classifier(BRANCH, classes)
        self.scale_heads = nn.ModuleList(_branch(doublings) for doublings in range(4))
        self.dropout = nn.Dropout2d(DROPOUT)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        finest, *coarser = (branch(x) for branch, x in zip(self.scale_heads, maps, strict=True))
        for x in coarser:  # where a side is not a multiple of 32, doubling gives a few pixels too many
            finest = finest + resized(x, finest.shape[2:])
        return self.conv_seg(self.dropout(finest))


def _branch(doublings: int) -> nn.Sequential:
    """Of a map at stride 4 * 2 ** doublings."""
    units = [Unit(PYRAMID if i == 0 else BRANCH, BRANCH, 3) for i in range(max(1, doublings))]
    if not doublings:
        return nn.Sequential(*units)
    double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return nn.Sequential(*(layer for unit in units for layer in (unit, double)))
