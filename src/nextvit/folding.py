"""Folding: every BatchNorm goes into a convolution or linear layer beside it; the outputs stay the same.

In eval mode a BatchNorm is a scale and a shift per channel, BN(x) = a x + c. Behind a convolution both go into its
filters and bias. In front of a layer that sums over channels, without padding, they go into its columns and bias.
"""

import copy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nextvit.backbone import EMHSA, MHCA, NCB, NTB, ConvNormAct, NextViT, PatchEmbed
from nextvit.errors import UserError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def fold(model: NextViT) -> NextViT:
    """A new eval-mode module without BatchNorm and with the same outputs; the model given in is untouched.

    Norms of another kind (LayerNorm2d) depend on their input and stay.
    """
    if not isinstance(model, NextViT):
        raise UserError(f"fold takes a model of nextvit.create_model, not {type(model).__name__}.")
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        match module:
            case ConvNormAct() | PatchEmbed() if _is_batchnorm(module.norm):
                module.conv, module.norm = _fold_behind(module.conv, module.norm), nn.Identity()
            case MHCA() if _is_batchnorm(module.norm):
                module.group_conv3x3, module.norm = _fold_behind(module.group_conv3x3, module.norm), nn.Identity()
            case NCB() if _is_batchnorm(module.norm):
                _fold_in_front(module.mlp.fc1, *_scale_and_shift(module.norm))
                module.norm = nn.Identity()
            case NTB():
                _fold_attention_norms(module)
                if _is_batchnorm(module.norm2):
                    _fold_in_front(module.mlp.fc1, *_scale_and_shift(module.norm2))
                    module.norm2 = nn.Identity()
    if not folded.features_only and _is_batchnorm(folded.norm):
        # The mean over all positions commutes with a scale and a shift per channel.
        _fold_in_front(folded.head.fc, *_scale_and_shift(folded.norm))
        folded.norm = nn.Identity()
    return folded


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


def _fold_attention_norms(block: NTB) -> None:
    """norm1 into Q; norm1 and, behind the average pooling that commutes with it, E-MHSA's own norm into K and V."""
    attention: EMHSA = block.e_mhsa
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
