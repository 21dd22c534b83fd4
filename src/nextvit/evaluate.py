"""A task's metrics of anything that maps a batch to outputs, so a checkpoint and an exported file score alike."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nextvit import class_names
from nextvit.average_precision import AveragePrecision
from nextvit.data.images import ImageRejected
from nextvit.data.loader import Batch
from nextvit.data.masks import MaskSplit
from nextvit.data.objects import Objects, ObjectSplit
from nextvit.data.split import Split
from nextvit.errors import UserError
from nextvit.metadata import Metadata
from nextvit.metrics import PixelConfusion, TopK
from nextvit.processes import ALONE, Processes
from nextvit.progress import track
from nextvit.tasks.detect import detect
from nextvit.tasks.segment import ONCE, View, class_map

Run = Callable[[np.ndarray], Any]  # float32 (B, 3, H, W), normalised -> the outputs of the task
OFFICIAL_CROP = 0.875  # 256 to 224, 438 to 384: what the authors' figures were measured with
TIMM_CROPS = {384: 1.0}  # timm's own for the same weights; at other sizes TIMM_CROP
TIMM_CROP = 0.95


@dataclass(frozen=True)
class Evaluation:
    """Metrics over one split, and the images that could not be read: they are in no number."""

    split: Split
    metrics: TopK
    rejected: tuple[tuple[int, str], ...]  # index, why
    real: tuple[int, int] | None = None  # images right by ImageNet-ReaL's labels, of so many that have some

    @property
    def real_top1(self) -> float | None:
        """Percent (Beyer et al. 2020): the answer is one of the labels that people gave the image."""
        return None if self.real is None else 100.0 * self.real[0] / max(self.real[1], 1)

    @property
    def numbers(self) -> dict[str, float]:
        """What a run keeps of it."""
        return {"loss": self.metrics.loss, "top1": self.metrics.top1, "top5": self.metrics.top5}

    @property
    def told(self) -> str:
        """For a line of a run's log."""
        return f"loss {self.metrics.loss:.3f}, top-1 {self.metrics.top1:.1f} %"

    def to_dict(self) -> dict[str, object]:
        m = self.metrics
        return {
            "split": self.split.name,
            "top1": round(m.top1, 4),
            "top1_standard_error": round(m.standard_error, 4),
            "top5": round(m.top5, 4),
            "loss": round(m.loss, 6),
            "calibration_error": round(m.calibration_error, 4),
            **({} if self.real_top1 is None else {"real_top1": round(self.real_top1, 4)}),
            "images": m.images,
            "rejected": [why for _, why in self.rejected],
            "per_class": dict(zip(self.split.labels, m.recalls, strict=True)),
        }


def evaluate(
    run: Run,
    batches: Iterable[Batch],
    split: Split,
    *,
    total: int,
    label: str = "evaluate",
    real: Sequence[frozenset[int]] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Run all batches (`total` of them) and count, over all processes. UserError where no image could be read.

    real: of every image of the split the classes that count as right, as `real_labels` gives them.
    """
    metrics = TopK(len(split.labels))
    rejected: list[tuple[int, str]] = []
    right, judged = 0, 0
    for batch in track(batches, total=total, label=label):
        rejected += batch.rejected
        if len(batch.indices):
            logits = run(batch.images.numpy())
            metrics.update(logits, batch.targets.numpy())
            for index, answer in zip(batch.indices.tolist(), logits.argmax(1).tolist(), strict=True):
                accepted = real[index] if real is not None else frozenset()
                judged += bool(accepted)
                right += answer in accepted
    metrics.merge(processes.sum)
    rejected = [found for part in processes.gather(rejected) for found in part]
    if not metrics.images:
        raise UserError(f"none of the {len(split)} images of {split.name} can be read: {rejected[0][1]}")
    return Evaluation(split, metrics, tuple(rejected), None if real is None else (right, judged))


@dataclass(frozen=True)
class MaskEvaluation:
    """The same of segmentation."""

    split: MaskSplit
    metrics: PixelConfusion
    rejected: tuple[tuple[int, str], ...]

    @property
    def numbers(self) -> dict[str, float]:
        return {"miou": self.metrics.miou, "accuracy": self.metrics.accuracy}

    @property
    def told(self) -> str:
        return f"mIoU {self.metrics.miou:.1f} %, pixel accuracy {self.metrics.accuracy:.1f} %"

    def to_dict(self) -> dict[str, object]:
        m = self.metrics
        return {
            "split": self.split.name,
            "miou": round(m.miou, 4),
            "pixel_accuracy": round(m.accuracy, 4),
            **({"boundary_miou": round(m.boundary_miou, 4)} if m.boundary else {}),
            "images": len(self.split) - len(self.rejected),
            "pixels": m.pixels,
            "rejected": [why for _, why in self.rejected],
            "per_class": dict(zip(self.split.labels, m.ious, strict=True)),
        }


def evaluate_masks(
    run: Run,
    split: MaskSplit,
    m: Metadata,
    view: View = ONCE,
    *,
    boundary: bool = False,
    label: str = "evaluate",
    processes: Processes = ALONE,
) -> MaskEvaluation:
    """Count pixels over all images, each at its own size, over all processes. UserError where none could be read.

    run: takes images of any size. boundary: also of the boundaries, which takes longer.
    """
    metrics = PixelConfusion(len(split.labels), boundary=boundary)
    rejected: list[tuple[int, str]] = []
    mine = range(processes.rank, len(split), processes.count)
    for index in track(mine, total=len(mine), label=label, unit="images"):
        try:
            image, labels = split.labelled(index)
        except ImageRejected as error:
            rejected.append((index, str(error)))
            continue
        metrics.update(class_map(run, image, m, view), labels)
    metrics.merge(processes.sum)
    rejected = [found for part in processes.gather(rejected) for found in part]
    if len(rejected) == len(split):
        raise UserError(f"none of the {len(split)} images of {split.name} can be used: {rejected[0][1]}")
    return MaskEvaluation(split, metrics, tuple(rejected))


@dataclass(frozen=True)
class ObjectEvaluation:
    """The same of detection."""

    split: ObjectSplit
    metrics: AveragePrecision
    rejected: tuple[tuple[int, str], ...]

    @property
    def numbers(self) -> dict[str, float]:
        """In percent; 0 where no object counts."""
        told = ("ap", "ap50", "ap75")
        return {
            f"{kind}_{name}": getattr(scores, name) or 0.0
            for kind, scores in self.metrics.scores.items()
            for name in told
        }

    @property
    def told(self) -> str:
        parts = (f"{kind} AP {s.ap or 0:.1f}, AP50 {s.ap50 or 0:.1f}" for kind, s in self.metrics.scores.items())
        return "; ".join(parts)

    def to_dict(self) -> dict[str, object]:
        rounded: dict[str, object] = {}
        for kind, scores in self.metrics.scores.items():
            values = vars(scores) | {"per_class": dict(zip(self.split.labels, scores.per_class, strict=True))}
            values.pop("precision50")
            rounded[kind] = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        return {
            "split": self.split.name,
            **rounded,
            "images": len(self.split) - len(self.rejected),
            "objects": len(self.metrics.truth),
            "detections": len(self.metrics.found),
            "rejected": [why for _, why in self.rejected],
        }


AnyEvaluation = Evaluation | MaskEvaluation | ObjectEvaluation


def evaluate_objects(
    run: Run, split: ObjectSplit, m: Metadata, *, label: str = "evaluate", processes: Processes = ALONE
) -> ObjectEvaluation:
    """COCO's metrics over all images, over all processes. UserError where none could be read.

    run: takes images of any size, one at a time. Of the images themselves one is held at a time.
    """
    metrics = AveragePrecision(split.category_ids, masks=split.masked)
    rejected: list[tuple[int, str]] = []
    mine = range(processes.rank, len(split), processes.count)
    for index in track(mine, total=len(mine), label=label, unit="images"):
        try:
            image, objects = split.labelled(index)
        except ImageRejected as error:
            rejected.append((index, str(error)))
            continue
        found = detect(run, image, m, split.labels).as_coco(split.category_ids)
        metrics.update(split.image_ids[index], split.sizes[index], _as_coco(objects, split, index), found)
    metrics.merge(processes.gather)
    rejected = [found for part in processes.gather(rejected) for found in part]
    if len(rejected) == len(split):
        raise UserError(f"none of the {len(split)} images of {split.name} can be used: {rejected[0][1]}")
    return ObjectEvaluation(split, metrics, tuple(rejected))


def _as_coco(objects: Objects, split: ObjectSplit, index: int) -> list[dict[str, Any]]:
    """Entries of an image's objects, less the image."""
    a = split.annotations
    areas = a.areas[a.first[index] : a.first[index + 1]]
    rows = []
    for box, number, crowd, area, runs in zip(
        objects.boxes.astype(float), objects.labels, objects.crowd, areas, objects.runs, strict=True
    ):
        x1, y1, x2, y2 = box.tolist()
        place = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(area), "iscrowd": int(crowd)}
        rows.append({"category_id": split.category_ids[number], **place, "segmentation": runs})
    return rows


def prepared_for(metadata: Metadata, image_size: int | None, crop: str | None) -> Metadata:
    """The record of a file with another test size or crop.

    crop: "official", "timm", or size / short side after resizing as a number; None: the file's own. UserError for a
    file that prepares its images itself.
    """
    p = metadata.preprocess
    if metadata.takes_pixels and (image_size or crop):
        raise UserError("this file prepares images itself, at one size; leave out --image-size and --crop.")
    size = image_size or p.image_size
    if crop is None:
        share = p.crop
    elif crop == "official":
        share = OFFICIAL_CROP
    elif crop == "timm":
        share = TIMM_CROPS.get(size, TIMM_CROP)
    else:
        try:
            share = float(crop)
        except ValueError as error:
            raise UserError(f"--crop takes official, timm or a number up to 1, not {crop!r}.") from error
    return replace(metadata, preprocess=replace(p, image_size=size, crop=share))


def real_labels(path: Path, split: Split) -> list[frozenset[int]]:
    """The labels of ImageNet-ReaL: `real.json` has a list of classes for each image of the validation set, by number.

    Returns those of each image of the split, found by the number in its file name. Raises UserError where the file or
    the split is something else.
    """
    try:
        lists = [frozenset(map(int, labels)) for labels in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no real.json: a list of lists of class numbers.") from error
    if split.labels != class_names.imagenet():
        raise UserError("--real is about ImageNet's 1000 classes, and the model has others.")
    found = []
    for file in split.files:
        number = re.search(r"(\d{8})$", file.stem)
        if number is None or not 1 <= int(number[1]) <= len(lists):
            raise UserError(f"{file.name} has no number of ImageNet's validation set, so {path} says nothing about it.")
        found.append(lists[int(number[1]) - 1])
    return found
