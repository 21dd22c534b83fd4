"""TRT-ViT: TensorRT-oriented Vision Transformer (arXiv 2205.09579), a RECONSTRUCTION, read downwards.

No code of the authors was found, and the paper's table of configurations was not at hand. Its guidelines give the
design: convolution in the early stages, Transformer in the last one; shallow stages, then deep ones; in a mixed block,
global before local. The widths follow from the totals of the dense networks in the Next-ViT paper (Tables 5 and 6). The
parts of a mixed block are as third parties read its figure; stem and BottleNeck are ResNet's, the patch embedding is
Next-ViT's. The depths were chosen so that the printed totals of C and D both fit; other choices fit as well. Without
stochastic depth.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """One network of the family, with its size and cost as the Next-ViT paper's Table 4 prints them."""

    name: str
    image_size: int  # pixels, of a square image
    widths: tuple[int, int, int, int]  # inferred
    depths: tuple[int, int, int, int]  # fitted
    params_m: float  # millions
    flops_g: float  # 10^9 multiply-adds for one image


VARIANTS = {
    v.name: v
    for v in (
        Variant("trt_vit_c", 224, (256, 512, 1024, 1536), (2, 3, 8, 6), 67.3, 5.9),
        Variant("trt_vit_d", 224, (256, 512, 1024, 2048), (4, 5, 16, 5), 103.0, 9.7),
    )
}
STEM_WIDTH = 64
BOTTLENECK = 4  # a BottleNeck's 3x3 convolution has a quarter of the channels
GLOBAL_SHARE = 0.5  # R: the Transformer's part of a MixBlock's channels
HEAD_DIM = 32
MLP_RATIO = 4


class Stem(nn.Sequential):
    """ResNet's: 7x7 convolution and maximum, each of stride 2. (B, 3, H, W) -> (B, STEM_WIDTH, H / 4, W / 4)."""

    def __init__(self) -> None:
        super().__init__(conv_norm(3, STEM_WIDTH, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm. (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class PatchEmbed(nn.Sequential):
    """Average pooling and a 1x1 convolution, as in Next-ViT. (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        super().__init__(pool, conv_norm(c_in, c_out, 1))


class BottleNeck(nn.Module):
    """ResNet's block: 1x1, 3x3 and 1x1 convolutions, residual. (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // BOTTLENECK
        self.convs = nn.Sequential(
            conv_norm(channels, inner, 1),
            nn.ReLU(inplace=True),
            conv_norm(inner, inner, 3),
            nn.ReLU(inplace=True),
            conv_norm(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.convs(x))


class Transformer(nn.Module):
    """ViT's block: multi-head self-attention, then MLP, each after a layer norm and residual. (B, N, C) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        hidden = channels * MLP_RATIO
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, HEAD_DIM)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MixBlockC(nn.Module):
    """Transformer, then BottleNeck on its answer: global before local; the output is both, side by side.

    A 1x1 convolution first narrows the map to the share R. (B, C, H, W) -> the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        narrow = int(channels * GLOBAL_SHARE)
        self.narrow = conv_norm(channels, narrow, 1)
        self.transformer = Transformer(narrow)
        self.bottleneck = BottleNeck(narrow)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(x)
        far = self.transformer(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, y.shape[2:])
        return x + torch.cat((far, self.bottleneck(far)), dim=1)


class TRTViT(nn.Module):
    """The network: stem, three stages of BottleNecks, one of MixBlocks, norm, head.

    (B, 3, H, W) -> (B, num_classes) logits. H and W are multiples of 32.
    """

    def __init__(self, variant: Variant, num_classes: int = 1000):
        super().__init__()
        self.variant, self.widths = variant, variant.widths
        self.stem = Stem()
        self.embeds = nn.ModuleList(
            PatchEmbed(c_in, c_out, stride)
            for (c_in, c_out), stride in zip(pairwise((STEM_WIDTH, *variant.widths)), (1, 2, 2, 2), strict=True)
        )
        blocks = (BottleNeck, BottleNeck, BottleNeck, MixBlockC)
        self.stages = nn.ModuleList(
            nn.Sequential(*(block(width) for _ in range(depth)))
            for block, width, depth in zip(blocks, variant.widths, variant.depths, strict=True)
        )
        self.norm = nn.BatchNorm2d(variant.widths[-1])
        self.head = nn.Linear(variant.widths[-1], num_classes)
        self.apply(_initialise)

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the four stage outputs (B, C, H / s, W / s), s = 4, 8, 16, 32."""
        x = self.stem(x)
        maps = []
        for embed, stage in zip(self.embeds, self.stages, strict=True):
            x = stage(embed(x))
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.maps(x)[-1]).mean((2, 3)))


def _initialise(module: nn.Module) -> None:
    """As Next-ViT: weights from a normal of std 0.02, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
