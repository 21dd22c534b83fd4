"""Detection and instance segmentation (paper, 4.3): a backbone, a feature pyramid, Mask R-CNN on it, and its losses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nextvit.backbone import NextViT
from nextvit.foreign import ForeignMaps
from nextvit.heads.boxes import (
    PAD,
    ROI_MATCHING,
    RPN_MATCHING,
    STRIDES,
    Sampling,
    encoded,
    mask_targets,
    matched,
    pooled,
    sampled,
    some,
)
from nextvit.heads.fpn import FPN
from nextvit.heads.mask_rcnn import (
    BOX_SIDE,
    BOX_STDS,
    CANDIDATES,
    MASK_SIDE,
    RPN_STDS,
    RoIHead,
    RPNHead,
    anchors_of,
    detections,
    proposals,
)
from nextvit.metadata import Metadata

Size = tuple[int, int]  # height and width of an image without its padding
Objects = dict[str, Tensor]  # boxes (N, 4) with sides above 0, labels int64 (N,), masks uint8 (N, H, W)


class Detector(nn.Module):
    """(B, C, H, W), normalised -> of each image boxes, labels, scores and masks; given targets, the losses.

    backbone: gives four maps at strides 4, 8, 16, 32, of so many channels as `widths` says. Its BatchNorms keep their
    statistics while the rest trains, as the authors had it, unless `fixed_norms` is set to False; `sampling` tells how
    many boxes the losses see.
    """

    def __init__(self, backbone: NextViT | ForeignMaps, metadata: Metadata):
        super().__init__()
        self.metadata = metadata
        self.backbone = backbone
        self.neck = FPN(backbone.widths, coarser=True)
        self.rpn_head = RPNHead()
        self.roi_head = RoIHead(metadata.num_classes)
        self.fixed_norms = True
        self.sampling = Sampling()

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        for module in self.backbone.modules() if mode and self.fixed_norms else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(
        self, images: Tensor, targets: Sequence[Objects] | None = None, sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """One dict an image: boxes (N, 4) x1 y1 x2 y2 in pixels of the batch, labels (N,) from 0, scores (N,), masks
        (N, 28, 28) probabilities; by falling score, at most 100, none: empty tensors.

        targets: the objects of each image -> losses by name; their sum is what training lowers.
        sizes: of each image before its padding at the bottom and the right; boxes are cut to it. None: it has none.
        """
        sizes = [(images.shape[2], images.shape[3])] * len(images) if sizes is None else sizes
        maps = self.neck(self.backbone(images))
        scores, deltas = self.rpn_head(maps)
        bases = anchors_of(maps)
        most = CANDIDATES["test" if targets is None else "train"]
        with torch.no_grad():
            places = [
                proposals([s[i] for s in scores], [d[i] for d in deltas], bases, size, most)
                for i, size in enumerate(sizes)
            ]
        if targets is None:
            return self._detected(maps[:4], places, sizes)
        grids = [(x.shape[2], x.shape[3]) for x in maps]
        losses = rpn_losses(scores, deltas, bases, grids, targets, sizes, self.sampling.anchors)
        return losses | self._roi_losses(maps[:4], places, targets)

    def _detected(
        self, maps: Sequence[Tensor], places: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self.roi_head.bbox_head(pooled(maps, with_image(places), BOX_SIDE))
        parts = zip(by_image(logits, places), by_image(deltas, places), places, sizes, strict=True)
        found = [detections(*part) for part in parts]
        boxes, labels = [boxes for boxes, _, _ in found], torch.cat([labels for _, labels, _ in found])
        masks = self.roi_head.mask_head(pooled(maps, with_image(boxes), MASK_SIDE)).float()
        own = masks[torch.arange(labels.shape[0], device=labels.device), labels].sigmoid()
        return [
            {"boxes": box, "labels": label, "scores": score, "masks": mask}
            for (box, label, score), mask in zip(found, by_image(own, boxes), strict=True)
        ]

    def _roi_losses(
        self, maps: Sequence[Tensor], places: Sequence[Tensor], targets: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """Of proposals and the objects themselves, which are proposals too while the network learns."""
        chosen, positives, objects, classes = [], [], [], []
        background = self.metadata.num_classes
        for boxes, target in zip(places, targets, strict=True):
            own = torch.arange(len(target["boxes"]), device=boxes.device)
            match = torch.cat([own, matched(boxes, target["boxes"], ROI_MATCHING)])
            boxes = torch.cat([target["boxes"], boxes])
            positive, negative = sampled(match, ROI_MATCHING, self.sampling.boxes)
            chosen.append(boxes[torch.cat([positive, negative])])
            positives.append(boxes[positive])
            objects.append(match[positive])
            none = torch.full((len(negative),), background, device=boxes.device)
            classes.append(torch.cat([target["labels"][match[positive]], none]))
        label = torch.cat(classes)
        logits, deltas = self.roi_head.bbox_head(pooled(maps, with_image(chosen), BOX_SIDE))
        logits, deltas = logits.float(), deltas.float()
        positive = (label < background).nonzero()[:, 0]
        wanted = torch.cat(
            [
                encoded(boxes, target["boxes"][own], BOX_STDS)
                for boxes, target, own in zip(positives, targets, objects, strict=True)
            ]
        )
        return {
            "loss_cls": F.cross_entropy(logits, label, reduction="sum") / max(len(label), 1),
            "loss_bbox": (deltas[positive, label[positive]] - wanted).abs().sum() / max(len(label), 1),
            "loss_mask": self._mask_loss(maps, positives, objects, targets),
        }

    def _mask_loss(
        self,
        maps: Sequence[Tensor],
        positives: Sequence[Tensor],
        objects: Sequence[Tensor],
        targets: Sequence[Objects],
    ) -> Tensor:
        """Of the boxes that stand for an object, image by image, and of that object's mask within each."""
        drawn = [some(torch.arange(len(boxes), device=boxes.device), self.sampling.masks) for boxes in positives]
        boxes = [part[rows] for part, rows in zip(positives, drawn, strict=True)]
        owners = [part[rows] for part, rows in zip(objects, drawn, strict=True)]
        masks = self.roi_head.mask_head(pooled(maps, with_image(boxes), MASK_SIDE)).float()
        triples = list(zip(targets, owners, boxes, strict=True))
        truth = torch.cat([mask_targets(target["masks"], own, box, masks.shape[-1]) for target, own, box in triples])
        label = torch.cat([target["labels"][own] for target, own, _ in triples])
        own_class = masks[torch.arange(len(label), device=label.device), label]
        loss = F.binary_cross_entropy_with_logits(own_class, truth, reduction="sum")
        return loss / max(truth.numel(), 1)


class Padded(nn.Module):
    """A detector as it is asked: images without padding, which is added here and cut off the boxes again.

    (B, C, H, W), all of one size, normalised -> one dict an image.
    """

    def __init__(self, network: Detector):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % PAD, 0, -height % PAD))
        found: list[dict[str, Tensor]] = self.network(padded, sizes=[(height, width)] * len(images))
        return found


def rpn_losses(
    scores: Sequence[Tensor],
    deltas: Sequence[Tensor],
    bases: Sequence[Tensor],
    grids: Sequence[Size],
    targets: Sequence[Objects],
    sizes: Sequence[Size],
    count: int,
) -> dict[str, Tensor]:
    """Of the proposals' scores and boxes: on `count` anchors sampled of each image, over all levels together."""
    score, delta = (torch.cat(list(parts), dim=1).float() for parts in (scores, deltas))
    base = torch.cat(list(bases))
    seen_in_all = score.new_zeros(())
    total = {"loss_rpn_cls": score.new_zeros(()), "loss_rpn_bbox": score.new_zeros(())}
    for i, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        inside = torch.cat([_within(grid, stride, size, base) for grid, stride in zip(grids, STRIDES, strict=True)])
        match = torch.full((len(base),), -2, device=base.device)
        match[inside] = matched(base[inside], target["boxes"], RPN_MATCHING)
        positive, negative = sampled(match, RPN_MATCHING, count)
        seen = torch.cat([positive, negative])
        truth = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).float()
        own = match[positive]
        wanted = encoded(base[positive], target["boxes"][own], RPN_STDS)
        total["loss_rpn_cls"] += F.binary_cross_entropy_with_logits(score[i, seen], truth, reduction="sum")
        total["loss_rpn_bbox"] += (delta[i, positive] - wanted).abs().sum()
        seen_in_all += max(len(positive), 1) + max(len(negative), 1)
    return {name: loss / seen_in_all for name, loss in total.items()}


def _within(grid: Size, stride: int, size: Size, like: Tensor) -> Tensor:
    """bool (rows * columns * 3,): the anchors whose place lies within the image as it would be padded alone."""
    rows, columns = (
        torch.arange(cells, device=like.device) < -(-(-(-side // PAD) * PAD) // stride)
        for cells, side in zip(grid, size, strict=True)
    )
    return (rows[:, None] & columns[None]).reshape(-1, 1).expand(-1, 3).reshape(-1)


def by_image(rows: Tensor, boxes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of all images' boxes, image by image."""
    return rows.split([len(part) for part in boxes]) if len(boxes) > 1 else [rows]  # one: so that it can be exported


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """(N, 5) of all images: the number of the image and the box."""
    return torch.cat([F.pad(part, (1, 0), value=number) for number, part in enumerate(boxes)])
