"""Detectors that find something: weights by key, their last layers brought to a range where detections happen."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvit import create_model
from nextvit.detector import Detector, with_image
from nextvit.heads.boxes import pooled
from nextvit.heads.mask_rcnn import BOX_SIDE, MASK_SIDE, anchors_of, detections, proposals
from tests.conftest import fill, uniform


def spread(layer: nn.Module, outputs: Tensor, std: float) -> None:
    """Scale and shift a last layer such that its outputs (N, C), seen here, are centred and vary by `std`."""
    scale = std / outputs.std(dim=0)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.sub_(outputs.mean(dim=0)).mul_(scale)


def lively(name: str = "nextvit_nano", classes: int = 80, size: tuple[int, int] = (193, 161)) -> Detector:
    """A detector that finds objects of many classes, large and small, with scores between 0.2 and 0.99."""
    return copy.deepcopy(_lively(name, classes, size))


@functools.cache
@torch.no_grad()
def _lively(name: str, classes: int, size: tuple[int, int]) -> Detector:
    model = fill(create_model(name, task="detect", num_classes=classes))
    image = noise(size)
    maps = model.neck(model.backbone(image))
    hidden = torch.cat([F.relu(model.rpn_head.rpn_conv(x)).flatten(2) for x in maps], dim=2)[:, :, None]
    for layer, std in ((model.rpn_head.rpn_cls, 2.0), (model.rpn_head.rpn_reg, 0.2)):
        spread(layer, layer(hidden)[0, :, 0].T, std)
    scores, deltas = model.rpn_head(maps)
    boxes = proposals([s[0] for s in scores], [d[0] for d in deltas], anchors_of(maps), size, 1000)
    x = pooled(maps[:4], with_image([boxes]), BOX_SIDE).flatten(1)
    for layer in model.roi_head.bbox_head.shared_fcs:
        x = F.relu(layer(x))
    for layer, std in ((model.roi_head.bbox_head.fc_cls, 3.0), (model.roi_head.bbox_head.fc_reg, 1.0)):
        spread(layer, layer(x), std)
    logits, deltas = model.roi_head.bbox_head(pooled(maps[:4], with_image([boxes]), BOX_SIDE))
    boxes, _, _ = detections(logits, deltas, boxes, size)
    x = pooled(maps[:4], with_image([boxes]), MASK_SIDE)
    logits = model.roi_head.mask_head(x)
    spread(model.roi_head.mask_head.conv_logits, logits.permute(0, 2, 3, 1).flatten(0, 2), 2.0)
    return model


def noise(size: tuple[int, int], batch: int = 1, key: int = 100_000) -> Tensor:
    """(B, 3, H, W): coarse noise under fine noise, so that objects of several sizes differ."""
    height, width = size
    found = []
    for cell in (1, 8, 40):
        rows, columns = -(-height // cell), -(-width // cell)
        part = uniform(key + cell, batch * 3 * rows * columns).reshape(batch, 3, rows, columns)
        found.append(torch.from_numpy(part).float().repeat_interleave(cell, 2).repeat_interleave(cell, 3))
    return sum(4 * part[:, :, :height, :width] for part in found) / 3
