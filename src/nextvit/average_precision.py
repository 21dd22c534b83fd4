"""COCO's metrics of boxes and masks: entries in, named numbers out. The counting is faster-coco-eval's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nextvit.extras import need

KINDS = {"box": "bbox", "mask": "segm"}
AREAS = ("", "_small", "_medium", "_large")  # below 32 x 32 pixels, to 96 x 96, above
MOST = (1, 10, 100)  # detections of an image


@dataclass(frozen=True)
class Scores:
    """Of boxes or of masks, in percent; None where no object counts."""

    ap: float | None  # over overlaps from 0.5 to 0.95, and so are those by size
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_class: tuple[float | None, ...]  # AP of each
    precision50: tuple[float, ...]  # at overlap 0.5: percent at 0, 1, ..., 100 % recall, the mean over the classes


@dataclass
class AveragePrecision:
    """COCO's average precision and recall of a growing number of images, of which only boxes and runs are held.

    masks: also of masks. Numbers of classes and images are those of the data set, so that `found` is COCO's results.
    """

    categories: Sequence[int]
    masks: bool = True
    images: list[dict[str, Any]] = field(default_factory=list)
    truth: list[dict[str, Any]] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)

    def update(
        self, image: int, size: tuple[int, int], truth: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
    ) -> None:
        """Of image number `image` of `size` = (H, W): objects and detections as COCO writes them, without image_id."""
        self.images.append({"id": image, "height": size[0], "width": size[1]})
        self.truth += [{"image_id": image, **entry} for entry in truth]
        self.found += [{"image_id": image, **entry} for entry in found]

    def merge(self, gather: Callable[[Any], list[Any]]) -> None:
        """Take those of several processes, by a function that gives everybody's value."""
        parts = gather((self.images, self.truth, self.found))
        columns = zip(*parts, strict=True)
        self.images, self.truth, self.found = ([row for part in column for row in part] for column in columns)

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Of "box", and of "mask" where masks are counted. Once all images are there."""
        return {name: self._scores(kind) for name, kind in KINDS.items() if name == "box" or self.masks}

    def _scores(self, kind: str) -> Scores:
        core = need("faster_coco_eval.core", extra="detect")
        evaluator = need("faster_coco_eval", extra="detect").COCOeval_faster
        categories = [{"id": number, "name": str(number)} for number in self.categories]
        rows = [{"id": number, **entry} for number, entry in enumerate(self.truth, 1)]
        truth = core.COCO({"images": self.images, "annotations": rows, "categories": categories})
        kept = "bbox" if kind == "bbox" else "segmentation"  # with both, the size of a mask would be its box's
        common = ("image_id", "category_id", "score", kept)
        found = truth.loadRes([{key: entry[key] for key in common} for entry in self.found])
        run = evaluator(truth, found, kind, print_function=_quiet)
        run.evaluate()
        run.accumulate()
        precision, recall = (np.asarray(run.eval[key]) for key in ("precision", "recall"))
        overlaps = np.asarray(run.params.iouThrs)

        def mean(values: np.ndarray) -> float | None:
            known = values[values > -1]
            return 100.0 * float(known.mean()) if known.size else None

        at = {name: int(np.argmin(abs(overlaps - overlap))) for name, overlap in (("50", 0.5), ("75", 0.75))}
        return Scores(
            ap=mean(precision[..., 0, -1]),
            **{f"ap{name}": mean(precision[index, ..., 0, -1]) for name, index in at.items()},
            **{f"ap{area}": mean(precision[..., index, -1]) for index, area in enumerate(AREAS) if area},
            **{f"ar{most}": mean(recall[..., 0, index]) for index, most in enumerate(MOST)},
            **{f"ar{area}": mean(recall[..., index, -1]) for index, area in enumerate(AREAS) if area},
            per_class=tuple(mean(precision[:, :, index, 0, -1]) for index in range(len(self.categories))),
            precision50=tuple(mean(values) or 0.0 for values in precision[at["50"], :, :, 0, -1]),
        )


def _quiet(*_: object) -> None:
    """Nothing of what the library tells on its way."""
