"""What a step does to the weights: which of them move, how fast, and their running mean."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nextvit.backbone import NextViT, Stacked
from nextvit.errors import UserError
from nextvit.networks import Network, backbone_of
from nextvit.recipe import Optimizer, Recipe

BACKBONE = "backbone."
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: Network, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Groups for AdamW: the same weight decay and the same `scale` of the rate in each.

    What decays is said by `optimizer.decays`. The scale falls by `layer_decay` from block to block, from the
    classifier, or neck and heads, where it is 1, to the stem; the final norm of a classifier goes with the last block,
    as in timm. Frozen parameters are in no group.
    """
    blocks = [name.removeprefix(BACKBONE) for name, part in model.named_modules() if isinstance(part, Stacked)]
    depth = {name: index for index, name in enumerate(["stem", *blocks, "head"])} | {"norm": len(blocks)}
    of_norms = {id(p) for part in model.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = {"matrices": parameter.ndim > 1, "not_norms": id(parameter) not in of_norms, "all": True}
        decay = optimizer.weight_decay if decays[optimizer.decays] else 0.0
        below = depth["head"] - depth.get(_layer(name.removeprefix(BACKBONE)), depth["head"])
        scale = (optimizer.layer_decay or 1.0) ** below
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def _layer(name: str) -> str:
    """The stem, the block, the final norm or the head that a parameter belongs to."""
    first, *rest = name.split(".")
    return ".".join([first, *rest[:3]]) if first == "stages" else first


def insist_on_blocks(model: Network, optimizer: Optimizer) -> None:
    """UserError where the recipe asks for something by block or stage of a backbone that is not ours."""
    if not isinstance(backbone_of(model), NextViT) and (optimizer.frozen_stages or optimizer.layer_decay != 1):
        raise UserError(
            "optimizer.layer_decay and optimizer.frozen_stages go by Next-ViT's blocks; for networks of others set "
            "optimizer.layer_decay=1 and optimizer.frozen_stages=0."
        )


def freeze(model: Network, stages: int) -> list[nn.Module]:
    """The stem and the first `stages` stages learn nothing; returns them, whose BatchNorm must stay in eval mode."""
    backbone = backbone_of(model)
    frozen = [backbone.stem, *list(backbone.stages)[:stages]] if stages and isinstance(backbone, NextViT) else []
    for part in frozen:
        part.requires_grad_(False)
    return frozen


def learning_rate(done: float, epochs: int, recipe: Recipe) -> float:
    """The rate at a point of a run of `epochs` epochs, after `done` of them."""
    s, peak = recipe.schedule, recipe.optimizer.peak
    released = s.kind == "cosine_released"  # the authors' runs: by whole epochs, one of them late
    done = max(0.0, math.floor(done) - 1) if released else done
    warmup = min(s.warmup_epochs, 0.5 * epochs)  # of a short run at most half
    if s.kind == "poly":  # over the whole run; a warm-up makes it smaller
        least, start = min(s.min_lr, peak), min(s.warmup_lr, peak) / peak
        share = start + (1 - start) * done / warmup if done < warmup else 1.0
        return share * (least + (peak - least) * (1 - done / epochs) ** s.power)
    if done < warmup:  # 1. linear warm-up
        start = min(s.warmup_lr, peak)
        return start + (peak - start) * done / warmup
    if s.kind == "constant":  # 2. the peak,
        return peak
    if s.kind == "steps":  # a tenth of it after each fall,
        return peak * 0.1 ** sum(done >= fall for fall in s.falls)
    least = min(s.min_lr, peak)  # 3. or a cosine to the minimum; the released one does not wait for the warm-up
    past, whole = (done, epochs) if released else (done - warmup, epochs - warmup)
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * past / whole))


class RunningMean:
    """An exponential moving average of a model's weights; BatchNorm's statistics, which are one already, are copied."""

    def __init__(self, model: Network, decay: float):
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step number `step`, from 1; early on the mean is short, so that the first weights are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean: list[Tensor] = [*self.model.parameters()]
        torch._foreach_lerp_(mean, [*model.parameters()], 1 - decay)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in them is infinite or undefined."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
