"""Where the time of an image goes: decoding, preprocessing, the network, and what makes an answer of its outputs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextvit.data.images import ImageRejected, as_taken, read_image
from nextvit.errors import UserError
from nextvit.progress import track
from nextvit.runtime.predictor import Predictor
from nextvit.runtime.session import Session

MOST = 200  # images
PARTS = ("decode", "preprocess", "forward", "post")


@dataclass(frozen=True)
class Pipeline:
    """Milliseconds an image, the median over the images, of one image at a time."""

    images: int
    decode_ms: float
    preprocess_ms: float
    forward_ms: float
    post_ms: float


def measure_pipelines(
    sessions: Sequence[Session], files: Sequence[Path], image_size: int | None = None, *, seed: int = 0
) -> list[Pipeline]:
    """A record a session; image by image, all sessions in an order drawn anew. What is no image is left out."""
    predictors = [Predictor(session) for session in sessions]
    if any(predictor.metadata.in_channels != 3 for predictor in predictors):
        raise UserError("a model of other than three channels takes no images; leave --images out.")
    rng = np.random.default_rng(seed)
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(len(files), MOST)).astype(int)]
    times: list[np.ndarray] = []
    for file in track(chosen, total=len(chosen), label="decode to answer"):
        found = np.zeros((len(predictors), len(PARTS)))
        try:
            for _ in range(1 if times else 2):  # the first image warms up
                for index in rng.permutation(len(predictors)):
                    found[index] = _times(predictors[index], file, image_size)
            times.append(found)
        except ImageRejected:
            continue
    if not times:
        raise UserError(f"none of the {len(files)} files of --images can be read.")
    medians = 1e3 * np.median(times, axis=0)
    return [Pipeline(len(times), *map(float, row)) for row in medians]


def _times(predictor: Predictor, file: Path, image_size: int | None) -> np.ndarray:
    """Seconds of each of PARTS."""
    marks = [time.perf_counter()]
    image = read_image(file)
    marks.append(time.perf_counter())
    taken = as_taken(image, predictor.metadata.with_image_size(image_size))
    marks.append(time.perf_counter())
    found = predictor.run(taken[None])
    marks.append(time.perf_counter())
    predictor.decoded(found, predictor.metadata.sides(taken[None].shape), (image.height, image.width))
    marks.append(time.perf_counter())
    return np.diff(marks)
