"""Where the time of a training step goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from nextvit.files import write_text
from nextvit.progress import say

SKIPPED, RECORDED = 3, 5  # steps: the first ones also set up


class Profile:
    """Counts steps for torch's profiler, or does nothing."""

    def __init__(self, profiler: profile | None):
        self.profiler = profiler

    def step(self) -> None:
        if self.profiler is not None:
            self.profiler.step()

    @staticmethod
    @contextmanager
    def opened(folder: Path | None) -> Iterator["Profile"]:
        """folder: gets `profile/trace.json`, for a browser's tracing page, and `profile/table.txt`."""
        if folder is None:
            yield Profile(None)
            return

        def write(profiler: profile) -> None:
            into = folder / "profile"
            into.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(into / "trace.json"))
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            write_text(into / "table.txt", profiler.key_averages().table(sort_by=by, row_limit=40) + "\n")
            say(f"note: {RECORDED} steps were recorded; {into / 'table.txt'} tells where their time went.")

        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(wait=0, warmup=SKIPPED, active=RECORDED, repeat=1)
        with profile(activities=kinds, schedule=plan, on_trace_ready=write) as profiler:
            yield Profile(profiler)
