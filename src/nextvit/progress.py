"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PLAIN_EVERY = 10.0  # seconds


def say(text: str) -> None:
    """A line for the person who watches; standard output is kept for results. Of several processes the first speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(text, file=sys.stderr, flush=True)


def track(
    items: Iterable[T], *, total: int, label: str, unit: str = "", per_item: int = 1, done: int = 0
) -> Iterator[T]:
    """Yield the items and show how far they are, how fast, and the time left.

    total, done: items in all, and those done before. per_item: how many `unit` an item stands for, for the rate.
    """
    if not sys.stderr.isatty():
        yield from _plain(items, total, label, unit, per_item, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task(label, total=total, completed=done, rate="")
        start = time.perf_counter()
        for seen, item in enumerate(items, 1):
            yield item
            rate = seen * per_item / max(time.perf_counter() - start, 1e-9)
            bar.update(job, advance=1, rate=f"{rate:.0f} {unit}/s" if unit else "")


def _plain(items: Iterable[T], total: int, label: str, unit: str, per_item: int, done: int) -> Iterator[T]:
    start = shown = time.perf_counter()
    for seen, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown > PLAIN_EVERY:
            shown = now
            rate = seen / (now - start)
            left = (total - done - seen) / rate
            say(f"{label}: {done + seen} of {total}, {rate * per_item:.0f} {unit or 'items'}/s, {left:.0f} s left")
