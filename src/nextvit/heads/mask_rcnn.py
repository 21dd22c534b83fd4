"""Mask R-CNN (He et al. 2017), read downwards: proposals, boxes and classes of them, masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvit.heads.boxes import STRIDES, anchors, clipped, decoded, sides, suppressed
from nextvit.heads.fpn import PYRAMID
from nextvit.heads.units import Unit, zero

ANCHORS = 3  # a place
RPN_STDS = (1.0, 1.0, 1.0, 1.0)  # units of the deltas
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
HIDDEN = 1024
BOX_SIDE, MASK_SIDE = 7, 14  # of what is pooled for a box
CANDIDATES = {"test": 1000, "train": 2000}  # of a level, before suppression
PROPOSALS = 1000  # of an image
PROPOSAL_OVERLAP, BOX_OVERLAP = 0.7, 0.5  # of two that both stay, at most
LEAST_SCORE = 0.05
DETECTIONS = 100  # of an image, at most


class RPNHead(nn.Module):
    """Region proposals: of every place of five levels three anchors, whether each holds something, and its deltas."""

    def __init__(self) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(PYRAMID, PYRAMID, 3, padding=1)
        self.rpn_cls = nn.Conv2d(PYRAMID, ANCHORS, 1)
        self.rpn_reg = nn.Conv2d(PYRAMID, 4 * ANCHORS, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(layer.weight, std=0.01)
            zero(layer)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Five (B, PYRAMID, H, W) -> logits and deltas of each level: (B, H * W * 3), (B, H * W * 3, 4)."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        scores = [self.rpn_cls(x).permute(0, 2, 3, 1).flatten(1) for x in hidden]
        return scores, [self.rpn_reg(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in hidden]


def anchors_of(maps: Sequence[Tensor]) -> list[Tensor]:
    """Of each level, as many as it has scores; in float32."""
    return [anchors(x.shape[2], x.shape[3], stride, x.float()) for x, stride in zip(maps, STRIDES, strict=True)]


def proposals(
    scores: Sequence[Tensor], deltas: Sequence[Tensor], bases: Sequence[Tensor], size: tuple[int, int], most: int
) -> Tensor:
    """(N, 4), N <= PROPOSALS, by falling score: of one image's levels the `most` best, decoded, cut, suppressed.

    scores: (A,) logits of each level; size: of the image without its padding. Ranked by logits, whose order is that of
    the probabilities: runtimes round small ones apart (ONNX Runtime to multiples of 3e-8), which changes who is kept.
    """
    kept, boxes, levels = [], [], []
    for level, (score, delta, base) in enumerate(zip(scores, deltas, bases, strict=True)):
        score, best = score.float().topk(min(most, score.shape[0]))
        kept.append(score)
        boxes.append(clipped(decoded(base[best], delta[best].float(), RPN_STDS), *size))
        levels.append(torch.full_like(best, level))
    score, box, of_level = torch.cat(kept), torch.cat(boxes), torch.cat(levels)
    score = score - score.min() + 1  # OpenVINO suppresses what is not above 0
    width, height = sides(box)
    some = ((width > 0) & (height > 0)).nonzero()[:, 0]
    score, box = score[some], box[some]
    return box[suppressed(box, score, of_level[some], PROPOSAL_OVERLAP)[:PROPOSALS]]


class BoxHead(nn.Module):
    """Two hidden layers on what a proposal covers: (N, PYRAMID, 7, 7) -> logits (N, classes + 1), the background last,
    and deltas (N, classes, 4), of each class its own.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.fc_cls = nn.Linear(HIDDEN, classes + 1)
        self.fc_reg = nn.Linear(HIDDEN, 4 * classes)
        first, second = nn.Linear(PYRAMID * BOX_SIDE**2, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.shared_fcs = nn.ModuleList([first, second])
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (first, second):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.fc_cls, self.fc_reg, first, second):
            zero(layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x).unflatten(1, (-1, 4))


def detections(logits: Tensor, deltas: Tensor, bases: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """boxes (N, 4), labels (N,) and scores (N,), N <= DETECTIONS, by falling score, of one image's proposals.

    Every pair of a proposal and a class above LEAST_SCORE is one to begin with; suppression is within a class.
    """
    scores = logits.float().softmax(dim=1)[:, :-1]
    row, label = (scores > LEAST_SCORE).nonzero().unbind(dim=1)
    boxes = clipped(decoded(bases[row], deltas[row, label].float(), BOX_STDS), *size)
    score = scores[row, label]
    best = suppressed(boxes, score, label, BOX_OVERLAP)[:DETECTIONS]
    return boxes[best], label[best], score[best]


class MaskHead(nn.Module):
    """(N, PYRAMID, 14, 14) of what a box covers -> (N, classes, 28, 28) logits of its pixels, of each class its own."""

    def __init__(self, classes: int):
        super().__init__()
        self.convs = nn.Sequential(*(Unit(PYRAMID, PYRAMID, 3, norm=False) for _ in range(4)))
        self.upsample = nn.ConvTranspose2d(PYRAMID, PYRAMID, 2, stride=2)
        self.conv_logits = nn.Conv2d(PYRAMID, classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            zero(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_logits(F.relu(self.upsample(self.convs(x))))


class RoIHead(nn.Module):
    """Both heads, under the names of the released checkpoints."""

    def __init__(self, classes: int):
        super().__init__()
        self.bbox_head = BoxHead(classes)
        self.mask_head = MaskHead(classes)
