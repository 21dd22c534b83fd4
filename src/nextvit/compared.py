"""The blocks that the paper's Table 7 puts in NCB's place, each as its own paper has it, behind our patch embedding."""

from typing import Any

from torch import Tensor, nn

from nextvit.backbone import BLOCKS, Kinds, PatchEmbed, Stacked
from nextvit.extras import need
from nextvit.peers.uniformer import LocalBlock
from nextvit.spec import Block

WINDOW = 7  # tokens a side, of local self-attention


class Compared(Stacked):
    """(B, c_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)); body: a block that keeps its input's shape."""

    def __init__(self, b: Block, body: nn.Module):
        super().__init__()
        self.patch_embed = PatchEmbed(b.c_in, b.c_out, b.stride, b.norm)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self.patch_embed(x))
        return out


def bottleneck(b: Block) -> Compared:
    """ResNet's (arXiv 1512.03385): 1x1 to a quarter of the channels, 3x3, 1x1 back."""
    resnet: Any = need("timm.models.resnet", extra="peers")
    block = resnet.Bottleneck(b.c_out, b.c_out // 4, drop_path=_drop_path(b))
    block.zero_init_last()  # as timm's ResNets start: many blocks that do not make much of every rounding
    return Compared(b, block)


def convnext(b: Block) -> Compared:
    """ConvNeXt's (arXiv 2201.03545): depthwise 7x7, LayerNorm, 1x1 to four times the channels, GELU, 1x1 back."""
    module: Any = need("timm.models.convnext", extra="peers")
    return Compared(b, module.ConvNeXtBlock(b.c_out, drop_path=b.drop_path))


def lsa(b: Block) -> Compared:
    """Local self-attention in windows of 7 x 7 tokens, as Twins has it (arXiv 2104.13840), and an MLP."""
    twins: Any = need("timm.models.twins", extra="peers")
    block = twins.Block(b.c_out, b.c_out // b.head_dim, drop_path=b.drop_path, ws=WINDOW)
    return Compared(b, OnTokens(block))


def poolformer(b: Block) -> Compared:
    """PoolFormer's (arXiv 2111.11418): 3x3 average pooling for a token mixer, GroupNorm, and an MLP."""
    metaformer: Any = need("timm.models.metaformer", extra="peers")
    layers: Any = need("timm.layers", extra="peers")
    block = metaformer.MetaFormerBlock(
        b.c_out,
        token_mixer=metaformer.Pooling,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layer=layers.GroupNorm1,
        drop_path=b.drop_path,
        layer_scale_init_value=1e-5,
    )
    return Compared(b, block)


def local_mhra(b: Block) -> Compared:
    """UniFormer's local multi-head relation aggregation (arXiv 2201.09450): depthwise 5x5 among 1x1, and an FFN."""
    return Compared(b, LocalBlock(b.c_out))


class OnTokens(nn.Module):
    """A block of tokens on maps. (B, C, H, W) -> the same."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.block(x.flatten(2).transpose(1, 2), x.shape[2:])
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def _drop_path(b: Block) -> nn.Module:
    layers: Any = need("timm.layers", extra="peers")
    path: nn.Module = layers.DropPath(b.drop_path)
    return path


KINDS: Kinds = {
    **BLOCKS,
    "bottleneck": bottleneck,
    "convnext": convnext,
    "lsa": lsa,
    "poolformer": poolformer,
    "local_mhra": local_mhra,
}
