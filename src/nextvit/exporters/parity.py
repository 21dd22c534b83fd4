"""Parity: does the exported file answer as the model does, on real images?"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image

from nextvit.data.demo_images import garments
from nextvit.data.images import normalise, preprocess, read_image
from nextvit.errors import UserError
from nextvit.exporters.form import as_exported, stage_outputs
from nextvit.formats import Free
from nextvit.metadata import Metadata
from nextvit.networks import Network, as_arrays
from nextvit.progress import track
from nextvit.runtime.session import Session, Setup

LIVE = 1e-3  # outputs that vary less than this over the images, relative to their size, prove little
BATCHES = (1, 2, 5)
LEAST = 65  # pixels a side that every file with free ones takes
PHOTOGRAPHS = 10  # of `real_images`: where the garments end


@dataclass(frozen=True)
class Bound:
    """What a file may differ by, of the precision that it computes in. int8 is held to its accuracy instead."""

    relative: float  # largest difference / largest output
    to_spread: float  # largest difference / how much a live model's outputs vary over the images
    agreement: float  # percent of pixels of a live segmenter that have the same class


PIXELS = Bound(1e-3, 1e-2, 99.9)  # at least, of files that prepare images: some pixels are one level of 255 off
BOUNDS = {"fp32": Bound(1e-4, 1e-3, 99.9), "fp16": Bound(2e-2, 0.1, 99.0), "bf16": Bound(0.1, 1.0, 95.0)}


@dataclass(frozen=True)
class Comparison:
    """The file beside the model on batches of one shape."""

    batch: int
    height: int
    width: int
    images: int
    max_abs: float  # largest absolute difference of an output; of a file that gives classes 0: they have no size
    mean_abs: float
    cosine: float  # of centred outputs, the mean over all images taken away; the least of all images
    top1_agreement: float  # percent of images, or of pixels, with the same first label
    top5_agreement: float  # percent of images, or pixels, whose first label is among the file's first five


@dataclass(frozen=True)
class Parity:
    """How far the file's outputs are from the model's, over all images and sizes tried."""

    setup: Setup  # of the file: runtime, device, precision
    rows: tuple[Comparison, ...]  # a row a shape; the first are of the model's own size
    spread: float  # standard deviation of an output over the images at the model's own size, mean over all outputs
    size: float  # largest absolute output of the model
    bound: Bound | None  # None: held to its accuracy instead
    finite: bool  # all outputs of the file are numbers
    dense: bool = False  # an answer for each pixel
    maps: bool = False  # of a detector's backbone and pyramid, not classes

    @property
    def images(self) -> int:
        return sum(row.images for row in self.rows)

    @property
    def max_abs(self) -> float:
        return max(row.max_abs for row in self.rows)

    @property
    def mean_abs(self) -> float:
        return sum(row.mean_abs * row.images for row in self.rows) / self.images

    @property
    def relative(self) -> float:
        """max_abs / largest absolute output of the model."""
        return self.max_abs / max(self.size, 1e-30)

    @property
    def to_spread(self) -> float:
        """max_abs / how much the outputs vary over the images."""
        return self.max_abs / max(self.spread, 1e-30)

    @property
    def cosine(self) -> float:
        return min(row.cosine for row in self.rows)

    @property
    def top1_agreement(self) -> float:
        return sum(row.top1_agreement * row.images for row in self.rows) / self.images

    @property
    def live(self) -> bool:
        """False: the outputs hardly depend on the image (random weights), and agreement says little."""
        return self.spread > LIVE * self.size

    @property
    def ok(self) -> bool:
        if self.bound is None or not self.finite:
            return self.finite
        near = self.relative <= self.bound.relative
        if self.dense and self.top1_agreement < self.bound.agreement:
            return False
        return near and (not self.live or self.to_spread <= self.bound.to_spread)

    def to_dict(self) -> dict[str, object]:
        totals = ("images", "max_abs", "mean_abs", "relative", "to_spread", "cosine", "top1_agreement", "live", "ok")
        return {**asdict(self), **{name: getattr(self, name) for name in totals}}


def compare(model: Network, session: Session, *, free: Free, precision: str) -> Parity:
    """Run both on the photographs and garments that ship here; in several batches and at another size where `free`.

    precision: of the file; "int8" is given no bound on the differences.
    """
    shapes: dict[tuple[int, ...], tuple[list[np.ndarray], list[np.ndarray]]] = {}
    side, dense = session.metadata.preprocess.image_size, session.metadata.task == "segment"
    network = as_exported(model, session.metadata)
    dtype = np.float64 if session.metadata.task == "classify" else np.float32  # maps are large
    at_own_size = []
    inputs = list(_inputs(session.metadata, free))
    shown = track(inputs, total=len(inputs), label="compare") if dense else inputs
    for taken, prepared in shown:
        ours, theirs = shapes.setdefault((len(taken), *session.metadata.sides(taken.shape)), ([], []))
        with torch.inference_mode():
            ours.append(_one_array(as_arrays(network(torch.from_numpy(prepared))), dtype))
        theirs.append(_one_array(session(taken), dtype))
        if prepared.shape[2:] == (side, side):
            at_own_size.append(ours[-1])
    pairs = {shape: (np.concatenate(ours), np.concatenate(theirs)) for shape, (ours, theirs) in shapes.items()}
    if session.metadata.gives_classes:
        return _of_classes(session.setup, pairs, precision)
    classes = next(iter(pairs.values()))[0].shape[1]
    if classes != session.metadata.num_classes and not session.metadata.gives_maps:
        raise UserError(
            f"the model has {classes} outputs and its metadata {session.metadata.num_classes} classes; set "
            "model.metadata to what the model is."
        )
    own = np.concatenate(at_own_size)
    centre = own.mean(axis=0)
    return Parity(
        setup=session.setup,
        rows=tuple(_comparison(shape, ours, theirs, centre) for shape, (ours, theirs) in pairs.items()),
        spread=float(own.std(axis=0).mean()),
        size=max(float(np.abs(ours).max()) for ours, _ in pairs.values()),
        bound=_bound(precision, session.metadata),
        finite=all(bool(np.isfinite(theirs).all()) for _, theirs in pairs.values()),
        dense=dense,
        maps=session.metadata.gives_maps,
    )


def _one_array(outputs: Any, dtype: Any) -> np.ndarray:
    """What a session or a network gives; of several maps a row an image."""
    if isinstance(outputs, np.ndarray):
        return np.asarray(outputs, dtype)
    maps = [found for one in outputs for found in (one.values() if isinstance(one, dict) else [one])]
    return np.concatenate([found.reshape(len(found), -1).astype(dtype) for found in maps], axis=1)


def _of_classes(setup: Setup, pairs: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]], precision: str) -> Parity:
    """Of a file that gives a class for each pixel: there is nothing to compare but whether it is the same."""
    rows = []
    for (batch, height, width), (ours, theirs) in pairs.items():
        same = 100.0 * float((ours == theirs).mean())
        rows.append(Comparison(batch, height, width, len(ours), 0.0, 0.0, 1.0, same, same))
    spread = float(np.mean([ours.std() for ours, _ in pairs.values()]))
    size = max(float(ours.max()) for ours, _ in pairs.values())
    return Parity(setup, tuple(rows), spread, size, BOUNDS.get(precision), finite=True, dense=True)


def _bound(precision: str, m: Metadata) -> Bound | None:
    bound = BOUNDS.get(precision)
    if bound is not None and m.gives_maps:  # the largest of a hundred thousand differences lies further out
        return replace(bound, to_spread=10 * bound.to_spread)
    if bound is None or not m.takes_pixels:
        return bound
    return Bound(max(bound.relative, PIXELS.relative), max(bound.to_spread, PIXELS.to_spread), bound.agreement)


@dataclass(frozen=True)
class StageComparison:
    """What a stage of the file gives beside the model's, at the model's own size."""

    name: str
    max_abs: float
    relative: float  # max_abs / largest absolute output of the stage
    cosine: float  # the least of all images


def compare_stages(model: Network, session: Session) -> tuple[StageComparison, ...]:
    """Of a session whose output is that of `form.StageOutputs`."""
    batches = [taken for taken, _ in _inputs(session.metadata, Free(False, False))]
    with torch.inference_mode():
        ours = [[part.flatten(1) for part in stage_outputs(model, torch.from_numpy(batch))] for batch in batches]
    names = ("stem", *(f"stage {number}" for number in range(1, len(ours[0]) - 1)), "logits")
    ends = np.cumsum([part.shape[1] for part in ours[0]])[:-1]
    theirs = [np.split(np.asarray(session(batch), np.float64), ends, axis=1) for batch in batches]
    found = []
    for index, name in enumerate(names):
        a = np.concatenate([parts[index].numpy().astype(np.float64) for parts in ours])
        b = np.concatenate([parts[index] for parts in theirs])
        largest = float(np.abs(a - b).max())
        found.append(
            StageComparison(name, largest, largest / max(float(np.abs(a).max()), 1e-30), float(cosines(a, b).min()))
        )
    return tuple(found)


def _comparison(shape: tuple[int, ...], ours: np.ndarray, theirs: np.ndarray, centre: np.ndarray) -> Comparison:
    difference = np.abs(ours - theirs)
    best = ours.argmax(1)
    agreement = 100.0 * float((best == theirs.argmax(1)).mean())
    batch, height, width = shape
    rows = (len(ours), -1)
    return Comparison(
        batch=batch,
        height=height,
        width=width,
        images=len(ours),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=float(cosines(*((x - x.mean((0, 2, 3), keepdims=True)).reshape(rows) for x in (ours, theirs))).min())
        if ours.ndim > 2
        else float(cosines(ours - centre, theirs - centre).min()),
        top1_agreement=agreement,
        top5_agreement=100.0 * float((np.argsort(-theirs, axis=1)[:, :5] == best[:, None]).any(axis=1).mean()),
    )


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, C) and (N, C) -> (N,); 1 where both rows are zero."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(lengths > 0, (a * b).sum(axis=1) / np.maximum(lengths, 1e-30), 1.0)


def _inputs(metadata: Metadata, free: Free) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of real images, as the file takes them and as the network does.

    All at the model's own size; then, with free sides, some with unequal, odd ones. A file that prepares images itself
    is given all as they are, then some of one other size.
    """
    p, images = metadata.preprocess, real_images()
    if metadata.task != "classify":
        yield from _dense_inputs(metadata, free)
        return
    width, height = p.image_size + 27, p.image_size + 1
    some = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images[-sum(BATCHES) :]]
    if metadata.takes_pixels:
        for batch in (*([image] for image in images), *_in_batches(some, BATCHES if free.batch else [1] * len(some))):
            yield np.stack([np.asarray(image) for image in batch]), np.stack([preprocess(image, p) for image in batch])
        return
    full = with_channels(np.stack([preprocess(image, p) for image in images]), metadata.in_channels)
    for array in _in_batches(full, (*BATCHES, len(full) - sum(BATCHES)) if free.batch else [1] * len(full)):
        yield array, array
    if free.sides:
        other = with_channels(np.stack([normalise(np.asarray(image), p) for image in some]), metadata.in_channels)
        for array in _in_batches(other, BATCHES if free.batch else [1] * len(other)):
            yield array, array


def _dense_inputs(metadata: Metadata, free: Free) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Photographs alone, at the model's own size and at another one: each has thousands of answers."""
    side = metadata.preprocess.image_size
    photographs = real_images()[PHOTOGRAPHS :: 1 if metadata.task == "segment" else 3]  # five maps have many values
    sizes = [(side, side), *([(side + 27, side + 1), (max(side // 2 + 9, LEAST), side)] if free.sides else [])]
    for number, size in enumerate(sizes):
        chosen = photographs[number :: len(sizes)]
        resized = [image.resize(size, Image.Resampling.BICUBIC) for image in chosen]
        full = np.stack([normalise(np.asarray(image), metadata.preprocess) for image in resized])
        full = with_channels(full, metadata.in_channels)
        for array in _in_batches(full, (1, len(full) - 1) if free.batch else [1] * len(full)):
            yield array, array


def _in_batches(images: Any, sizes: Sequence[int]) -> Iterator[Any]:
    start = 0
    for size in sizes:
        yield images[start : start + size]
        start += size


def with_channels(batch: np.ndarray, channels: int) -> np.ndarray:
    """Repeat the colours for a model of other input channels."""
    return np.ascontiguousarray(np.tile(batch, (1, -(-channels // 3), 1, 1))[:, :channels])


def real_images() -> list[Image.Image]:
    """RGB images that ship with the package: ten garments, one a class, and nine photographs."""
    tiles = [read_image(images[0]) for images in garments("val").values()]
    folder = resources.files("nextvit.data") / "demo" / "backgrounds"
    photographs = []
    for split in ("train", "val"):
        for file in sorted((folder / split).iterdir(), key=lambda f: f.name):
            with file.open("rb") as handle, Image.open(handle) as image:
                photographs.append(read_image(image))
    return tiles + photographs
