"""UperNet (Xiao et al. 2018), read downwards: pyramid pooling, the head around it, and the auxiliary FCN head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nextvit.heads.units import DROPOUT, Unit, classifier, resized

CHANNELS = 512
GRIDS = (1, 2, 3, 6)  # cells a side that the coarsest map is averaged over
AUXILIARY_CHANNELS = 256


class GridPool(nn.Module):
    """Average over a grid of cells: (B, C, H, W) -> (B, C, cells, cells).

    The same as AdaptiveAvgPool2d(cells), whose windows differ in size where the sides do not divide, as two products
    with matrices of shares: those can be exported for free sizes.
    """

    def __init__(self, cells: int):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        if self.cells == 1:  # the products would leave a condition on the sides that torch.export cannot prove
            return x.mean((2, 3), keepdim=True)
        rows, columns = (self.shares(side, x) for side in x.shape[2:])
        return rows @ x @ columns.transpose(0, 1)

    def shares(self, side: int, like: Tensor) -> Tensor:
        """(cells, side): what each pixel of a side is of each cell's average."""
        cell = torch.arange(self.cells, device=like.device)[:, None]
        pixel = torch.arange(side, device=like.device)[None]
        inside = (pixel >= cell * side // self.cells) & (pixel * self.cells < (cell + 1) * side)
        inside = inside.to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


class UperNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, a pyramid down from it, all levels joined at stride 4 and classified.

    Four maps at strides 4, 8, 16, 32 -> (B, classes, H / 4, W / 4) logits.
    """

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        *finer, coarsest = widths
        self.conv_seg = classifier(CHANNELS, classes)
        self.psp_modules = nn.ModuleList(nn.Sequential(GridPool(n), Unit(coarsest, CHANNELS, 1)) for n in GRIDS)
        self.bottleneck = Unit(coarsest + len(GRIDS) * CHANNELS, CHANNELS, 3)
        self.lateral_convs = nn.ModuleList(Unit(width, CHANNELS, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(Unit(CHANNELS, CHANNELS, 3) for _ in finer)
        self.fpn_bottleneck = Unit(len(widths) * CHANNELS, CHANNELS, 3)
        self.dropout = nn.Dropout2d(DROPOUT)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = maps
        pooled = [resized(pool(coarsest), coarsest.shape[2:]) for pool in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for fine, coarse in ((2, 3), (1, 2), (0, 1)):
            levels[fine] = levels[fine] + resized(levels[coarse], levels[fine].shape[2:])
        finest, *rest = [*(conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)), levels[-1]]
        joined = torch.cat([finest, *(resized(x, finest.shape[2:]) for x in rest)], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(joined)))


class FCNHead(nn.Module):
    """One convolution and a classifier, on stage 3: an auxiliary loss in training, and nothing else."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.conv_seg = classifier(AUXILIARY_CHANNELS, classes)
        self.convs = nn.Sequential(Unit(width, AUXILIARY_CHANNELS, 3))
        self.dropout = nn.Dropout2d(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))
