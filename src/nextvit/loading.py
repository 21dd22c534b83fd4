"""How fast training gets its images: the loader alone, with no network behind it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nextvit.benchmark import CONFIDENCE, fewest_rounds, median_interval
from nextvit.data.images import ImageRejected
from nextvit.data.loader import AHEAD, Transform, batches
from nextvit.data.seeds import seeded
from nextvit.data.split import Split
from nextvit.errors import UserError
from nextvit.learning import LEARNING
from nextvit.metadata import Preprocess
from nextvit.progress import track
from nextvit.recipe import Recipe

BATCH = 32  # images
TIMED = 12  # batches a round, after those that are there before anybody asks
LOOKED_AT = 200  # images whose parts are timed


@dataclass(frozen=True)
class Loading:
    """So many loading processes; 0: the process that trains loads the images itself."""

    workers: int
    images_per_s: float  # the median over the rounds
    p25: float
    p75: float
    ratio: float  # median over the rounds of this row's rate / the first row's in the same round
    ratio_low: float
    ratio_high: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "confidence": CONFIDENCE}


@dataclass(frozen=True)
class ImageParts:
    """Milliseconds an image in one process, the median over the images: reading and decoding, and all that follows."""

    images: int
    read_ms: float
    augment_ms: float


def measure_loading(split: Split, recipe: Recipe, *, workers: Sequence[int], rounds: int) -> list[Loading]:
    """Training batches as the recipe has them, from files to what is sent to the device; a row a number of processes.

    In every round each row loads TIMED batches, in an order drawn anew, so that what disturbs the machine disturbs all.
    """
    if rounds < fewest_rounds():
        raise UserError(f"a {CONFIDENCE:.0%} interval needs {fewest_rounds()} rounds or more, not {rounds}.")
    rng, rates = np.random.default_rng(recipe.seed), np.zeros((rounds, len(workers)))
    for number in track(range(rounds), total=rounds, label="measure"):
        for column in rng.permutation(len(workers)):
            rates[number, column] = _rate(split, recipe, workers[column], number)
    rows = []
    for column, count in enumerate(workers):
        p25, median, p75 = np.percentile(rates[:, column], (25, 50, 75))
        low, ratio, high = median_interval(rates[:, column] / rates[:, 0])
        rows.append(Loading(count, float(median), float(p25), float(p75), ratio, low, high))
    return rows


def _rate(split: Split, recipe: Recipe, workers: int, epoch: int) -> float:
    """Images a second, once every process has what it may prepare ahead."""
    transform, ahead = _transform(recipe), AHEAD * workers + 1
    wanted = np.resize(split.order(recipe.seed, epoch), (ahead + TIMED, BATCH))
    loaded, begun = 0, 0.0
    source = batches(split, transform, order=list(wanted), seed=(0, epoch), workers=workers)
    for number, batch in enumerate(source, 1):
        if number > ahead:
            loaded += len(batch.indices)
        elif number == ahead:
            begun = time.perf_counter()
    if not loaded:
        raise UserError(f"none of the images of {split.folder} can be read; `nextvit data check` says why.")
    return loaded / (time.perf_counter() - begun)


def _transform(recipe: Recipe) -> Transform:
    learning = LEARNING[recipe.task]
    return learning.transform(recipe, learning.prepared(recipe, Preprocess()))


def measure_parts(split: Split, recipe: Recipe) -> ImageParts:
    """Where the time of an image goes, in this process."""
    transform, times = _transform(recipe), []
    chosen = np.linspace(0, len(split) - 1, min(len(split), LOOKED_AT)).astype(int).tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a loading process has it
    try:
        for index in [chosen[0], *chosen]:  # the first one warms up
            marks: list[float] = []
            try:
                with seeded(recipe.seed, index):
                    begun = time.perf_counter()
                    transform(partial(_timed, split.sample(index), marks))
                    times.append((marks[0] - begun, time.perf_counter() - marks[0]))
            except ImageRejected:
                continue
    finally:
        torch.set_num_threads(threads)
    if not times:
        raise UserError(f"none of the images of {split.folder} can be read; `nextvit data check` says why.")
    read, augment = 1e3 * np.median(times[1:] or times, axis=0)
    return ImageParts(max(1, len(times) - 1), float(read), float(augment))


def _timed(read: Callable[..., Any], marks: list[float], *how: Any) -> Any:
    found = read(*how)
    marks.append(time.perf_counter())
    return found
