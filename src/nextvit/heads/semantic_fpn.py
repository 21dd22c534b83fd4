"""Semantic FPN (Kirillov et al. 2019), downwards: upsampling branches, classifier. Its neck is `fpn.FPN`."""

from collections.abc import Sequence

from torch import Tensor, nn

from nextvit.heads.fpn import PYRAMID
from nextvit.heads.units import DROPOUT, Unit, classifier, resized

BRANCH = 128  # channels of the head


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
