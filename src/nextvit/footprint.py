"""What a model costs beside its time: the size of its file, how long it takes to open, and the memory that it adds.

Memory is a matter of processes, so each model is opened in a new one.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from nextvit.errors import UserError
from nextvit.files import parts
from nextvit.formats import format_of
from nextvit.runtime.session import Session, random_input

LONG_ENOUGH = 1.0  # seconds of running until memory is what it will be


@dataclass(frozen=True)
class Footprint:
    """Of one row of a benchmark."""

    file_mb: float | None  # 1e6 bytes, of all parts of the file; None: a fresh network
    load_s: float  # opening and the first answer, for the second time in a process: libraries are imported
    memory_mb: float | None  # 1e6 bytes that opening and running add to the process's peak, on the host; None: not told


def footprint(opener: Callable[[], Session], file: Path | None, batch: int, image_size: int) -> Footprint:
    """Open and run in a process of its own, for a second at least."""
    context = multiprocessing.get_context("spawn")  # a fork would have this process's memory
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(opener, file, batch, image_size, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        load_s, memory = ours.recv()
    except EOFError as error:
        raise UserError(
            "the process that measures memory ended without an answer; its own message is above."
        ) from error
    finally:
        process.join()
    size = None if file is None else sum(part.stat().st_size for part in parts(file)) / 1e6
    return Footprint(size, load_s, memory)


def _measure(opener: Callable[[], Session], file: Path | None, batch: int, image_size: int, answer: Connection) -> None:
    fmt = format_of(file) if file else None
    for module in fmt.needs[-1:] if fmt else ():
        import_module(module)  # libraries are not what a model takes
    before = peak_mb()
    session = opener()
    images = random_input(session.metadata, batch, image_size, np.random.default_rng(0))
    start = time.perf_counter()
    while time.perf_counter() - start < LONG_ENOUGH:
        session(images)
    after = peak_mb()
    del session
    start = time.perf_counter()
    opener()(images)
    answer.send((time.perf_counter() - start, None if after is None or before is None else after - before))


def peak_mb() -> float | None:
    """The most memory that this process has had in RAM, 1e6 bytes; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's, where that had more
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        pass
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
