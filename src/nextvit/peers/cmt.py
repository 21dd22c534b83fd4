"""CMT: Convolutional Neural Networks Meet Vision Transformers (arXiv 2107.06263), read downwards.

Stem, patch embedding, then the CMT block: LPU, LMHSA, IRFFN. Maps are (B, C, H, W), tokens (B, H * W, C).
Without the stochastic depth and the dropout before the classifier that the authors train with.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """One column of the paper's Table 1, with its size and cost from Table 2."""

    name: str
    image_size: int  # pixels, of a square image
    stem: int  # channels
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    expansion: float  # of IRFFN
    params_m: float  # millions
    flops_g: float  # 10^9 multiply-adds for one image


VARIANTS = {
    v.name: v
    for v in (
        Variant("cmt_tiny", 160, 16, (46, 92, 184, 368), (2, 2, 10, 2), 3.6, 9.5, 0.6),
        # Table 1 rounds this expansion to 3.8; the released code has 3.77.
        Variant("cmt_xs", 192, 16, (52, 104, 208, 416), (3, 3, 12, 3), 3.77, 15.2, 1.5),
        Variant("cmt_small", 224, 32, (64, 128, 256, 512), (3, 3, 16, 3), 4.0, 25.1, 4.0),
    )
}
HEADS = (1, 2, 4, 8)
REDUCTIONS = (8, 4, 2, 1)  # k of LMHSA: in each stage the keys lie at a stride of 32 pixels
FINAL_WIDTH = 1280


class Stem(nn.Sequential):
    """Three 3x3 convolutions (paper, 3.1), each with GELU, then batch norm. (B, 3, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int):
        layers: list[nn.Module] = []
        for c_in, stride in ((3, 2), (channels, 1), (channels, 1)):
            layers += [nn.Conv2d(c_in, channels, 3, stride, padding=1), nn.GELU(), nn.BatchNorm2d(channels)]
        super().__init__(*layers)


class PatchEmbed(nn.Module):
    """2x2 convolution of stride 2 and layer norm, before each stage (paper, 3.1).

    (B, c_in, H, W) -> (B, c_out, H / 2, W / 2)
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 2, 2)
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LPU(nn.Module):
    """Local Perception Unit (paper, 3.2): a residual depth-wise convolution. (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LMHSA(nn.Module):
    """Lightweight Multi-Head Self-Attention (paper, 3.2): all tokens ask, one in k * k answers.

    The paper reduces keys and values after their projections; here, as in the released code, the tokens before them,
    with a batch norm. (B, H * W, C), and the position bias (heads, H * W, H * W / k**2) -> (B, H * W, C).
    """

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        self.reduce: nn.Module = nn.Identity()
        if reduction > 1:
            conv = nn.Conv2d(channels, channels, reduction, reduction, groups=channels)
            self.reduce = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor, size: torch.Size, bias: Tensor) -> Tensor:
        fewer = self.reduce(to_map(x, size)).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(fewer), self.v(fewer)))
        affinity = q * q.shape[3] ** -0.5 @ k.transpose(2, 3) + resized(bias, q.shape[2], k.shape[2])
        # Written out: with a mask, PyTorch's fused attention does not decompose for torch.onnx.export.
        return self.proj((affinity.softmax(3) @ v).transpose(1, 2).flatten(2))


def to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W)"""
    return tokens.transpose(1, 2).unflatten(2, size)


def resized(bias: Tensor, queries: int, keys: int) -> Tensor:
    """The position bias (heads, N, M) at another number of tokens, by bicubic interpolation, as the paper has it."""
    if bias.shape[1:] == (queries, keys):
        return bias
    return F.interpolate(bias.unsqueeze(0), size=(queries, keys), mode="bicubic").squeeze(0)


class IRFFN(nn.Module):
    """Inverted Residual Feed-Forward Network (paper, 3.2): widen, look around, narrow.

    (B, C, H, W) -> the same
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.widen = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.BatchNorm2d(hidden))
        self.look = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.Sequential(nn.GELU(), nn.BatchNorm2d(hidden))
        self.narrow = nn.Sequential(nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        return self.narrow(self.act(x + self.look(x)))


class CMTBlock(nn.Module):
    """LPU, LMHSA, IRFFN (paper, 3.2). (B, C, H, W), and the position bias -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, reduction: int, expansion: float):
        super().__init__()
        self.lpu = LPU(channels)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.lmhsa = LMHSA(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.irffn = IRFFN(channels, int(channels * expansion))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.lpu(x)
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.lmhsa(self.norm1(tokens), size, bias)
        return to_map(tokens, size) + self.irffn(to_map(self.norm2(tokens), size))


class Stage(nn.Module):
    """Patch embedding and blocks that share one position bias. (B, c_in, H, W) -> (B, c_out, H / 2, W / 2)."""

    def __init__(self, variant: Variant, index: int, c_in: int, queries: int, keys: int):
        super().__init__()
        width, heads, reduction = variant.widths[index], HEADS[index], REDUCTIONS[index]
        self.embed = PatchEmbed(c_in, width)
        self.bias = nn.Parameter(torch.randn(heads, queries, keys))
        self.blocks = nn.ModuleList(
            CMTBlock(width, heads, reduction, variant.expansion) for _ in range(variant.depths[index])
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, self.bias)
        return x


class CMT(nn.Module):
    """The network: stem, four stages, head (paper, Figure 2c). (B, 3, H, W) -> (B, num_classes) logits.

    The position biases are made for `image_size` (height and width, or one side; without it, the variant's own) and
    interpolated at every call for images of another size, unless `of_size` did it once. H and W are multiples of 32.
    """

    def __init__(self, variant: Variant, num_classes: int = 1000, image_size: int | tuple[int, int] | None = None):
        super().__init__()
        self.variant, self.widths = variant, variant.widths
        sides = image_size or variant.image_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        keys = (height // 32) * (width // 32)
        self.stem = Stem(variant.stem)
        self.stages = nn.ModuleList(
            Stage(variant, i, c_in, queries=(height // (4 << i)) * (width // (4 << i)), keys=keys)
            for i, (c_in, _) in enumerate(pairwise((variant.stem, *variant.widths)))
        )
        self.final = nn.Sequential(
            nn.Conv2d(variant.widths[-1], FINAL_WIDTH, 1),
            nn.BatchNorm2d(FINAL_WIDTH),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
        )
        self.head = nn.Linear(FINAL_WIDTH, num_classes)
        self.apply(_initialise)

    def of_size(self, image_size: int) -> "CMT":
        """The same with position biases made for this size, which then are not interpolated at every call."""
        other = CMT(self.variant, self.head.out_features, image_size)
        there = other.state_dict()
        other.load_state_dict(
            {
                key: resized(value, *there[key].shape[1:]) if value.shape != there[key].shape else value
                for key, value in self.state_dict().items()
            }
        )
        return other

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the four stage outputs (B, C, H / s, W / s), s = 4, 8, 16, 32."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.maps(x)[-1]))


def _initialise(module: nn.Module) -> None:
    """As the released code: linear layers from a normal of std 0.02, convolutions by He's rule, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
