"""The rows of a benchmark, opened: every model on every runtime and precision that was asked for and can be had."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from nextvit.benchmark import Row
from nextvit.devices import fast_precisions, pick_device
from nextvit.errors import NotHere, UserError
from nextvit.exporters.export import export
from nextvit.footprint import footprint
from nextvit.formats import RUN, format_named, format_of
from nextvit.networks import of_size
from nextvit.pipeline import Pipeline
from nextvit.progress import say, track
from nextvit.runtime.open import HINTS, open_network, open_session
from nextvit.runtime.session import Session, insist_on_latency
from nextvit.runtime.torch_session import KINDS, TorchSession

RUNTIMES = (*KINDS, *RUN)


@dataclass(frozen=True)
class Candidate:
    """A model on one runtime: open here, and how to open it in another process."""

    model: str
    session: Session
    opener: Callable[[], Session]
    file: Path | None  # that is run, or that the network is of


@contextmanager
def open_candidates(
    models: Sequence[str],
    *,
    runtimes: Sequence[str],
    precisions: Sequence[str | None],
    weights: str | None,
    device: str,
    threads: Sequence[int],
    image_size: int | None = None,
    hints: Sequence[str] = ("latency",),
    trust: bool = False,
) -> Iterator[list[Candidate]]:
    """All rows. A precision or hint that a runtime does not have here is left out, and a line says so.

    A precision of None is each file's own, and fp32 for networks. image_size: what is measured, to which networks of
    others are made whose size is fixed; None: each one's own.
    """
    for what, asked, there in (
        ("runtime", runtimes, RUNTIMES),
        ("precision", precisions, ("fp32", "bf16", "fp16", None)),
        ("hint", hints, HINTS),
    ):
        if unknown := [name for name in asked if name not in there]:
            raise UserError(f"there is no {what} {unknown[0]!r}; take of {', '.join(filter(None, there))}.")
    candidates: list[Candidate] = []
    refusals: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(models):
            own = Path(name) if format_of(Path(name)) else None
            files = (
                _export_each(name, weights, runtimes, image_size, Path(folder, str(number)))
                if own is None
                else {"": own}
            )
            for precision, (runtime, file), count, hint in product(precisions, files.items(), threads, hints):
                if runtime in KINDS:
                    opener = partial(_opened, name, weights, image_size, device, count, precision, runtime, hint)
                else:
                    opener = partial(
                        open_session,
                        file or name,
                        device=device if own else "cpu",
                        threads=count,
                        precision=precision,
                        hint=hint,
                        trust=trust or own is None,
                    )
                try:
                    candidates.append(Candidate(name, opener(), opener, file))
                except NotHere as error:
                    if len(precisions) == len(hints) == 1:
                        raise
                    where = f"{runtime or 'its own runtime'}, {precision or 'its own precision'}, {hint}"
                    refusals.append(f"{name}, {where}: {error}")
        for refusal in refusals:
            say(f"left out: {refusal}")
        if not candidates:
            raise UserError(
                f"nothing is left to measure; fp32 with the latency hint runs everywhere, {_fast(device)} on torch."
            )
        yield candidates


def with_footprints(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Row]:
    """The rows of a benchmark with what each costs in memory, each measured in a process of its own."""
    several = len(rows) // len(candidates)  # batch sizes
    asked = [(rows[i], candidates[i // several]) for i in range(len(rows))]
    return [
        replace(row, footprint=footprint(of.opener, of.file, row.batch, row.image_size))
        for row, of in track(asked, total=len(asked), label="memory, a process each")
    ]


def with_pipelines(rows: Sequence[Row], pipelines: Sequence[Pipeline]) -> list[Row]:
    """The rows of a benchmark with where the time of an image goes, of as many records as there are candidates."""
    several = len(rows) // len(pipelines)
    return [replace(row, pipeline=pipelines[index // several]) for index, row in enumerate(rows)]


def _export_each(
    name: str, weights: str | None, runtimes: Sequence[str], image_size: int | None, stem: Path
) -> dict[str, Path | None]:
    """The file of a network on each runtime: of a variant or checkpoint itself on torch, else an export."""
    network = of_size(open_network(name, weights), image_size)
    files: dict[str, Path | None] = {}
    for runtime in runtimes:
        if runtime in KINDS:
            files[runtime] = Path(name) if Path(name).is_file() else None
        else:
            say(f"exporting {name} to {runtime} ...")
            files[runtime] = stem.with_suffix(format_named(runtime).suffix)
            export(network, stem.with_suffix(format_named(runtime).suffix))
    return files


def _opened(
    name: str,
    weights: str | None,
    image_size: int | None,
    device: str,
    threads: int,
    precision: str | None,
    kind: str,
    hint: str,
) -> Session:
    insist_on_latency(hint, "torch")
    network = of_size(open_network(name, weights), image_size)
    return TorchSession(network, device=device, threads=threads, precision=precision, kind=kind)


def _fast(device: str) -> str:
    return ", ".join(fast_precisions(pick_device(device)))
