"""The feature pyramid (Lin et al. 2017), which Semantic FPN and Mask R-CNN both stand on."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nextvit.heads.units import Unit

PYRAMID = 256  # channels of each level


class FPN(nn.Module):
    """A 1x1 and a 3x3 convolution a level, the coarser one added in between.

    Maps at strides 4, 8, 16, 32, finest first -> as many maps of PYRAMID channels, of the same sizes; `coarser`: and a
    fifth at stride 64, every second pixel of the fourth.
    """

    def __init__(self, widths: Sequence[int], *, coarser: bool = False):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Unit(width, PYRAMID, 1, norm=False, relu=False) for width in widths)
        self.fpn_convs = nn.ModuleList(Unit(PYRAMID, PYRAMID, 3, norm=False, relu=False) for _ in widths)
        self.coarser = coarser

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for fine, coarse in ((2, 3), (1, 2), (0, 1)):
            size = levels[fine].shape[2:]
            levels[fine] = levels[fine] + F.interpolate(levels[coarse], size=size, mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, 2)] if self.coarser else levels
