"""A task's metrics of anything that maps a batch to outputs, so a checkpoint and an exported file score alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nextvit.data.folders import Split
from nextvit.data.loader import Batch
from nextvit.errors import UserError
from nextvit.metrics import TopK
from nextvit.processes import ALONE, Processes
from nextvit.progress import track

Run = Callable[[np.ndarray], np.ndarray]  # float32 (B, 3, H, W), normalised -> (B, classes)


@dataclass(frozen=True)
class Evaluation:
    """Metrics over one split, and the images that could not be read: they are in no number."""

    split: Split
    metrics: TopK
    rejected: tuple[tuple[int, str], ...]  # index, why

    def to_dict(self) -> dict[str, object]:
        m = self.metrics
        return {
            "split": self.split.name,
            "top1": round(m.top1, 4),
            "top1_standard_error": round(m.standard_error, 4),
            "top5": round(m.top5, 4),
            "loss": round(m.loss, 6),
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
    processes: Processes = ALONE,
) -> Evaluation:
    """Run all batches (`total` of them) and count, over all processes. UserError where no image could be read."""
    metrics = TopK(len(split.labels))
    rejected: list[tuple[int, str]] = []
    for batch in track(batches, total=total, label=label):
        rejected += batch.rejected
        if len(batch.indices):
            metrics.update(run(batch.images.numpy()), batch.targets.numpy())
    metrics.confusion = processes.sum(metrics.confusion)
    metrics.top5_hits = int(processes.sum(np.array(metrics.top5_hits)))
    metrics.loss_sum = float(processes.sum(np.array(metrics.loss_sum)))
    rejected = [found for part in processes.gather(rejected) for found in part]
    if not metrics.images:
        raise UserError(f"none of the {len(split)} images of {split.name} can be read: {rejected[0][1]}")
    return Evaluation(split, metrics, tuple(rejected))
