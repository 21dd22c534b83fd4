"""Networks that the paper compares with and timm lacks: a row each, built by the module of its family."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nextvit.peers import cmt, cswin, cvt, trt_vit, uniformer


@dataclass(frozen=True)
class Peer:
    """A network by its name, with its size and cost as its own paper prints them."""

    name: str
    image_size: int  # pixels a side
    params_m: float  # millions
    flops_g: float  # 10^9 multiply-adds for one image
    make: Callable[[int, int], nn.Module]  # classes, image size
    note: str
    last: str  # the layer that gives its classes


def _cmt(variant: Any, classes: int, image_size: int) -> nn.Module:
    return cmt.CMT(variant, classes, image_size)  # its position biases are made for one size


def _any_size(network: Callable[..., nn.Module], variant: Any, classes: int, image_size: int) -> nn.Module:
    return network(variant, classes)


_FAMILIES: tuple[tuple[dict[str, Any], Callable[[Any, int, int], nn.Module], str, str], ...] = (
    (cmt.VARIANTS, _cmt, "", "head"),
    (cswin.VARIANTS, partial(_any_size, cswin.CSWin), "", "head"),
    (cvt.VARIANTS, partial(_any_size, cvt.CvT), "", cvt.LAST),
    (uniformer.VARIANTS, partial(_any_size, uniformer.UniFormer), "", "head"),
    (trt_vit.VARIANTS, partial(_any_size, trt_vit.TRTViT), "a reconstruction, fitted to the printed totals", "head"),
)
PEERS = {
    v.name: Peer(v.name, v.image_size, v.params_m, v.flops_g, partial(make, v), note, last)
    for variants, make, note, last in _FAMILIES
    for v in variants.values()
}
