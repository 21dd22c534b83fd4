"""UniFormer: unifying convolution and self-attention (arXiv 2201.09450, for images), read downwards.

Patch embedding, DPE, the two kinds of MHRA, FFN, blocks, network. Maps are (B, C, H, W); within global blocks, after
DPE, (B, H, W, C). Without the stochastic depth that the authors train with.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """One row of the paper's model table, with its size and cost on ImageNet."""

    name: str
    image_size: int  # pixels, of a square image
    depths: tuple[int, int, int, int]
    window: int | None  # side, in tokens, of the windows in three of four blocks of the third stage; None: no windows
    params_m: float  # millions
    flops_g: float  # 10^9 multiply-adds for one image


SMALL = Variant("uniformer_small", 224, (3, 4, 8, 3), None, 22, 3.6)
BASE = Variant("uniformer_base", 224, (5, 8, 20, 7), None, 50, 8.3)
VARIANTS = {
    v.name: v
    for v in (
        SMALL,
        BASE,
        # For detection. Of a 224-pixel image the third stage has 14 x 14 tokens, one window: cost and result stay.
        replace(SMALL, name="uniformer_small_h14", window=14),
        replace(BASE, name="uniformer_base_h14", window=14),
    )
}
WIDTHS = (64, 128, 320, 512)
HEAD_DIM = 64
FFN_RATIO = 4
GLOBAL_EVERY = 4  # with windows: the last block of each four is global


class PatchEmbed(nn.Module):
    """Convolution whose stride is its kernel, and layer norm. (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, stride, stride)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DPE(nn.Module):
    """Dynamic Position Embedding (paper, section 3): a residual depth-wise convolution, padded with zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LocalMHRA(nn.Sequential):
    """Local Multi-Head Relation Aggregator: its affinity is a learnt 5x5 neighbourhood. (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, 1),
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, channels, 1),
        )


class GlobalMHRA(nn.Module):
    """Global Multi-Head Relation Aggregator: its affinity compares all tokens. (B, H, W, C) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H * W, HEAD_DIM)
        return self.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


class WindowMHRA(GlobalMHRA):
    """Global MHRA within windows; zeros fill the last ones, right and below. (B, H, W, C) -> the same."""

    def __init__(self, channels: int, window: int):
        super().__init__(channels)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        more_h, more_w = -height % self.window, -width % self.window
        if more_h or more_w:
            x = F.pad(x, (0, 0, 0, more_w, 0, more_h))
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        x = x.unflatten(2, (columns, self.window)).unflatten(1, (rows, self.window)).transpose(2, 3).flatten(0, 2)
        x = super().forward(x)
        x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width] if more_h or more_w else x


class LocalBlock(nn.Module):
    """DPE, local MHRA, FFN, with batch norm (paper, equations 1 to 3). (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.dpe = DPE(channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.mhra = LocalMHRA(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        hidden = channels * FFN_RATIO
        self.ffn = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dpe(x)
        x = x + self.mhra(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class GlobalBlock(nn.Module):
    """DPE, global MHRA (in windows, if asked), FFN, with layer norm (paper, equations 1 to 3).

    (B, C, H, W) -> the same
    """

    def __init__(self, channels: int, window: int | None):
        super().__init__()
        self.dpe = DPE(channels)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.mhra = WindowMHRA(channels, window) if window else GlobalMHRA(channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        hidden = channels * FFN_RATIO
        self.ffn = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dpe(x).permute(0, 2, 3, 1)
        x = x + self.mhra(self.norm1(x))
        x = x + self.ffn(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class UniFormer(nn.Module):
    """The network: two local and two global stages, norm, head. (B, 3, H, W) -> (B, num_classes) logits.

    H and W are multiples of 32. The maps of a dense task are the bare stage outputs; the authors add a layer norm to
    each.
    """

    def __init__(self, variant: Variant, num_classes: int = 1000):
        super().__init__()
        self.variant, self.widths = variant, WIDTHS
        one, two, three, four = variant.depths
        windows = [None if (i + 1) % GLOBAL_EVERY == 0 else variant.window for i in range(three)]
        self.embeds = nn.ModuleList(
            PatchEmbed(c_in, c_out, stride)
            for (c_in, c_out), stride in zip(pairwise((3, *WIDTHS)), (4, 2, 2, 2), strict=True)
        )
        self.stages = nn.ModuleList(
            (
                nn.Sequential(*(LocalBlock(WIDTHS[0]) for _ in range(one))),
                nn.Sequential(*(LocalBlock(WIDTHS[1]) for _ in range(two))),
                nn.Sequential(*(GlobalBlock(WIDTHS[2], window) for window in windows)),
                nn.Sequential(*(GlobalBlock(WIDTHS[3], None) for _ in range(four))),
            )
        )
        self.norm = nn.BatchNorm2d(WIDTHS[3])
        self.head = nn.Linear(WIDTHS[3], num_classes)
        self.apply(_initialise)

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the four stage outputs (B, C, H / s, W / s), s = 4, 8, 16, 32."""
        maps = []
        for embed, stage in zip(self.embeds, self.stages, strict=True):
            x = stage(embed(x))
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.maps(x)[-1]).mean((2, 3)))


def _initialise(module: nn.Module) -> None:
    """As the released code: linear layers from a normal of std 0.02 with biases 0, convolutions as PyTorch has them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
