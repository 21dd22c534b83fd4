"""Parity of a detector: does the exported file find what the model finds, on real images?"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

from nextvit.data.scenes import compose
from nextvit.exporters.parity import PHOTOGRAPHS, real_images, with_channels
from nextvit.heads.boxes import overlaps
from nextvit.metadata import Metadata
from nextvit.networks import Network, as_arrays, as_asked
from nextvit.progress import track
from nextvit.runtime.session import Session, Setup
from nextvit.tasks.detect import prepared

SCENES = 7  # of those that ship here, beside the photographs
FEWEST = 10  # detections from which on agreement says something,
LIVE = 1e-3  # and so much their scores must differ


@dataclass(frozen=True)
class ObjectBound:
    """What detections of a file may differ by, of the precision that it computes in; int8 is held to its accuracy."""

    overlap: float  # of two boxes of one class that are the same, at least
    score: float  # difference of their scores, at most
    agreement: float  # percent of the detections that the other side has, too


BOUNDS = {
    "fp32": ObjectBound(0.99, 1e-3, 99.5),
    "fp16": ObjectBound(0.9, 0.02, 95.0),
    "bf16": ObjectBound(0.75, 0.1, 80.0),
}
LOOSEST = ObjectBound(0.5, 1.0, 0.0)  # by which int8 is told


@dataclass(frozen=True)
class ObjectComparison:
    """The file beside the model on images of one size."""

    height: int
    width: int
    images: int
    detections: int  # of the model
    found: int  # of the file
    matched: int  # that both have
    max_box: float  # largest difference of a corner of those, pixels
    max_score: float
    max_mask: float  # of a probability


@dataclass(frozen=True)
class ObjectParity:
    """How far the file's detections are from the model's, over all images and sizes tried."""

    setup: Setup  # of the file: runtime, device, precision
    rows: tuple[ObjectComparison, ...]
    bound: ObjectBound | None  # None: held to its accuracy instead
    spread: float  # standard deviation of the model's scores
    finite: bool  # all outputs of the file are numbers

    @property
    def images(self) -> int:
        return sum(row.images for row in self.rows)

    @property
    def detections(self) -> int:
        return sum(row.detections for row in self.rows)

    @property
    def agreement(self) -> float:
        """Percent of the detections, of the side that has more of them, that both have."""
        most = sum(max(row.detections, row.found) for row in self.rows)
        return 100.0 * sum(row.matched for row in self.rows) / most if most else 100.0

    @property
    def live(self) -> bool:
        """False: there are hardly any detections, or all have one score (random weights), and agreement says little."""
        return self.detections >= FEWEST and self.spread > LIVE

    @property
    def ok(self) -> bool:
        if self.bound is None or not self.finite or not self.live:
            return self.finite
        return self.agreement >= self.bound.agreement

    @property
    def told(self) -> str:
        """What is wrong, where something is."""
        b = self.bound or LOOSEST
        return (
            f"it finds {sum(row.found for row in self.rows)} objects on {self.images} images where the model finds "
            f"{self.detections}, and {self.agreement:.1f} % are the same (overlap {b.overlap:g}, scores {b.score:g} "
            f"apart at most; {b.agreement:g} % are needed); a network that is hardly trained gives scores so close "
            "together that they change places: train it further, or look at the figures of `nextvit eval` on both"
        )

    def to_dict(self) -> dict[str, object]:
        totals = ("images", "detections", "agreement", "live", "ok")
        return {**asdict(self), **{name: getattr(self, name) for name in totals}}


def compare_objects(model: Network, session: Session, *, sides: bool, precision: str) -> ObjectParity:
    """Run both on photographs and scenes that ship here, prepared as predict does; sides: at another size, too."""
    bound = BOUNDS.get(precision)
    network = as_asked(model)
    rows: dict[tuple[int, ...], list[ObjectComparison]] = {}
    scores: list[np.ndarray] = []
    finite = True
    inputs = _inputs(session.metadata, sides)
    for image in track(inputs, total=len(inputs), label="compare"):
        with torch.inference_mode():
            (ours,) = as_arrays(network(torch.from_numpy(image)))
        (theirs,) = session(image)
        finite &= all(bool(np.isfinite(values).all()) for values in theirs.values())
        scores.append(ours["scores"])
        row = compared(ours, theirs, bound or LOOSEST, image.shape[2:])
        rows.setdefault(image.shape[2:], []).append(row)
    spread = float(np.concatenate(scores).std()) if sum(map(len, scores)) else 0.0
    return ObjectParity(session.setup, tuple(map(_sum, rows.values())), bound, spread, finite)


def compared(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], bound: ObjectBound, size: tuple[int, ...]
) -> ObjectComparison:
    """Detections of one image by both; each of one side is matched with one of the other at most, the surest first."""
    shared = overlaps(torch.from_numpy(ours["boxes"]), torch.from_numpy(theirs["boxes"])).numpy().copy()
    apart = np.abs(ours["scores"][:, None] - theirs["scores"][None])
    shared[(ours["labels"][:, None] != theirs["labels"][None]) | (apart > bound.score)] = -1
    pairs = []
    for index in range(len(shared)):
        if shared.shape[1] and shared[index].max() >= bound.overlap:
            other = int(shared[index].argmax())
            pairs.append((index, other))
            shared[:, other] = -1
    a, b = (np.array(column, int) for column in (zip(*pairs, strict=True) if pairs else ((), ())))
    largest = {
        name: float(np.abs(ours[name][a] - theirs[name][b]).max(initial=0.0)) for name in ("boxes", "scores", "masks")
    }
    return ObjectComparison(
        height=size[0],
        width=size[1],
        images=1,
        detections=len(ours["labels"]),
        found=len(theirs["labels"]),
        matched=len(pairs),
        max_box=largest["boxes"],
        max_score=largest["scores"],
        max_mask=largest["masks"],
    )


def _sum(rows: list[ObjectComparison]) -> ObjectComparison:
    def most(name: str) -> float:
        return max(getattr(row, name) for row in rows)

    return ObjectComparison(
        height=rows[0].height,
        width=rows[0].width,
        images=len(rows),
        detections=sum(row.detections for row in rows),
        found=sum(row.found for row in rows),
        matched=sum(row.matched for row in rows),
        max_box=most("max_box"),
        max_score=most("max_score"),
        max_mask=most("max_mask"),
    )


def _inputs(metadata: Metadata, sides: bool) -> list[np.ndarray]:
    """Images (1, C, h, w) as a detector is given them: fitted, and padded to its size where it has one alone."""
    scenes = [Image.fromarray(compose("val", index).image) for index in range(SCENES)]
    found = []
    for number, image in enumerate([*real_images()[PHOTOGRAPHS:], *scenes]):
        if sides and number % 3 == 2:  # cut to another shape
            image = image.crop((0, 0, image.width, max(1, image.height * 2 // 3)))
        found.append(with_channels(prepared(image, metadata)[0], metadata.in_channels))
    return found
