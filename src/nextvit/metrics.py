"""Numbers from outputs and truth: arrays in, named numbers out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

BINS = 15


@dataclass
class TopK:
    """Running top-1 and top-5 accuracy with the confusion matrix; its size does not grow with the number of images."""

    classes: int
    confusion: np.ndarray = field(init=False)  # int64 (classes, classes): rows are the truth, columns the answers
    top5_hits: int = 0
    loss_sum: float = 0.0  # cross entropy, natural logarithm
    reliability: np.ndarray = field(
        init=False
    )  # float64 (BINS, 3): of answers by their probability: how many, sum, right

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.classes, self.classes), np.int64)
        self.reliability = np.zeros((BINS, 3))

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """logits: float (B, classes); targets: int (B,). Of equal logits the first counts as the greater."""
        logits = logits.astype(np.float64)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        np.add.at(self.confusion, (targets, order[:, 0]), 1)
        self.top5_hits += int((order == targets[:, None]).any(1).sum())
        shifted = logits - logits.max(1, keepdims=True)
        total = np.exp(shifted).sum(1)
        self.loss_sum += float((np.log(total) - shifted[np.arange(len(targets)), targets]).sum())
        confidence = 1 / total  # the first answer's probability
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        values = np.stack([np.ones(len(targets)), confidence, order[:, 0] == targets], axis=1)
        np.add.at(self.reliability, bins, values)

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent."""
        return 100.0 * float(np.trace(self.confusion)) / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Percent."""
        return 100.0 * self.top5_hits / max(self.images, 1)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.images, 1)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percentage points (Guo et al. 2017), over 15 bins of equal width.

        How far the probability of the first answer is from the share of such answers that are right.
        """
        count, confidence, right = self.reliability.T
        return 100.0 * float(np.abs(confidence - right).sum() / max(count.sum(), 1))

    def merge(self, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take the sums over several processes, by a function that adds an array up over all of them."""
        self.confusion, self.reliability = total(self.confusion), total(self.reliability)
        self.top5_hits, self.loss_sum = int(total(np.array(self.top5_hits))), float(total(np.array(self.loss_sum)))

    @property
    def standard_error(self) -> float:
        """One standard error of top-1, in percentage points (binomial)."""
        share = self.top1 / 100
        return 100.0 * float(np.sqrt(share * (1 - share) / max(self.images, 1)))

    @property
    def recalls(self) -> list[float | None]:
        """Percent right of each class; None where it has no images."""
        totals = self.confusion.sum(1)
        return [100.0 * float(c) / int(n) if n else None for c, n in zip(np.diag(self.confusion), totals, strict=True)]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (B, classes) of logits (B, classes)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
