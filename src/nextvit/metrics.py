"""Numbers from outputs and truth: arrays in, named numbers out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

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


@dataclass
class PixelConfusion:
    """Running mean intersection over union; its size does not grow with the number of images.

    ignored: the label of pixels that count for nothing. boundary: also the intersection over union of the classes'
    boundaries (Cheng et al. 2021), pixels within 2 % of the diagonal from a class's edge or the image's.
    """

    classes: int
    ignored: int = 255
    boundary: bool = False
    confusion: np.ndarray = field(init=False)  # int64 (classes, classes): rows are the truth, columns the answers
    edges: np.ndarray = field(init=False)  # int64 (2, classes): pixels in both boundaries of a class, and in either

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.classes, self.classes), np.int64)
        self.edges = np.zeros((2, self.classes), np.int64)

    def update(self, answers: np.ndarray, labels: np.ndarray) -> None:
        """Of one image: integers (H, W), both."""
        counts = labels != self.ignored
        pairs = labels[counts].astype(np.int64) * self.classes + answers[counts]
        self.confusion += np.bincount(pairs, minlength=self.classes**2).reshape(self.confusion.shape)
        if not self.boundary:
            return
        width = max(1, round(0.02 * float(np.hypot(*labels.shape))))
        for number in np.union1d(labels[counts], answers[counts]):
            truth, answer = (_edge((values == number) & counts, width) for values in (labels, answers))
            self.edges[:, number] += (truth & answer).sum(), (truth | answer).sum()

    def merge(self, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take the sums over several processes, by a function that adds an array up over all of them."""
        self.confusion, self.edges = total(self.confusion), total(self.edges)

    @property
    def pixels(self) -> int:
        """That counted."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Percent of pixels that are right."""
        return 100.0 * float(np.trace(self.confusion)) / max(self.pixels, 1)

    @property
    def ious(self) -> list[float | None]:
        """Percent of each class; None where neither truth nor answers have it."""
        both = np.diag(self.confusion)
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        return _shares(both, either)

    @property
    def miou(self) -> float:
        """Percent: the mean over the classes that truth or answers have."""
        return _mean(self.ious)

    @property
    def boundary_miou(self) -> float:
        """The same of the boundaries."""
        return _mean(_shares(*self.edges))


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """bool (H, W): what of a mask lies within `width` pixels, by rows and columns, of what is outside it."""
    outside = F.pad(torch.from_numpy(~mask).float()[None], (width,) * 4, value=1.0)
    for kernel in ((2 * width + 1, 1), (1, 2 * width + 1)):  # a square's maximum is that of its rows' maxima
        outside = F.max_pool2d(outside, kernel, stride=1)
    near: np.ndarray = outside[0].numpy() > 0
    return mask & near


def _shares(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [100.0 * int(p) / int(w) if w else None for p, w in zip(part, whole, strict=True)]


def _mean(shares: list[float | None]) -> float:
    known = [share for share in shares if share is not None]
    return sum(known) / max(len(known), 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (B, classes) of logits (B, classes)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kept_epoch(scores: Sequence[float], images: int) -> int:
    """Index of the epoch whose weights are kept: the last one within a standard error of the highest score (percent).

    images: how many `val` has. Of few images the highest score is luck, mostly, and then that of an early epoch, at a
    high rate; the rule is that of Breiman et al., Classification and Regression Trees (1984). The error is that of a
    share of images that are right; that of a mean of shares of pixels is less.
    """
    highest = max(scores)
    error = math.sqrt(highest * (100 - highest) / images)
    return max(index for index, score in enumerate(scores) if score >= highest - error)
