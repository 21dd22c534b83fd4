"""Latency, measured so that two rows can be compared: warmed up, interleaved, with the spread and the error stated."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from nextvit.errors import UserError
from nextvit.footprint import Footprint
from nextvit.pipeline import Pipeline
from nextvit.progress import track
from nextvit.runtime.session import Session, Setup, has_memory, random_input

CONFIDENCE = 0.99  # of every interval that is reported
WARM_UP = 1.0  # seconds for each row, three calls at least
SLICE = 0.1  # seconds that one row is measured for in one round, one call at least


@dataclass(frozen=True)
class Row:
    """One (model, runtime, precision): milliseconds for a batch, and its ratio to the first row."""

    model: str
    setup: Setup
    batch: int
    image_size: int
    rounds: int
    calls: int  # in all rounds
    median_ms: float  # over the rounds; a round's value is the mean of its calls
    p25_ms: float
    p75_ms: float
    images_per_s: float  # at the median
    ratio: float  # median over the rounds of this row's time for an image / the first row's in the same round
    ratio_low: float  # CONFIDENCE interval of that median
    ratio_high: float
    footprint: Footprint | None = None  # where asked for
    pipeline: Pipeline | None = None  # of images from files, where asked for

    @property
    def differs(self) -> bool:
        """Whether the difference from the first row is beyond the stated error."""
        return not self.ratio_low <= 1.0 <= self.ratio_high

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "confidence": CONFIDENCE, "differs": self.differs}


def benchmark(
    sessions: Sequence[tuple[str, Session]],
    *,
    batches: Sequence[int] = (1,),
    image_size: int | None = None,
    rounds: int = 20,
    seed: int = 0,
    resident: bool = False,
) -> list[Row]:
    """Measure open sessions side by side in one run: a row for each session and batch size.

    sessions: (name, session); all is compared to the first, with the first batch size. image_size: None: each model's
    own. rounds: in each, every row is measured once, in an order drawn anew, so that what disturbs the machine disturbs
    all alike; ratios are taken within a round. resident: where a device has a memory of its own the input is
    there before, and the output stays there.
    """
    if rounds < fewest_rounds():
        raise UserError(f"a {CONFIDENCE:.0%} interval needs {fewest_rounds()} rounds or more, not {rounds}.")
    if not batches or min(batches) < 1:
        raise UserError(f"a batch size must be 1 or more, not {min(batches, default=None)}.")
    rng = np.random.default_rng(seed)
    once, inputs, calls = [], [], []
    rows = [(name, session, batch) for name, session in sessions for batch in batches]
    for name, session, batch in track(rows, total=len(rows), label="warm up"):
        size = image_size or session.metadata.preprocess.image_size
        inputs.append(random_input(session.metadata, batch, size, rng))
        try:
            if resident and has_memory(session):
                once.append(session.resident(inputs[-1]))
            else:
                once.append(partial(session, inputs[-1]))
            calls.append(_calls_a_round(once[-1]))
        except Exception as error:  # each runtime has its own kinds; a file of fixed size is the usual reason
            shape = "x".join(map(str, inputs[-1].shape))
            raise UserError(
                f"{name} cannot run an input of {shape}; a file of one size or batch takes no other, and memory may be "
                f"too small. It says: {' '.join(str(error).split())[:300]}"
            ) from error
    times = np.zeros((rounds, len(rows)))
    for number in track(range(rounds), total=rounds, label="measure"):
        for index in rng.permutation(len(rows)):
            call = once[index]
            call()  # untimed: what ran before left its data in the caches, and its threads may wind down
            start = time.perf_counter()
            for _ in range(calls[index]):
                call()
            times[number, index] = (time.perf_counter() - start) / calls[index]
    return [
        _row(
            name,
            session,
            times[:, i],
            times[:, 0] / batches[0],
            batch,
            session.metadata.sides(inputs[i].shape)[0],
            calls[i] * rounds,
        )
        for i, (name, session, batch) in enumerate(rows)
    ]


def _calls_a_round(call: Callable[[], Any]) -> int:
    start, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - start < WARM_UP:
        call()
        done += 1
    return max(1, round(SLICE * done / (time.perf_counter() - start)))


def _row(name: str, session: Session, times: np.ndarray, first: np.ndarray, batch: int, size: int, calls: int) -> Row:
    p25, median, p75 = np.percentile(times * 1e3, (25, 50, 75))
    low, ratio, high = median_interval(times / batch / first)
    return Row(
        model=name,
        setup=session.setup,
        batch=batch,
        image_size=size,
        rounds=len(times),
        calls=calls,
        median_ms=float(median),
        p25_ms=float(p25),
        p75_ms=float(p75),
        images_per_s=batch * 1e3 / float(median),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
    )


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Low end, median and high end of a CONFIDENCE interval of the median, from order statistics.

    It assumes nothing of the distribution: the number of values below the true median is binomial.
    """
    ordered, n = np.sort(values), len(values)
    k = _ranks_to_drop(n)
    return float(ordered[k]), float(np.median(ordered)), float(ordered[n - 1 - k])


def _ranks_to_drop(n: int) -> int:
    """The largest k for which ordered[k] .. ordered[n-1-k] holds the median with CONFIDENCE; -1 if there is none."""
    tail, k = 0.0, -1
    while True:
        tail += math.comb(n, k + 1) / 2**n
        if 2 * tail > 1 - CONFIDENCE:
            return k
        k += 1


def fewest_rounds() -> int:
    """Rounds below which no interval has the confidence."""
    return next(n for n in range(1, 100) if _ranks_to_drop(n) >= 0)
