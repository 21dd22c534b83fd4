"""Folding: every BatchNorm goes into a convolution or linear layer beside it; the outputs stay the same.

In eval mode a BatchNorm is a scale and a shift per channel, BN(x) = a x + c. Behind a convolution both go into its
filters and bias. In front of a layer that sums over channels, without padding, they go into its columns and bias.
"""

import copy
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from nextvit.backbone import EMHSA, MHCA, NCB, NTB, ConvNormAct, NextViT, PatchEmbed
from nextvit.errors import UserError
from nextvit.heads.semantic_fpn import SemanticFPNHead
from nextvit.heads.units import Unit
from nextvit.networks import Dense, Network, backbone_of
from nextvit.segmenter import Segmenter

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
N = TypeVar("N", bound=Network)


class ScaleShift(nn.Module):
    """x -> scale x + shift, by channel: what is left of a BatchNorm that no layer beside it can take."""

    def __init__(self, norm: BatchNorm):
        super().__init__()
        scale, shift = _scale_and_shift(norm)
        self.scale, self.shift = nn.Parameter(scale[:, None, None]), nn.Parameter(shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def fold(model: N) -> N:
    """A new eval-mode module without BatchNorm and with the same outputs; the model given in is untouched.

    Where no layer can take a norm, a scale and shift by channel is left: in front of a padded 3x3 convolution, and
    where the normed map is an output. Norms of another kind (LayerNorm2d) depend on their input and stay, as does all
    of networks and blocks of others. A segmenter loses its auxiliary head, which training alone reads.
    """
    if not isinstance(model, Network):
        raise UserError(f"fold takes a model of nextvit.create_model, not {type(model).__name__}.")
    folded: Any = copy.deepcopy(model).eval()
    backbone = backbone_of(folded)
    if isinstance(backbone, NextViT):
        _fold_blocks(backbone)
    if isinstance(folded, Segmenter):
        folded.auxiliary_head = None
    if isinstance(folded, Dense):
        for unit in folded.modules():
            if isinstance(unit, Unit) and _is_batchnorm(unit.bn):
                unit.conv, unit.bn = _fold_behind(unit.conv, unit.bn), nn.Identity()
    if isinstance(backbone, NextViT):
        _fold_map_norms(backbone, folded)
    return folded


def _fold_blocks(backbone: NextViT) -> None:
    """Every norm inside the stem and the blocks."""
    for module in backbone.modules():
        match module:
            case ConvNormAct() | PatchEmbed() if _is_batchnorm(module.norm):
                module.conv, module.norm = _fold_behind(module.conv, module.norm), nn.Identity()
            case MHCA() if _is_batchnorm(module.norm):
                module.group_conv3x3, module.norm = _fold_behind(module.group_conv3x3, module.norm), nn.Identity()
            case NCB() if _is_batchnorm(module.norm):
                _fold_in_front(module.mlp.fc1, *_scale_and_shift(module.norm))
                module.norm = nn.Identity()
            case NTB():
                if module.e_mhsa is not None:
                    _fold_attention_norms(module, module.e_mhsa)
                if _is_batchnorm(module.norm2):
                    _fold_in_front(module.mlp.fc1, *_scale_and_shift(module.norm2))
                    module.norm2 = nn.Identity()


def _fold_map_norms(backbone: NextViT, network: Network) -> None:
    """The norms behind the stages, into all that read their maps: averages commute with a scale and shift."""
    norms = [*backbone.stage_norms, backbone.norm]
    for number, norm in enumerate(norms):
        if not _is_batchnorm(norm):
            continue
        readers = _readers(backbone, network, number)
        for layer in readers or ():
            _fold_in_front(layer, *_scale_and_shift(norm))
        norms[number] = ScaleShift(norm) if readers is None else nn.Identity()
    *finer, backbone.norm = norms
    backbone.stage_norms = nn.ModuleList(finer)


def _readers(backbone: NextViT, network: Any, number: int) -> list[Any] | None:
    """The layers that read the map of a stage, each summing over channels without padding; None: another one does."""
    stages: Any = backbone.stages
    following = [] if number == 3 else [stages[number + 1].blocks[0].patch_embed.conv]
    if isinstance(network, NextViT):
        return None if network.features_only else [*following, network.head.fc]
    if isinstance(network.decode_head, SemanticFPNHead):
        return [*following, network.neck.lateral_convs[number].conv]
    return None if number == 3 else [*following, network.decode_head.lateral_convs[number].conv]


def _is_batchnorm(norm: nn.Module) -> TypeGuard[BatchNorm]:
    return isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)


def _scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """a and c of BN(x) = a x + c."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale.detach(), (norm.bias - scale * norm.running_mean).detach()


def _fold_behind(conv: nn.Module, norm: BatchNorm) -> nn.Conv2d:
    """conv -> norm: scale each filter, and give the convolution the shift as its bias."""
    scale, shift = _scale_and_shift(norm)
    assert isinstance(conv, nn.Conv2d)
    conv.weight.data = conv.weight.data * scale[:, None, None, None]
    conv.bias = nn.Parameter(shift if conv.bias is None else conv.bias.data * scale + shift)
    return conv


def _fold_in_front(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """norm -> layer (linear or 1x1): the shift passes through the old weights, then the scale goes into the columns."""
    weight: Tensor = layer.weight.data
    columns = (1, -1) + (1,) * (weight.ndim - 2)
    layer.bias.data = layer.bias.data + (weight * shift.view(columns)).flatten(1).sum(1)
    layer.weight.data = weight * scale.view(columns)


def _fold_attention_norms(block: NTB, attention: EMHSA) -> None:
    """norm1 into Q; norm1 and, behind the average pooling that commutes with it, E-MHSA's own norm into K and V."""
    ones = torch.ones_like(attention.q.weight[0]).detach()
    scale, shift = ones, torch.zeros_like(ones)
    if _is_batchnorm(block.norm1):
        scale, shift = _scale_and_shift(block.norm1)
        _fold_in_front(attention.q, scale, shift)
        block.norm1 = nn.Identity()
    if _is_batchnorm(attention.norm):
        inner_scale, inner_shift = _scale_and_shift(attention.norm)
        scale, shift = inner_scale * scale, inner_scale * shift + inner_shift
        attention.norm = nn.Identity()
    _fold_in_front(attention.k, scale, shift)
    _fold_in_front(attention.v, scale, shift)
