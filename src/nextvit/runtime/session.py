"""A session: an open model on one runtime, with what it was really opened with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from PIL import Image

from nextvit.data.images import normalise
from nextvit.data.scenes import compose
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
    """Noise of the kind and shape that a file takes; for a detector, whose time is that of what it finds, a scene."""
    shape = metadata.input_shape(batch, image_size, image_size)
    if metadata.task == "detect":
        image = np.asarray(Image.fromarray(compose("val", 0).image).resize(shape[:1:-1], Image.Resampling.BILINEAR))
        channels = normalise(image, metadata.preprocess)[np.arange(metadata.in_channels) % 3]
        return np.ascontiguousarray(np.tile(channels, (batch, 1, 1, 1)))
    if metadata.takes_pixels:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


def as_named(arrays: Sequence[np.ndarray], metadata: Metadata) -> Any:
    """What a session gives, of all that a file gave: one array, or of a detector a list of one dict by name."""
    if len(metadata.outputs) == 1:
        return arrays[0]
    return [dict(zip(metadata.outputs, arrays, strict=True))]


def joined(outputs: Sequence[Any]) -> Any:
    """What a session gives for parts of a batch, as for the whole."""
    if isinstance(outputs[0], np.ndarray):
        return np.concatenate(outputs)
    return [one for part in outputs for one in part]


class Session(Protocol):
    """float32 (B, C, H, W), normalised, or what else its metadata says -> the raw outputs; of a detector a dict an
    image, with boxes, labels, scores and masks.
    """

    metadata: Metadata
    setup: Setup
    fixed_batch: int | None  # the only batch that a file of fixed size takes; None: any

    def __call__(self, batch: np.ndarray) -> Any: ...


@runtime_checkable
class OnDevice(Protocol):
    """A session that can leave images and answers in the memory of its device."""

    def resident(self, batch: np.ndarray) -> Callable[[], Any]:
        """A call whose input is in the device's memory before, and whose output stays there; it returns when that is
        done. By the clock of the host it is what TensorRT's trtexec measures with --noDataTransfers.
        """
        ...


def has_memory(session: Session) -> TypeGuard[OnDevice]:
    """Whether images and answers are copied to and from a memory of its own."""
    return isinstance(session, OnDevice) and session.setup.device != "cpu"
