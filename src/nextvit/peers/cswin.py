"""CSWin Transformer: a general backbone with cross-shaped windows (arXiv 2107.00652), read downwards.

Convolutional token embedding, LePE attention in stripes, CSWin block, stages, network. Maps are (B, H, W, C) within,
(B, C, H, W) outside. Without the stochastic depth that the authors train with.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """One column of the paper's Table 1, with its size and cost."""

    name: str
    image_size: int  # pixels, of a square image
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    params_m: float  # millions
    flops_g: float  # 10^9 multiply-adds for one image


VARIANTS = {
    v.name: v
    for v in (
        Variant("cswin_tiny", 224, (64, 128, 256, 512), (1, 2, 21, 1), (2, 4, 8, 16), 23, 4.3),
        Variant("cswin_small", 224, (64, 128, 256, 512), (2, 4, 32, 2), (2, 4, 8, 16), 35, 6.9),
    )
}
STRIPES = (1, 2, 7, None)  # sw of each stage; in the last one the window is the whole map
MLP_RATIO = 4


class TokenEmbed(nn.Module):
    """Convolutional token embedding (paper, 3.1): a convolution that overlaps, and layer norm.

    (B, c_in, H, W) -> (B, H / stride, W / stride, c_out)
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=(kernel - stride + 1) // 2)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class LePEAttention(nn.Module):
    """Self-attention in windows, with the Locally-enhanced Positional Encoding (paper, 3.2 and 3.3).

    LePE is a depth-wise convolution of the values, within each window. (3, B, H, W, C), queries, keys, values, and the
    window's height and width -> (B, H, W, C). A map that the windows do not tile gets zeros on both sides.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.lepe = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, qkv: Tensor, window: tuple[int, int]) -> Tensor:
        height, width = qkv.shape[2:4]
        h, w = window
        more_h, more_w = -height % h, -width % w
        top, left = more_h // 2, more_w // 2
        if more_h or more_w:
            qkv = F.pad(qkv, (0, 0, left, more_w - left, top, more_h - top))
        rows, columns = qkv.shape[2] // h, qkv.shape[3] // w
        windows = qkv.unflatten(3, (columns, w)).unflatten(2, (rows, h)).transpose(3, 4).flatten(1, 3)
        q, k, v = windows.flatten(2, 3).unflatten(3, (self.heads, -1)).transpose(2, 3)  # (windows, heads, h * w, ...)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(1, (h, w))
        lepe = self.lepe(windows[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = (mixed + lepe).unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, top : top + height, left : left + width] if more_h or more_w else x


class CSWinAttention(nn.Module):
    """Cross-Shaped Window Self-Attention (paper, 3.2): half the heads in each direction.

    Vertical stripes of width sw, horizontal ones of height sw. (B, H, W, C) -> the same.
    """

    def __init__(self, channels: int, heads: int, stripe: int):
        super().__init__()
        self.stripe = stripe
        self.qkv = nn.Linear(channels, channels * 3)
        self.vertical = LePEAttention(channels // 2, heads // 2)
        self.horizontal = LePEAttention(channels // 2, heads // 2)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        vertical, horizontal = self.qkv(x).unflatten(3, (3, -1)).permute(3, 0, 1, 2, 4).chunk(2, dim=4)
        vertical = self.vertical(vertical, (height, self.stripe))
        horizontal = self.horizontal(horizontal, (self.stripe, width))
        return self.proj(torch.cat((vertical, horizontal), dim=3))


class GlobalAttention(nn.Module):
    """What CSWin attention is in the last stage: one window, the whole map. (B, H, W, C) -> the same."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(channels, channels * 3)
        self.attention = LePEAttention(channels, heads)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).unflatten(3, (3, -1)).permute(3, 0, 1, 2, 4)
        return self.proj(self.attention(qkv, (height, width)))


class CSWinBlock(nn.Module):
    """Attention, then MLP, each after a layer norm and residual (paper, 3.4). (B, H, W, C) -> the same."""

    def __init__(self, channels: int, heads: int, stripe: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = CSWinAttention(channels, heads, stripe) if stripe else GlobalAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        hidden = channels * MLP_RATIO
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CSWin(nn.Module):
    """The network: four stages, norm, head (paper, Figure 2). (B, 3, H, W) -> (B, num_classes) logits.

    H and W are multiples of 32. The maps of a dense task are the bare stage outputs; the authors add a layer norm to
    each.
    """

    def __init__(self, variant: Variant, num_classes: int = 1000):
        super().__init__()
        self.variant, self.widths = variant, variant.widths
        first, *_, last = variant.widths
        merges = (TokenEmbed(c_in, c_out, 3, 2) for c_in, c_out in pairwise(variant.widths))
        self.embeds = nn.ModuleList((TokenEmbed(3, first, 7, 4), *merges))
        self.stages = nn.ModuleList(
            nn.Sequential(*(CSWinBlock(width, heads, stripe) for _ in range(depth)))
            for width, heads, stripe, depth in zip(variant.widths, variant.heads, STRIPES, variant.depths, strict=True)
        )
        self.norm = nn.LayerNorm(last)
        self.head = nn.Linear(last, num_classes)
        self.apply(_initialise)

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the four stage outputs (B, C, H / s, W / s), s = 4, 8, 16, 32."""
        maps = []
        for embed, stage in zip(self.embeds, self.stages, strict=True):
            x = stage(embed(x)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.maps(x)[-1].flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens).mean(1))


def _initialise(module: nn.Module) -> None:
    """As the released code: linear layers from a normal of std 0.02 with biases 0, convolutions as PyTorch has them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
