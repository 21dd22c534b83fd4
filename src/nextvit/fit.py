"""Latency as a design tool: the network with the most promise within a budget, from blocks measured on this device.

A frame is a variant's widths. What a block of it costs at an image size is the difference between two networks with
more and fewer of it, exported and run as any network is, so that fusion, layout and quantisation are the real ones.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from math import log2
from pathlib import Path

import torch

from nextvit.benchmark import Row, benchmark
from nextvit.cost import cost
from nextvit.create import create_model
from nextvit.errors import UserError
from nextvit.files import cache_folder, write_text
from nextvit.progress import say
from nextvit.reproduce import Sessions
from nextvit.spec import Configuration

FRAMES = ("nextvit_nano", "nextvit_tiny", "nextvit_small")
SIZES = (128, 160, 192, 224, 256, 288, 320, 384)  # pixels a side
PARTS = ("ncb_1", "ncb_2", "ncb_3", "ntb_3", "ncb_4")  # blocks by stage, of which there may be more or fewer
MORE = 4  # blocks, by which two networks differ that tell what one costs
ROUNDS = 12
FINALISTS = 3  # pairs of a frame and a size whose blocks are measured
USUAL = 224  # pixels a side, at which frames are compared first
# Points of top-1 for twice the operations at 224 pixels, and for twice the side of the image: of the six results that
# the authors publish for S, B and L at 224 and 384 pixels, by least squares (82.5, 83.2, 83.6, 83.6, 84.3, 84.7 %).
BY_OPERATIONS, BY_SIDE = 1.23, 1.41
SMALL_GFLOPS = 5.8  # of S at 224 pixels


@dataclass(frozen=True)
class Device:
    """What networks are fitted to."""

    runtime: str
    precision: str
    threads: int
    machine: str


@dataclass(frozen=True)
class Costs:
    """What a frame costs at a size: the network with one block of each part, and each block more."""

    base: float
    blocks: dict[str, float]  # by PARTS

    def of(self, c: Configuration) -> float:
        """Of a configuration: blocks add up."""
        return self.base + sum(self.blocks[part] * (count - 1) for part, count in parts_of(c).items())


@dataclass(frozen=True)
class Candidate:
    """A network that should keep the budget."""

    configuration: Configuration
    image_size: int  # pixels a side
    predicted_ms: float  # batch 1
    base_ms: float  # of the network with one block of each part, when blocks were measured
    gflops: float  # 1e9 multiply-adds at that size, as the authors count
    promise: float  # points of top-1 more than S at 224 pixels: see `promise_of`


@dataclass(frozen=True)
class Fitted:
    """A candidate as it was measured, beside the network with one block of each part."""

    candidate: Candidate
    measured_ms: float  # median of the rounds
    ratio: float  # to that network's, within the rounds
    base_ms: float  # its own

    @property
    def speed(self) -> float:
        """How many times as long the machine takes now as when blocks were measured."""
        return self.base_ms / self.candidate.base_ms

    @property
    def error(self) -> float:
        """Of the prediction at the machine's present speed, relative to what was measured."""
        return self.candidate.predicted_ms / self.candidate.base_ms / self.ratio - 1


def parts_of(c: Configuration) -> dict[str, int]:
    """How many blocks of each part there are."""
    return dict(zip(PARTS, (c.first, c.second, c.n * c.groups, c.groups, c.fourth), strict=True))


def promise_of(gflops_224: float, image_size: int) -> float:
    """Points of ImageNet top-1 above S at 224 pixels that a network of so many operations at 224 promises.

    A rule of thumb by the authors' six published results, stretched to smaller networks and images: it tells which of
    two networks to train, not what either will come to.
    """
    return BY_OPERATIONS * log2(gflops_224 / SMALL_GFLOPS) + BY_SIDE * log2(image_size / USUAL)


# ---- what blocks cost ------------------------------------------------------------------------------------------------


def probes(frame: str, mix: float) -> dict[str, Configuration]:
    """The network with one block of each part, "base", and for each part one with MORE of it; of "ntb_3" NCBs, too."""
    few = {"first": 1, "second": 1, "n": 1, "groups": 1, "fourth": 1}
    many = {"ncb_1": "first", "ncb_2": "second", "ncb_3": "n", "ntb_3": "groups", "ncb_4": "fourth"}
    changes: dict[str, dict[str, int]] = {"base": {}, **{part: {key: 1 + MORE} for part, key in many.items()}}
    return {name: Configuration(frame, mix=mix, **{**few, **change}) for name, change in changes.items()}


def costs_from(values: dict[str, float]) -> Costs:
    """Of what the probes cost, by their names; both milliseconds and operations add up."""
    blocks = {part: (values[part] - values["base"]) / MORE for part in PARTS}
    blocks["ntb_3"] -= blocks["ncb_3"]  # each group more has an NCB more
    return Costs(values["base"], blocks)


@cache
def operations(frame: str, image_size: int, mix: float) -> Costs:
    """1e9 multiply-adds, exactly: counted from networks without weights."""
    found = {}
    for name, c in probes(frame, mix).items():
        with torch.device("meta"):
            model = create_model(c.name)
        found[name] = cost(model, image_size).gflops_paper
    return costs_from(found)


def latencies(device: Device, frame: str, image_size: int, mix: float, rounds: int = ROUNDS) -> Costs:
    """Milliseconds, batch 1, measured in one interleaved run; kept in the cache by all that they depend on."""
    key = json.dumps([asdict(device), frame, image_size, mix, rounds, MORE])
    file = cache_folder() / "fit" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        return Costs(found["base"], found["blocks"])
    say(f"measure the blocks of {frame} at {image_size} pixels ({device.runtime}, {device.precision})")
    rows = measured(device, [(c, image_size) for c in probes(frame, mix).values()], rounds)
    base = rows[0].median_ms
    values = {name: row.ratio * base for name, row in zip(probes(frame, mix), rows, strict=True)}
    costs = costs_from(values)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"of": json.loads(key), **asdict(costs)}, indent=1) + "\n")
    return costs


def measured(device: Device, networks: Sequence[tuple[Configuration, int]], rounds: int = ROUNDS) -> list[Row]:
    """Exported, opened and measured side by side, batch 1; ratios are to the first."""
    with tempfile.TemporaryDirectory() as place:
        pairs = []
        for number, (c, size) in enumerate(networks):
            sessions = Sessions(partial(create_model, c.name), size, Path(place, f"net{number}"), device.threads)
            pairs.append((c.name, sessions(device.runtime, device.precision)))
        return benchmark(pairs, rounds=rounds, resident=True)


# ---- the search ------------------------------------------------------------------------------------------------------


def configurations(frame: str, mix: float) -> Iterator[Configuration]:
    """Of the proportions that the paper's variants have: stages 1 and 2 alike, stage 4 a block less, N up to 6."""
    for k, n, groups in product((1, 2, 3), range(1, 7), range(1, 13)):
        yield Configuration(frame, k, k, n, groups, max(1, k - 1), mix)


def candidates(
    budget_ms: float, frame: str, image_size: int, mix: float, times: Costs, at_size: Costs, at_224: Costs
) -> list[Candidate]:
    """Those that keep the budget, the most promising first; of equals the one with N nearest to the paper's 4."""
    found = []
    for c in configurations(frame, mix):
        predicted = times.of(c)
        if predicted <= budget_ms:
            promise = promise_of(at_224.of(c), image_size)
            told = round(predicted, 3), round(times.base, 3), round(at_size.of(c), 3), round(promise, 3)
            found.append(Candidate(c, image_size, *told))
    return sorted(found, key=lambda one: (-one.promise, abs(one.configuration.n - 4)))


def promising(budget_ms: float, sizes: Sequence[int], mix: float, times: dict[str, Costs]) -> list[tuple[str, int]]:
    """Frames and sizes worth measuring, the best first: latency at other sizes is taken to go with the image's area.

    times: of each frame at USUAL pixels.
    """
    best: list[tuple[float, str, int]] = []
    for frame, size in product(times, sizes):
        area = (size / USUAL) ** 2
        scaled = Costs(times[frame].base * area, {part: ms * area for part, ms in times[frame].blocks.items()})
        counted = operations(frame, USUAL, mix)
        there = candidates(budget_ms, frame, size, mix, scaled, counted, counted)
        if there:
            best.append((there[0].promise, frame, size))
    return [(frame, size) for _, frame, size in sorted(best, reverse=True)]


def fit(
    budget_ms: float,
    device: Device,
    *,
    frames: Sequence[str] = FRAMES,
    sizes: Sequence[int] = SIZES,
    mix: float = 0.75,
    rounds: int = ROUNDS,
    costs_of: Callable[..., Costs] = latencies,
) -> list[Candidate]:
    """The most promising network of each finalist within a budget of milliseconds for one image, the best first.

    Raises UserError where nothing keeps the budget, or no frame can have this mix.
    """
    usual = {frame: costs_of(device, frame, USUAL, mix, rounds) for frame in _that_can_have(mix, frames)}
    times = {(frame, USUAL): costs for frame, costs in usual.items()}
    found: list[Candidate] = []
    for frame, size in promising(budget_ms, sizes, mix, usual):
        if (frame, size) not in times:
            times[frame, size] = costs_of(device, frame, size, mix, rounds)
        at_size, at_224 = operations(frame, size, mix), operations(frame, USUAL, mix)
        found += candidates(budget_ms, frame, size, mix, times[frame, size], at_size, at_224)[:1]
        if len(found) == FINALISTS:
            break
    if not found:
        (frame, size), least = min(times.items(), key=lambda item: item[1].base)
        raise UserError(
            f"nothing takes {budget_ms:g} ms or less here: of what was measured, the smallest network of {frame}'s "
            f"widths takes the least, {least.base:.3g} ms at {size} pixels; allow more time, or smaller --sizes."
        )
    return sorted(found, key=lambda one: -one.promise)


def _that_can_have(mix: float, frames: Sequence[str]) -> list[str]:
    """Frames whose widths can be divided so between E-MHSA and MHCA, whose heads have 32 channels each."""
    able, why = [], ""
    for frame in frames:
        try:
            operations(frame, USUAL, mix)
            able.append(frame)
        except UserError as error:
            why = f"{frame} cannot have r = {mix:g}: {error}"
            say(f"note: {why}")
    if not able:
        raise UserError(why)
    return able


def build(candidate: Candidate, device: Device, rounds: int = ROUNDS) -> Fitted:
    """Build it and measure it, side by side with the network that its blocks were measured from."""
    c, size = candidate.configuration, candidate.image_size
    base, own = measured(device, [(probes(c.frame, c.mix)["base"], size), (c, size)], rounds)
    return Fitted(candidate, own.median_ms, own.ratio, base.median_ms)


def budget_of(text: str) -> float:
    """Milliseconds of "10ms" or "10"; UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:ms)?\s*", text)
    if found is None or not float(found[1]):
        raise UserError(f"a budget is milliseconds for one image, as in 10ms, not {text!r}.")
    return float(found[1])


def fitted_row(one: Fitted) -> dict[str, object]:
    """For a person, and for --json."""
    c = one.candidate
    return {
        "network": c.configuration.name,
        "pixels": c.image_size,
        "gflops": round(c.gflops, 2),
        "promise": round(c.promise, 2),
        "predicted_ms": round(c.predicted_ms, 2),
        "measured_ms": round(one.measured_ms, 2),
        "speed": round(one.speed, 3),
        "error": f"{one.error:+.1%}",
    }
