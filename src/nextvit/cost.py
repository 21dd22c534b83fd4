"""Parameters and operations, counted from the network itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nextvit.detector import Detector
from nextvit.heads.fpn import PYRAMID
from nextvit.heads.mask_rcnn import BOX_SIDE, DETECTIONS, MASK_SIDE, PROPOSALS
from nextvit.networks import Dense, Network


@dataclass(frozen=True)
class Cost:
    """What one image of `image_size` pixels a side costs."""

    params: int
    image_size: int
    gflops: float  # 1e9 multiply-adds: convolutions, linear layers, attention products
    gflops_paper: float  # as the authors counted: see `cost`


def _batchnorm_flops(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * 2 * torch.Size(shape).numel()  # torch counts 2 a multiply-add, so all here is doubled


def _mean_flops(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * torch.Size(shape).numel()


def cost(model: Network, image_size: int = 224, width: int | None = None) -> Cost:
    """Of an image of `image_size` pixels a side, or of that height and `width`.

    Counts by running the model once on torch's `meta` device, where nothing is computed. The authors' count has 2 for
    each output of a BatchNorm and 1 for each input of the final pool besides; that of their dense networks leaves out
    the attention products. Of a detector all PROPOSALS are classified and all DETECTIONS have masks.
    """
    aten = torch.ops.aten
    extra = {
        aten.native_batch_norm: _batchnorm_flops,
        aten._native_batch_norm_legit_no_training: _batchnorm_flops,
        aten.mean: _mean_flops,
        aten._adaptive_avg_pool2d: _mean_flops,
    }
    import copy

    ghost = copy.deepcopy(model).eval().to("meta")
    image: Tensor = torch.empty(1, model.metadata.in_channels, image_size, width or image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        if isinstance(ghost, Detector):
            ghost.rpn_head(ghost.neck(ghost.backbone(image)))
            ghost.roi_head.bbox_head(image.new_empty(PROPOSALS, PYRAMID, BOX_SIDE, BOX_SIDE))
            ghost.roi_head.mask_head(image.new_empty(DETECTIONS, PYRAMID, MASK_SIDE, MASK_SIDE))
        else:
            ghost(image)
    counts = counter.get_flop_counts()["Global"]
    all_macs = counter.get_total_flops() / 2
    extras = sum(flops / 2 for op, flops in counts.items() if op in extra)
    dense = isinstance(model, Dense)
    left_out = sum(flops / 2 for op, flops in counts.items() if dense and ("attention" in str(op) or op is aten.bmm))
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, image_size, (all_macs - extras) / 1e9, (all_macs - left_out) / 1e9)
