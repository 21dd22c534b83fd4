"""Next-ViT (paper, section 3), read downwards: MHCA, MLP, NCB, E-MHSA, NTB, then stem, stages and head.

Maps are (B, C, H, W). The parameter names are those of timm's Next-ViT, so that files go both ways.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvit.errors import UserError
from nextvit.metadata import Metadata
from nextvit.spec import Block, KvPooling, Variant, mixed_widths, plan

SMALLEST_SIDE = 32  # pixels: below it a stage has fewer tokens than E-MHSA pools into one key


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (the alternative of the paper's Table 9)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": partial(nn.ReLU, inplace=True), "gelu": nn.GELU}


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is dropped with probability `rate`, kept ones are scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"{self.rate:.4f}"


class ConvNormAct(nn.Module):
    """3x3 convolution, norm, activation: the unit of the stem. (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ...)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str, activation: str):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm = NORMS[norm](c_out)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class HalvingPool(nn.Module):
    """Average of 2 x 2 windows, smaller ones at an odd border. (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)).

    The same as AvgPool2d(2, ceil_mode=True, count_include_pad=False): a border value repeated once leaves the average
    of its window as it was. Written so, the output size has one formula for odd and even sides, and torch.export can
    prove it for free sizes. Torch's compiler takes the other form: it has the strides of this one's gradient wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)


class PatchEmbed(nn.Module):
    """Halve the map and change its channels, each only where asked: with stride 1 and equal channels, the identity.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str):
        super().__init__()
        moved = stride > 1 or c_in != c_out
        self.pool = HalvingPool() if stride == 2 else nn.Identity()
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False) if moved else nn.Identity()
        self.norm = NORMS[norm](c_out) if moved else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class MHCA(nn.Module):
    """Multi-Head Convolutional Attention (paper, 3.2): a 3x3 convolution in each head, then a 1x1 over all."""

    def __init__(self, channels: int, head_dim: int, norm: str, activation: str):
        super().__init__()
        heads = channels // head_dim
        self.group_conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, groups=heads, bias=False)
        self.norm = NORMS[norm](channels)
        self.act = ACTIVATIONS[activation]()
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))


class MLP(nn.Module):
    """Two 1x1 convolutions with an activation between them. (B, C, H, W) -> the same."""

    def __init__(self, channels: int, expand: int, activation: str):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels * expand, 1)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Conv2d(channels * expand, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Stacked(nn.Module):
    """A block that a stage stacks: the first of them behind a patch embedding.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride))
    """

    patch_embed: PatchEmbed


class NCB(Stacked):
    """Next Convolution Block (paper, 3.2): mix nearby pixels, then mix channels; both steps are residual.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, b: Block):
        super().__init__()
        if b.c_out % b.head_dim:
            raise UserError(f"an NCB of width {b.c_out} has no whole number of heads; take a multiple of {b.head_dim}.")
        self.patch_embed = PatchEmbed(b.c_in, b.c_out, b.stride, b.norm)
        self.mhca = MHCA(b.c_out, b.head_dim, b.norm, b.activation)
        self.norm = NORMS[b.norm](b.c_out)
        self.mlp = MLP(b.c_out, b.expand, b.activation)
        self.drop_path = DropPath(b.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        return x + self.drop_path(self.mlp(self.norm(x)))


class SequencePool(nn.Module):
    """Average of sr * sr consecutive tokens of the raster scan, as the published weights were trained.

    (B, C, H, W) -> (B, C, H * W // sr**2); the last tokens are left out where the number does not divide.
    """

    def __init__(self, reduction: int):
        super().__init__()
        self.reduction = reduction
        self.pool = nn.AvgPool1d(reduction * reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x.flatten(2).contiguous())


class SpatialPool(nn.Module):
    """Average of sr x sr windows, smaller ones at the border. (B, C, H, W) -> (B, C, ceil(H / sr) * ceil(W / sr)).

    The same as AvgPool2d(sr, ceil_mode=True, count_include_pad=False), with sums and counts apart for the reason that
    HalvingPool gives.
    """

    def __init__(self, reduction: int):
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        more = self.reduction - 1
        shares = F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), (0, more, 0, more)), self.reduction)
        return (F.avg_pool2d(F.pad(x, (0, more, 0, more)), self.reduction) / shares).flatten(2).contiguous()


KV_POOLS: dict[KvPooling, Callable[[int], nn.Module]] = {"sequence": SequencePool, "spatial": SpatialPool}


class EMHSA(nn.Module):
    """Efficient Multi-Head Self Attention (paper, 3.3): all tokens ask, averages of sr * sr tokens answer.

    The paper's equation 5 pools after the key and value projections; here, as in the released code, before them, with a
    norm between. (B, C, H, W) -> the same.
    """

    def __init__(self, channels: int, head_dim: int, reduction: int, kv_pooling: KvPooling):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        self.pool = KV_POOLS[kv_pooling](reduction) if reduction > 1 else nn.Flatten(2)
        self.norm = nn.BatchNorm1d(channels) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        pooled = self.norm(self.pool(x)).transpose(1, 2)  # (B, M, C)
        q, k, v = (self.heads(y) for y in (self.q(tokens), self.k(pooled), self.v(pooled)))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, head_dim), scaled by head_dim ** -0.5
        return self.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, head_dim)"""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class NTB(Stacked):
    """Next Transformer Block (paper, 3.3): E-MHSA for the low frequencies, MHCA on its answer for the high ones.

    (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)); E-MHSA has the share r of the output channels: of
    r = 0 and r = 1 there is one of the two alone (paper, Table 8).
    """

    def __init__(self, b: Block):
        super().__init__()
        c_attention, c_convolution = mixed_widths(b.c_out, b.mix, b.head_dim)
        self.e_mhsa: EMHSA | None = None
        self.mhca: MHCA | None = None
        embedded = c_attention or c_convolution
        self.patch_embed = PatchEmbed(b.c_in, embedded, b.stride, b.norm)
        if c_attention:
            self.norm1 = NORMS[b.norm](c_attention)
            self.e_mhsa = EMHSA(c_attention, b.head_dim, b.reduction, b.kv_pooling)
            self.drop_path_attention = DropPath(b.drop_path * b.mix)
        if c_convolution:
            self.projection = PatchEmbed(embedded, c_convolution, 1, b.norm)
            self.mhca = MHCA(c_convolution, b.head_dim, b.norm, b.activation)
            self.drop_path_convolution = DropPath(b.drop_path * (1 - b.mix))
        self.norm2 = NORMS[b.norm](b.c_out)
        self.mlp = MLP(b.c_out, b.expand, b.activation)
        self.drop_path = DropPath(b.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        parts = []
        if self.e_mhsa is not None:
            x = x + self.drop_path_attention(self.e_mhsa(self.norm1(x)))
            parts.append(x)
        if self.mhca is not None:
            x = self.projection(x)
            parts.append(x + self.drop_path_convolution(self.mhca(x)))
        x = torch.cat(parts, dim=1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


Kinds = Mapping[str, Callable[[Block], Stacked]]
BLOCKS: Kinds = {"ncb": NCB, "ntb": NTB}


class NHS(nn.Module):
    """A stage by the Next Hybrid Strategy (paper, 3.4): (NCB x N + NTB x 1) x L, as its plan lists the blocks."""

    def __init__(self, blocks: tuple[Block, ...], kinds: Kinds):
        super().__init__()
        self.blocks = nn.Sequential(*(kinds[b.kind](b) for b in blocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class NextViT(nn.Module):
    """The network: stem, four stages, norm, head.

    (B, in_channels, H, W) -> (B, num_classes) logits, or with `features_only` the list of the four raw stage outputs at
    strides 4, 8, 16, 32, without the final norm. With `normed_features` each map has passed a norm, the last one the
    final norm, and the next stage reads it so: what the paper's segmentation networks are. H and W are 32 or more and
    need not be multiples of 32. kinds: the blocks that the variant's patterns name.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        normed_features: bool = False,
        drop_path_rate: float | None = None,
        kv_pooling: KvPooling = "sequence",
        kinds: Kinds = BLOCKS,
    ):
        super().__init__()
        self.variant, self.widths = variant, variant.widths
        self.features_only = features_only or normed_features
        self.layout = torch.channels_last  # fastest for convolutions on the CPU, and for half-precision ones on GPUs
        self.metadata = Metadata(variant.name, num_classes=num_classes, in_channels=in_channels, kv_pooling=kv_pooling)
        widths = (in_channels, *variant.stem)
        self.stem = nn.Sequential(
            *(
                ConvNormAct(c_in, c_out, stride, variant.norm, variant.activation)
                for c_in, c_out, stride in zip(widths, variant.stem, (2, 1, 1, 2), strict=False)
            )
        )
        self.stages = nn.Sequential(*(NHS(blocks, kinds) for blocks in plan(variant, drop_path_rate, kv_pooling)))
        norm, (*finer, coarsest) = NORMS[variant.norm], variant.widths
        self.stage_norms = nn.ModuleList(norm(width) if normed_features else nn.Identity() for width in finer)
        self.norm = nn.Identity() if features_only and not normed_features else norm(coarsest)
        if not self.features_only:
            self.head = nn.Sequential(
                OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), fc=nn.Linear(coarsest, num_classes))
            )
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if min(x.shape[2:]) < SMALLEST_SIDE:
            raise UserError(f"an image of {x.shape[2]} x {x.shape[3]} pixels is too small; both sides need 32 or more.")
        x = self.stem(x.contiguous(memory_format=self.layout))
        maps = []
        for stage, norm in zip(self.stages, (*self.stage_norms, self.norm), strict=True):
            x = norm(stage(x))
            maps.append(x)
        return maps if self.features_only else self.head(x)


def _initialise(module: nn.Module) -> None:
    """Weights from a normal of std 0.02, biases 0; norms start as the identity."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
