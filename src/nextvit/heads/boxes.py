"""Boxes of detection: anchors, box coder, overlap, suppression, matching and sampling, pooling by box.

A box is (x1, y1, x2, y2) in pixels, without a "+1" anywhere. All rules are those of the published detectors, which
differ from torchvision's defaults (docs/detect.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextvit.extras import need

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's levels
ANCHOR = 8  # an anchor's side, in strides
RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors of a place
LARGEST_LOG = math.log(1000 / 16)  # of a box's side, relative to the side that it is coded by
PAD = 32  # images are padded to multiples of so many pixels
FINEST_SIDE = 56  # pixels: boxes up to twice as large are pooled from the finest level
AT_ONCE = 2**23  # overlaps, or pixels of masks, that are held


# ---- anchors and their code ------------------------------------------------------------------------------------------


def anchors(rows: int, columns: int, stride: int, like: Tensor) -> Tensor:
    """(rows * columns * 3, 4): by row, column, ratio; centred at the corner of their place."""
    sides = [(ANCHOR * stride / math.sqrt(ratio), ANCHOR * stride * math.sqrt(ratio)) for ratio in RATIOS]
    shapes = like.new_tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides])
    y = torch.arange(rows, device=like.device, dtype=like.dtype) * stride
    x = torch.arange(columns, device=like.device, dtype=like.dtype) * stride
    y, x = y[:, None].expand(rows, columns), x[None].expand(rows, columns)
    places = torch.stack([x, y, x, y], dim=2).reshape(-1, 1, 4)
    return (places + shapes).reshape(-1, 4)


def decoded(bases: Tensor, deltas: Tensor, stds: Sequence[float]) -> Tensor:
    """(..., 4) boxes of deltas (dx, dy, dw, dh) in units of `stds`, relative to (..., 4) boxes."""
    deltas = deltas * deltas.new_tensor(stds)
    sides = bases[..., 2:] - bases[..., :2]
    centres = (bases[..., :2] + bases[..., 2:]) * 0.5 + sides * deltas[..., :2]
    half = sides * deltas[..., 2:].clamp(-LARGEST_LOG, LARGEST_LOG).exp() * 0.5
    return torch.cat([centres - half, centres + half], dim=-1)


def encoded(bases: Tensor, boxes: Tensor, stds: Sequence[float]) -> Tensor:
    """The deltas from which `decoded` makes `boxes`. Both (N, 4), with sides above 0."""
    sides, wanted = bases[:, 2:] - bases[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - bases[:, :2] - bases[:, 2:]) * 0.5 / sides
    return torch.cat([shift, (wanted / sides).log()], dim=1) / bases.new_tensor(stds)


def clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """(..., 4) cut to 0..width and 0..height."""
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Widths and heights."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


# ---- overlap and suppression -----------------------------------------------------------------------------------------


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """(N, 4) and (M, 4) -> (N, M): intersection over union."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (a, b)]
    return inside / (areas[0][:, None] + areas[1][None] - inside).clamp(min=1e-6)


def suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, most: float) -> Tensor:
    """Places of the boxes that stay, by falling score: none overlaps a better one of its group by more than `most`.

    The groups are moved apart, as the original does: so torch.export meets no branch on how many boxes there are.
    """
    ops = need("torchvision.ops", extra="detect")
    farthest = torch.cat([boxes, boxes.new_zeros(1, 4)]).max() + 1
    apart = boxes + (groups.to(boxes.dtype) * farthest)[:, None]
    found: Tensor = ops.nms(apart, scores, most)
    return found


# ---- matching and sampling, for training -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """Which boxes stand for which objects (MaxIoU, with low-quality matches as the original has them)."""

    positive: float  # overlap from which on a box stands for the object that it overlaps most
    negative: float  # and below which it stands for none
    least: float  # overlap from which on an object's best boxes stand for it whatever they overlap more
    share: float  # of positive ones among those that the losses see, at most


RPN_MATCHING = Matching(0.7, 0.3, 0.3, share=0.5)
ROI_MATCHING = Matching(0.5, 0.5, 0.5, share=0.25)


@dataclass(frozen=True)
class Sampling:
    """How many boxes of an image the losses see; the original's numbers."""

    anchors: int = 256
    boxes: int = 512
    masks: int = 128  # of the boxes that stand for an object


def matched(boxes: Tensor, objects: Tensor, rule: Matching) -> Tensor:
    """int64 (N,): the number of each box's object, -1: none, -2: neither one nor none.

    Of objects whose best box it is, a box stands for the last: the original goes through them in order.
    """
    best = boxes.new_full((len(boxes),), -1.0)
    which = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    last = which.clone()
    step = max(1, AT_ONCE // max(len(boxes), 1))
    for start in range(0, len(objects), step):
        found = overlaps(objects[start : start + step], boxes)
        value, index = found.max(dim=0)
        better = value > best  # ties stay with the first
        best, which = torch.where(better, value, best), torch.where(better, index + start, which)
        top = found.amax(dim=1, keepdim=True)
        own = (found == top) & (top >= rule.least)
        number = torch.arange(start, start + len(found), device=boxes.device)[:, None]
        last = torch.maximum(last, torch.where(own, number, -1).amax(dim=0))
    found = torch.where(best < rule.negative, -1, torch.where(best >= rule.positive, which, -2))
    return torch.where(last >= 0, last, found)


def sampled(match: Tensor, rule: Matching, count: int) -> tuple[Tensor, Tensor]:
    """Places of the positive and the negative boxes, `count` in all, drawn from torch's generator, each sorted."""
    positive = some(match.ge(0).nonzero()[:, 0], int(count * rule.share))
    negative = some(match.eq(-1).nonzero()[:, 0], count - len(positive))
    return positive, negative


def some(places: Tensor, most: int) -> Tensor:
    """At most so many of them, drawn from torch's generator, in their order."""
    if len(places) <= most:
        return places
    chosen = torch.randperm(len(places))[:most].to(places.device)  # drawn on the CPU: the same on every device
    return places[chosen].sort().values


# ---- pooling by box --------------------------------------------------------------------------------------------------


def pooled(maps: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
    """(N, C, size, size): what each box covers, of the level that is made for its size.

    maps: at strides 4, 8, 16, 32. rois: (N, 5), the number of the image and a box. Empty boxes give zeros.
    """
    ops = need("torchvision.ops", extra="detect")
    width, height = sides(rois[:, 1:])
    level = torch.floor(torch.log2((width * height).sqrt() / FINEST_SIDE + 1e-6)).clamp(0, len(maps) - 1)
    found = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], size, size)
    for number, (x, stride) in enumerate(zip(maps, STRIDES, strict=False)):
        # Empty ones are left out by their places: OpenVINO gives NaN for them, whatever they are multiplied by.
        here = ((level == number) & (width > 0) & (height > 0)).nonzero()[:, 0]
        exact = x if x.dtype.itemsize >= 4 else x.float()  # never in half precision
        part = ops.roi_align(exact, rois[here].to(exact.dtype), size, 1 / stride, 0, True)
        found = found.index_put((here,), part.to(x.dtype))
    return found


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """float32 (N, size, size) of 0 and 1: the mask of each box's object within the box.

    masks: uint8 (objects, H, W). objects: int64 (N,). boxes: (N, 4).
    """
    ops = need("torchvision.ops", extra="detect")
    found = boxes.new_zeros(len(boxes), size, size)
    if not masks.numel():
        return found
    height, width = masks.shape[1:]
    rois = torch.cat([objects[:, None].to(boxes.dtype), clipped(boxes, height, width)], dim=1)
    step = max(1, AT_ONCE // (height * width))
    for start in range(0, len(masks), step):
        here = ((objects >= start) & (objects < start + step)).nonzero()[:, 0]
        part = rois[here] - rois.new_tensor([start, 0, 0, 0, 0])
        layer = masks[start : start + step, None].to(boxes.dtype)
        found[here] = (ops.roi_align(layer, part, size, 1.0, 0, True)[:, 0] >= 0.5).to(boxes.dtype)
    return found
