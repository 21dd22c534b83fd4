"""A session: an open model on one runtime, with what it was really opened with."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nextvit.metadata import Metadata


@dataclass(frozen=True)
class Setup:
    """How a session computes; every figure that is measured with it is shown beside this."""

    runtime: str  # e.g. "onnxruntime 1.32.0"
    device: str
    precision: str  # of the arithmetic
    threads: int


class Session(Protocol):
    """float32 (B, C, H, W), normalised -> the raw outputs."""

    metadata: Metadata
    setup: Setup
    fixed_batch: int | None  # the only batch that a file of fixed size takes; None: any

    def __call__(self, batch: np.ndarray) -> np.ndarray: ...
