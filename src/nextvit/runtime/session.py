"""A session: an open model on one runtime, with what it was really opened with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nextvit.errors import NotHere, UserError
from nextvit.files import check_seal
from nextvit.metadata import Metadata


@dataclass(frozen=True)
class Setup:
    """How a session computes; every figure that is measured with it is shown beside this."""

    runtime: str  # e.g. "onnxruntime 1.32.0"
    device: str
    precision: str  # of the arithmetic
    threads: int


def insist_on_seal(path: Path) -> None:
    """Raise UserError for a file that is damaged, or that nextvit did not write."""
    if not check_seal(path):
        raise no_metadata(path)


def no_metadata(path: Path) -> UserError:
    return UserError(f"{path} has no nextvit metadata, so its preprocessing is unknown; make it with `nextvit export`.")


def insist_on_cpu(device: str, files: str) -> None:
    """Raise UserError for another device. files: such as "OpenVINO files"."""
    if device not in ("auto", "cpu"):
        raise UserError(f"{files} run on the CPU here, not on {device!r}; leave --device out.")


def own_precision(metadata: Metadata, asked: str | None, runtime: str) -> str:
    """The precision of a file that is computed in the one that it was made in."""
    if asked not in (None, metadata.precision):
        raise NotHere(f"{runtime} computes this file in {metadata.precision}, not in {asked}; leave --precision out.")
    return metadata.precision


def insist_on_latency(hint: str, runtime: str) -> None:
    """Raise NotHere for the throughput hint, which only OpenVINO has."""
    if hint != "latency":
        raise NotHere(f"{runtime} has no {hint} hint; OpenVINO files have, for others take larger batches.")


def random_input(metadata: Metadata, batch: int, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of the kind and shape that a file takes."""
    shape = metadata.input_shape(batch, image_size, image_size)
    if metadata.takes_pixels:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


class Session(Protocol):
    """float32 (B, C, H, W), normalised, or what else its metadata says -> the raw outputs."""

    metadata: Metadata
    setup: Setup
    fixed_batch: int | None  # the only batch that a file of fixed size takes; None: any

    def __call__(self, batch: np.ndarray) -> np.ndarray: ...
