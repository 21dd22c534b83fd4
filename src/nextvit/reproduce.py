"""The paper's tables and its Figure 1 on this machine: costs counted, latencies measured, beside what is printed.

Every network is measured in a run of its own beside the same anchor, Next-ViT-S, on the same runtime, precision and
batch, and the ratio to the anchor is what rows are compared by: a busy hour then disturbs both alike.
"""

import csv
import datetime
import gc
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from nextvit.benchmark import Row, benchmark
from nextvit.cost import cost
from nextvit.create import create_model
from nextvit.data.images import preprocess
from nextvit.devices import cpu_count, fast_precisions, pick_device, processor_name
from nextvit.errors import DiskFull, NotHere, ParityError, UserError
from nextvit.exporters.export import export
from nextvit.exporters.openvino import INT8
from nextvit.exporters.parity import real_images
from nextvit.extras import installed, need, version
from nextvit.files import write_rows
from nextvit.foreign import FAULTS, is_foreign, note_of
from nextvit.formats import format_named
from nextvit.networks import Network, of_size
from nextvit.paper import ANCHOR, SIZES, Claim, PaperRow
from nextvit.progress import say
from nextvit.runtime import coreml_session
from nextvit.runtime.onnxruntime_session import starts
from nextvit.runtime.open import open_session
from nextvit.runtime.session import Session
from nextvit.runtime.torch_session import TorchSession

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SETUPS = (  # runtime and precision, in the order in which they are measured
    ("torch", "fp32"),
    ("onnx", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("coreml", "fp16"),
    ("cuda", "fp32"),
    ("cuda", "fp16"),
    ("tensorrt", "fp16"),  # in fp32 it takes TF32, ten bits of mantissa
)
R = TypeVar("R", bound="DataclassInstance")
RuntimeSetup = tuple[str, str, int]  # runtime, precision, batch
ROUNDS = 12  # of 8, the fewest that there can be, an interval of 99 % is all that was measured
SIMILAR = 1.1  # times, that latencies called similar may be apart, and a ratio may be below the printed one
FEWEST_IMAGES = 8  # for BatchNorm's statistics: ResNeSt has norms that see one value an image
DRAWS = 3  # of random weights, where a file does not answer as the network does
NOT_SURE = "within the error"  # a verdict
NEAR = 0.02  # of a printed cost: what differs by more is flagged
DENSE = {  # of each table: prefix of its columns, task, head, and the height and width that operations are counted at
    "table5": (("fpn", "segment", "fpn", 512, 2048), ("upernet", "segment", "upernet", 512, 2048)),
    "table6": (("", "detect", "mask_rcnn", 800, 1280),),
}


def chosen_setups(runtimes: Sequence[str] = (), precisions: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Of SETUPS those of these runtimes and precisions, or of all of them, that this machine has."""
    for kind, asked, there in (("runtime", runtimes, 0), ("precision", precisions, 1)):
        known = list(dict.fromkeys(setup[there] for setup in SETUPS))
        if unknown := [name for name in asked if name not in known]:
            raise UserError(f"there is no {kind} {unknown[0]!r} to reproduce with; take of {', '.join(known)}.")
    for runtime in runtimes:
        if why := _not_here(runtime):
            raise UserError(f"{runtime} {why}; leave it out of the runtimes.")
    here = runtimes or [name for name in dict(SETUPS) if not _not_here(name)]
    without = {"bf16"} - set(fast_precisions(pick_device("cpu")))  # it would be emulated
    without |= {"int8"} if not installed(INT8.needs[0]) else set()
    there_are = [(runtime, precision) for runtime, precision in SETUPS if runtime in here and precision not in without]
    chosen = [setup for setup in there_are if not precisions or setup[1] in precisions]
    if not chosen:
        raise UserError(
            f"none of these runtimes has one of these precisions here; take of {', '.join(map(' '.join, there_are))}."
        )
    if left_out := [runtime for runtime in runtimes if runtime not in dict(chosen)]:
        say(f"note: {', '.join(left_out)}: not in {' or '.join(precisions)} here, so left out.")
    return chosen


def _not_here(runtime: str) -> str | None:
    """Why a runtime is not on this machine."""
    written = {"onnx": "onnx", "openvino": "openvino", "tensorrt": "onnx"}.get(runtime)
    for module in format_named(written).needs if written else ():
        if not installed(module):
            return f"needs {module}"
    if runtime == "cuda" and not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch sees"
    if runtime == "tensorrt" and not starts("tensorrt"):
        return "needs an NVIDIA GPU, TensorRT, and a build of ONNX Runtime for it, as onnxruntime-gpu is"
    return coreml_session.not_here() if runtime == "coreml" else None


# ---- costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """A cost of a row: what the paper prints, and what the network has."""

    column: str
    printed: float | None
    counted: float | None  # None: see `why`
    why: str = ""
    with_attention: float | None = None  # operations of a dense network, attention products among them

    @property
    def differs(self) -> bool:
        return self._far(self.counted)

    @property
    def has_attention(self) -> bool:
        """Whether the printed figure is the one with attention products, and not the other one."""
        return self.with_attention is not None and self.differs and not self._far(self.with_attention)

    def _far(self, value: float | None) -> bool:
        return self.printed is not None and value is not None and abs(value / self.printed - 1) > NEAR


def counts(row: PaperRow) -> list[Count]:
    """Parameters (millions) and operations (1e9 multiply-adds) of a row's network, or of the dense ones on it.

    Counted as the authors counted: Next-ViT with what BatchNorm and pooling cost, other classifiers as their papers do,
    dense networks without attention products.
    """
    found: list[Count] = []
    ways = DENSE.get(row.table, (("", "classify", None, row.image_size, None),))
    printed = [way for way in ways if not row.printed.keys().isdisjoint(_columns(way[0]))]
    for prefix, task, head, height, width in printed or ways[:1]:
        columns = _columns(prefix)
        try:
            with torch.device("meta"):  # nothing is drawn, which takes longer than the count
                network = create_model(row.network, task=task, head=head)
                if task == "classify":
                    network = of_size(network, row.image_size)
                counted = cost(network, height, width)
        except FAULTS as error:
            found += [Count(column, row.printed.get(column), None, first_line(error)) for column in columns]
            continue
        ours = task != "classify" or not is_foreign(row.network)
        values = (counted.params / 1e6, counted.gflops_paper if ours else counted.gflops)
        attention = round(counted.gflops, 2) if task != "classify" else None
        for column, value, all_of_it in zip(columns, values, (None, attention), strict=True):
            found.append(Count(column, row.printed.get(column), round(value, 2), with_attention=all_of_it))
    return found


def _columns(prefix: str) -> list[str]:
    return [f"{prefix}_{what}".strip("_") for what in ("params_m", "flops_g")]


# ---- latencies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """One row on one runtime: milliseconds for a batch, and the ratio to the anchor's; or why not."""

    row: str  # its key
    runtime: str
    precision: str
    batch: int
    machine: str
    threads: int
    ms: float | None = None  # for the batch, median of the rounds
    ratio: float | None = None  # to the anchor's for the same batch
    ratio_low: float | None = None
    ratio_high: float | None = None
    why: str = ""  # it could not be measured
    day: str = ""  # of the measurement, YYYY-MM-DD

    @property
    def setup(self) -> RuntimeSetup:
        return self.runtime, self.precision, self.batch

    @property
    def interval(self) -> tuple[float, float, float]:
        """Low end, ratio and high end, of one that was measured."""
        if self.ratio is None or self.ratio_low is None or self.ratio_high is None:
            raise ValueError(f"{self.row} was not measured: {self.why}")
        return self.ratio_low, self.ratio, self.ratio_high

    @property
    def told(self) -> str:
        """For a table."""
        if self.ratio is None:
            return f"not measured: {self.why}"
        low, ratio, high = self.interval
        return f"{self.ms:.1f} ms, {ratio:.2f} ({low:.2f} to {high:.2f})"


def setup_name(setup: RuntimeSetup) -> str:
    runtime, precision, batch = setup
    return f"{runtime} {precision}" + f", batch {batch}" * (batch > 1)


def measure(
    rows: Sequence[PaperRow],
    file: Path,
    *,
    setups: Sequence[tuple[str, str]] = SETUPS,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> list[Latency]:
    """Measure rows of a table, keeping each in the CSV `file` when it is known.

    What is there is not done again, but for what could not be measured. Raises UserError where the file is of another
    machine, of other libraries or of another number of threads.
    """
    threads = threads or cpu_count()
    done = read_latencies(file)
    insist_on_machine(file, [(one.machine, one.threads) for one in done], threads)
    anchor_size = SIZES[rows[0].table]
    with tempfile.TemporaryDirectory() as place:
        anchors = Sessions(partial(create_model, ANCHOR), anchor_size, Path(place, "anchor"), threads)
        for number, row in enumerate(rows, 1):
            wanted = [(r, p, b) for r, p in setups for b in batches]
            there = {found.setup for found in done if found.row == row.key and found.ratio is not None}
            left = [setup for setup in wanted if setup not in there]
            if not left:
                continue
            say(f"{number} of {len(rows)}: {row.name}, {row.image_size} pixels")
            for found in _measured(row, left, anchors, Path(place, "row"), threads, rounds):
                known = {(one.row, one.setup): one for one in done} | {(found.row, found.setup): found}
                done = list(known.values())
                write_rows(file, [asdict(one) for one in done])
            gc.collect()
    return done


@cache
def machine() -> str:
    """Processor, GPU and libraries, as far as latencies depend on them."""
    names = ("torch", "onnxruntime", "openvino", *["coremltools"] * (sys.platform == "darwin"), "timm")
    versions = ", ".join(f"{name} {version(name)}" for name in names if installed(name))
    system = f"; macOS {platform.mac_ver()[0]}" * (sys.platform == "darwin")
    if torch.cuda.is_available():
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        system += f"; {torch.cuda.get_device_name()}, {libraries}"
    return f"{processor_name()}{system}; {versions}"


def today() -> str:
    return datetime.date.today().isoformat()


def insist_on_machine(file: Path, there: Sequence[tuple[str, int]], threads: int) -> None:
    """That what is measured now can stand beside what a file has."""
    for name, count in there:
        if (name, count) != (machine(), threads):
            raise UserError(
                f"{file} was measured on {name}, with {count} threads, and not on {machine()}, with {threads}; name "
                "another --output."
            )


class Sessions:
    """A network on the runtimes, each exported and opened when it is first asked for; files begin with `stem`.

    draw: makes the network, with random weights.
    """

    def __init__(self, draw: Callable[[], Network], image_size: int, stem: Path, threads: int):
        self.draw, self.image_size, self.stem, self.threads = draw, image_size, stem, threads
        self.network = self._drawn()
        self.open: dict[RuntimeSetup, Session] = {}
        for old in stem.parent.glob(f"{stem.name}-*"):  # files of another network
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    def __call__(self, runtime: str, precision: str, batch: int = 1) -> Session:
        key = runtime, precision, batch
        if key not in self.open:
            self.open[key] = self._opened(runtime, precision, dynamic=batch > 1)
        return self.open[key]

    def _drawn(self) -> Network:
        network = self.draw()
        _calibrate(network, self.image_size)
        return network

    def _opened(self, runtime: str, precision: str, *, dynamic: bool) -> Session:
        """dynamic: for any batch and size; else for one image of one size, whose file takes a third of the time."""
        if runtime in ("torch", "cuda"):
            place, kind = ("cpu", "eager") if runtime == "torch" else ("cuda", "graph")
            session = TorchSession(self.network, device=place, threads=self.threads, precision=precision, kind=kind)
            session.metadata = session.metadata.with_image_size(self.image_size)
            return session
        stored = precision if precision in ("int8", "fp16") else "fp32"  # bf16 is how a file of fp32 is computed
        written = format_named("onnx" if runtime == "tensorrt" else runtime)
        path = self.stem.with_name(f"{self.stem.name}-{stored}{'-dynamic' * dynamic}{written.suffix}")
        if not path.exists():
            self._write(path, stored, dynamic=dynamic)
        chosen = precision if stored == "fp32" else None
        device = {"coreml": "auto", "tensorrt": "tensorrt"}.get(runtime, "cpu")  # auto: all of a Mac's compute units
        return open_session(path, device=device, threads=self.threads, precision=chosen, trust=True)

    def _write(self, path: Path, precision: str, *, dynamic: bool) -> None:
        turns = range(3) if precision == "int8" else ()
        images = [image.rotate(90 * turn) for turn in turns for image in real_images()] or None  # enough for ranges
        write = partial(export, image_size=self.image_size, precision=precision, calibration=images, max_drop=None)
        for left in reversed(range(DRAWS)):
            try:
                write(self.network, path, dynamic=dynamic)
                return
            except ParityError:  # some random weights, of deep networks above all, make much of a rounding
                if not left:
                    raise
                self.network = self._drawn()


def _measured(
    row: PaperRow,
    setups: Sequence[RuntimeSetup],
    anchors: Sessions,
    stem: Path,
    threads: int,
    rounds: int,
) -> Iterator[Latency]:
    try:
        draw = partial(create_model, row.network, task="classify")
        own = Sessions(lambda: of_size(draw(), row.image_size, fresh=True), row.image_size, stem, threads)
    except FAULTS as error:
        for setup in setups:
            yield Latency(row.key, *setup, machine(), threads, why=first_line(error), day=today())
        return
    for runtime, precision, batch in setups:
        try:
            pair = [("anchor", anchors(runtime, precision, batch)), (row.key, own(runtime, precision, batch))]
            found = benchmark(pair, batches=[batch], rounds=rounds, resident=True)[1]
            yield _latency(row, runtime, precision, batch, threads, found)
        except DiskFull:
            raise
        except Exception as error:  # a network that one runtime cannot have: the rest goes on
            say(f"{row.name}, {runtime}, {precision}: {first_line(error)}")
            yield Latency(row.key, runtime, precision, batch, machine(), threads, why=first_line(error), day=today())


def _latency(row: PaperRow, runtime: str, precision: str, batch: int, threads: int, found: Row) -> Latency:
    ratio, low, high = (round(value, 4) for value in (found.ratio, found.ratio_low, found.ratio_high))
    ms = round(found.median_ms, 3)
    return Latency(row.key, runtime, precision, batch, machine(), threads, ms, ratio, low, high, day=today())


def first_line(error: Exception) -> str:
    """What is told of an error in a table."""
    kind = "" if isinstance(error, UserError | NotHere) else f"{type(error).__name__}: "
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines() or ["?"]  # some are coloured
    return kind + lines[0][:300]


def _calibrate(network: Network, image_size: int) -> None:
    """Give every BatchNorm the statistics of real images: with those of fresh weights values vanish or overflow."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches, and not of the first values too
    p = network.metadata.with_image_size(image_size).preprocess
    real = real_images()
    enough = round(len(real) * (SIZES["table4"] / image_size) ** 2)  # as many pixels as all of them have at 224
    shown = real[-max(enough, FEWEST_IMAGES) :]  # photographs are the last
    images = np.stack([preprocess(image, p) for image in shown])
    network.train()
    with torch.no_grad():
        network(torch.from_numpy(images))
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def read_latencies(file: Path) -> list[Latency]:
    """What a run left; none where there is no file."""
    return read_records(file, Latency)


def read_records(file: Path, kind: type[R]) -> list[R]:
    """Records of a dataclass as `write_rows` wrote them; an empty cell is the field's default."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8", newline="") as handle:
        records = list(csv.DictReader(handle))
    pydantic = need("pydantic", extra="train")
    try:
        if any(record.keys() - {field.name for field in fields(kind)} for record in records):
            raise ValueError("it has other columns")
        given = [{key: cell for key, cell in record.items() if cell} for record in records]
        found: list[R] = pydantic.TypeAdapter(list[kind]).validate_python(given)  # type: ignore[valid-type]  # at run time
    except ValueError as error:
        raise UserError(f"{file} was not written by `nextvit reproduce`; name another folder.") from error
    return found


# ---- what follows from them ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A claim of the paper on one runtime: how many times as long the slower network takes."""

    claim: Claim
    setup: RuntimeSetup
    printed: float  # on TensorRT
    measured: float
    low: float  # of an interval of 99 % of each latency, the two at their worst
    high: float

    @property
    def verdict(self) -> str:
        if self.claim.similar:
            if self.low >= 1 / SIMILAR and self.high <= SIMILAR:
                return "holds"
            if self.low > SIMILAR:
                return "faster than that"
            return "not here" if self.high < 1 / SIMILAR else NOT_SURE
        if self.low > 1:
            return "holds" if self.measured >= self.printed / SIMILAR else "faster, by less than printed"
        return "not here" if self.high < 1 else NOT_SURE


def held(claims: Sequence[Claim], rows: Sequence[PaperRow], found: Sequence[Latency]) -> list[Held]:
    """The claims on every runtime and batch that both networks were measured with."""
    by_key = {row.key: row for row in rows}
    measured = {(one.row, *one.setup): one for one in found if one.ratio is not None}
    verdicts = []
    for claim in claims:
        if not rows or claim.table != rows[0].table or claim.faster not in by_key or claim.slower not in by_key:
            continue
        fast, slow = (by_key[key].printed["tensorrt_ms"] for key in (claim.faster, claim.slower))
        for key, one in measured.items():
            other = measured.get((claim.slower, *key[1:]))
            if key[0] != claim.faster or other is None:
                continue
            if any(note_of(by_key[row].network) for row in (claim.faster, claim.slower)):
                continue  # a reconstruction is no evidence
            (low, middle, high), (other_low, other_middle, other_high) = one.interval, other.interval
            times = other_middle / middle, other_low / high, other_high / low
            verdicts.append(Held(claim, one.setup, slow / fast, *times))
    return verdicts


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, accuracy) points, which no other one beats: cheaper or as cheap, and as accurate or more, and not the
    same in both.
    """
    return [
        not any(c <= cost_ and a >= accuracy and (c, a) != (cost_, accuracy) for c, a in points)
        for cost_, accuracy in points
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho of two orders of the same things; ties have their mean rank."""
    return float(need("scipy.stats", extra="peers").spearmanr(first, second).statistic)
