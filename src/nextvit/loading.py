"""How fast training gets its images: the loader alone, with no network behind it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from nextvit.augmentation import Normalise, sample_transform
from nextvit.benchmark import CONFIDENCE, fewest_rounds, median_interval
from nextvit.data.images import Draft, ImageRejected
from nextvit.data.loader import AHEAD, batches
from nextvit.data.seeds import seeded
from nextvit.data.split import Split
from nextvit.errors import UserError
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
    """Training batches as the recipe has them, from files to normalised input; a row for each number of processes.

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
    p = Preprocess(image_size=recipe.images.size, interpolation=recipe.images.interpolation)
    normalise, ahead = Normalise(p, torch.device("cpu")), AHEAD * workers + 1
    wanted = np.resize(split.order(recipe.seed, epoch), (ahead + TIMED, BATCH))
    loaded, begun = 0, 0.0
    source = batches(split, sample_transform(recipe.images, p), order=list(wanted), seed=(0, epoch), workers=workers)
    for number, batch in enumerate(source, 1):
        normalise(batch.images)
        if number > ahead:
            loaded += len(batch.indices)
        elif number == ahead:
            begun = time.perf_counter()
    if not loaded:
        raise UserError(f"none of the images of {split.folder} can be read; `nextvit data check` says why.")
    return loaded / (time.perf_counter() - begun)


def measure_parts(split: Split, recipe: Recipe) -> ImageParts:
    """Where the time of an image goes, in this process."""
    p = Preprocess(image_size=recipe.images.size, interpolation=recipe.images.interpolation)
    transform, times = sample_transform(recipe.images, p), []
    chosen = np.linspace(0, len(split) - 1, min(len(split), LOOKED_AT)).astype(int).tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a loading process has it
    try:
        for index in [chosen[0], *chosen]:  # the first one warms up
            marks: list[float] = []
            try:
                with seeded(recipe.seed, index):
                    begun = time.perf_counter()
                    transform(partial(_read, split, index, marks))
                    times.append((marks[0] - begun, time.perf_counter() - marks[0]))
            except ImageRejected:
                continue
    finally:
        torch.set_num_threads(threads)
    if not times:
        raise UserError(f"none of the images of {split.folder} can be read; `nextvit data check` says why.")
    read, augment = 1e3 * np.median(times[1:] or times, axis=0)
    return ImageParts(max(1, len(times) - 1), float(read), float(augment))


def _read(split: Split, index: int, marks: list[float], draft: Draft | None) -> Image.Image:
    image = split.read(index, draft)
    marks.append(time.perf_counter())
    return image
