"""Classification: one label for an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nextvit.metrics import softmax

TOP = 5


@dataclass(frozen=True)
class Classification:
    """The most probable labels of one image, the best first, and their probabilities."""

    labels: tuple[str, ...]
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As `nextvit predict` writes it."""
        return {"labels": list(self.labels), "scores": [round(score, 6) for score in self.scores]}


def decode(logits: np.ndarray, labels: Sequence[str], top: int = TOP) -> list[Classification]:
    """(B, classes) logits -> one result an image, with its `top` best labels."""
    results = []
    for row in softmax(logits.astype(np.float64)):
        best = np.argsort(-row, kind="stable")[:top]
        results.append(Classification(tuple(labels[i] for i in best), tuple(float(row[i]) for i in best)))
    return results
