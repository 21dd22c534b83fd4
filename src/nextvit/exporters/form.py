"""The form of a model that every format is made of: folded, its attention on maps, with the same outputs."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvit.backbone import EMHSA, NTB, HalvingPool, NextViT, PatchEmbed, SequencePool
from nextvit.detector import Detector, Padded
from nextvit.errors import UserError
from nextvit.folding import fold
from nextvit.heads.units import resized
from nextvit.metadata import Metadata
from nextvit.networks import Network, backbone_of
from nextvit.segmenter import Segmenter

WINDOWED = "LocallyGroupedAttn"  # timm's Twins: fused attention over five axes, which has no converter to ONNX


def export_form(model: Network, *, fixed: bool) -> Network:
    """A new module with the outputs of `model`, folded and rewritten for runtimes; `model` is untouched.

    fixed: the input has one size, so that sizes inside are constants: pooling and the output projection of E-MHSA then
    need no change of layout at all.
    """
    form = fold(model)
    backbone = backbone_of(form)
    if isinstance(backbone, NextViT):
        backbone.layout = torch.contiguous_format  # runtimes choose their own
    form.to(memory_format=torch.contiguous_format)
    for module in form.modules():
        if isinstance(module, NTB) and module.e_mhsa is not None:
            module.e_mhsa = MapEMHSA(module.e_mhsa, fixed=fixed)  # type: ignore[assignment]  # same shapes, other class
        if type(module).__name__ == WINDOWED:
            module.fused_attn = False  # type: ignore[assignment]  # its own flag
        if fixed and isinstance(module, PatchEmbed) and isinstance(module.pool, HalvingPool):
            module.pool = FixedHalvingPool()  # type: ignore[assignment]  # likewise
    return form


class StageOutputs(nn.Module):
    """A network whose one output is all that its stages give, a row an image: stem, stages, logits, flattened."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in stage_outputs(self.network, x)], dim=1)


class ClassMap(nn.Module):
    """A segmenter that gives the class of each pixel of its input: (B, C, H, W) -> int32 (B, H, W)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return resized(self.network(x), x.shape[2:]).argmax(1).to(torch.int32)


class ObjectOutputs(nn.Module):
    """A detector of one image without padding: (1, C, H, W) -> boxes, labels, scores and masks, a graph's outputs."""

    def __init__(self, network: Detector):
        super().__init__()
        self.network = Padded(network)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (found,) = self.network(x)
        return found["boxes"], found["labels"], found["scores"], found["masks"]


class PyramidMaps(nn.Module):
    """Backbone and feature pyramid of a detector: (B, C, H, W) -> five maps at strides 4 to 64."""

    def __init__(self, network: Detector):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.neck(self.network.backbone(x)))


def as_exported(network: Any, metadata: Metadata) -> nn.Module:
    """The network with the outputs that a file of this metadata has."""
    if metadata.gives_maps:
        return PyramidMaps(network)
    if metadata.task == "detect":
        return ObjectOutputs(network)
    return ClassMap(network) if metadata.gives_classes else network


def stage_outputs(network: Network, x: Tensor) -> list[Tensor]:
    """(B, C, H, W) -> the maps of the stem and of each stage, and the logits."""
    backbone = backbone_of(network)
    if not isinstance(backbone, NextViT):
        raise UserError("the stages of networks of others cannot be compared; leave --stages out.")
    x = backbone.stem(x)
    outputs, maps = [x], []
    for stage, norm in zip(backbone.stages, [*backbone.stage_norms, backbone.norm], strict=True):
        outputs.append(stage(x))
        x = norm(outputs[-1])  # a segmenter's next stage reads the normed map, too
        maps.append(x)
    if isinstance(network, NextViT):
        return [*outputs, network.head(x)]
    if isinstance(network, Segmenter):
        return [*outputs, network.decode_head(network.neck(maps))]
    assert isinstance(network, Detector)
    return [*outputs, torch.cat([level.flatten(1) for level in network.neck(maps)], dim=1)]


class FixedHalvingPool(nn.Module):
    """HalvingPool for one size: nothing to pad where the sides are even, which some runtimes need for their kernel."""

    def forward(self, x: Tensor) -> Tensor:
        odd = any(side % 2 for side in x.shape[2:])
        return F.avg_pool2d(x, 2, 2, ceil_mode=odd, count_include_pad=False)


class InDtype(nn.Module):
    """A network in another dtype that takes and gives float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: Tensor) -> Any:
        return _in_float(self.network(x.to(self.dtype)))


def _in_float(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(map(_in_float, found))
    return found.float() if found.is_floating_point() else found


class MapEMHSA(nn.Module):
    """A folded E-MHSA whose four linear layers are convolutions on maps. (B, C, H, W) -> the same.

    Runtimes then keep one layout through the block, quantise these layers as they do other convolutions, and add the
    residual inside the last one. The scale head_dim ** -0.5 lies in q.
    """

    def __init__(self, attention: EMHSA, *, fixed: bool):
        super().__init__()
        if not isinstance(attention.norm, nn.Identity):
            raise UserError("the export form is made of a folded model.")
        channels, self.head_dim = attention.q.in_features, attention.head_dim
        self.heads, self.fixed = channels // self.head_dim, fixed
        self.pool = attention.pool
        self.q = _pointwise(attention.q, self.head_dim**-0.5)
        self.k = _pointwise(attention.k)
        self.v = _pointwise(attention.v)
        # The projection sums over heads and their channels: a convolution over (head_dim, heads x 1).
        self.proj = nn.Conv2d(self.head_dim, channels, (self.heads, 1))
        weight = attention.proj.weight.detach().view(channels, self.heads, self.head_dim)
        self.proj.weight.data = weight.transpose(1, 2).unsqueeze(3).contiguous()
        self.proj.bias = nn.Parameter(attention.proj.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(pooled)), self.split(self.v(pooled))
        mixed = torch.softmax(q @ k.transpose(2, 3), dim=-1) @ v  # (B, heads, N, head_dim)
        batch, _, height, width = x.shape
        if self.fixed:  # heads stacked over the map: rows of one position lie `height` apart
            stacked = mixed.reshape(batch, self.heads * height, width, self.head_dim).permute(0, 3, 1, 2)
            return F.conv2d(stacked, self.proj.weight, self.proj.bias, dilation=(height, 1))
        return self.proj(mixed.permute(0, 3, 1, 2)).squeeze(2).unflatten(2, (height, width))

    def split(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, H * W, head_dim)"""
        if self.fixed and x.shape[2] * x.shape[3] == self.heads:  # which OpenVINO mixes up: see its session
            return x.flatten(2).unflatten(1, (self.heads, self.head_dim)).transpose(2, 3)
        tokens = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.heads, self.head_dim)
        return tokens.transpose(1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, M), or with nothing to pool the map itself."""
        if isinstance(self.pool, nn.Flatten):
            return x
        if self.fixed and isinstance(self.pool, SequencePool):
            # In two steps: within rows first, so that less has to change its layout.
            count = self.pool.reduction * self.pool.reduction
            first = math.gcd(x.shape[3], count)
            tokens = F.avg_pool2d(x, (1, first)).flatten(2).unsqueeze(2)
            return F.avg_pool2d(tokens, (1, count // first)) if count > first else tokens
        return self.pool(x).unsqueeze(2)


def _pointwise(linear: nn.Linear, scale: float = 1.0) -> nn.Conv2d:
    """The same layer as a 1x1 convolution."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.weight.data = (linear.weight.detach() * scale)[:, :, None, None].clone()
    conv.bias = nn.Parameter((linear.bias * scale).detach().clone())
    return conv
