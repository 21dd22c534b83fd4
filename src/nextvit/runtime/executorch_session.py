"""An ExecuTorch file on ExecuTorch's own Python runtime."""

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextvit.data.images import ImageRejected
from nextvit.devices import cpu_count
from nextvit.errors import UserError
from nextvit.extras import need, version
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup, as_named, insist_on_cpu, insist_on_seal, joined, own_precision

METADATA_METHOD, SEAL_METHOD = "nextvit", "sha256"
LARGEST_BATCH = 8  # of a file with a free batch; larger ones are run in parts
OPEN: "weakref.WeakSet[ExecuTorchSession]" = weakref.WeakSet()  # their methods hold on to the pool of threads


class ExecuTorchSession:
    """Runs on XNNPACK."""

    setup: Setup

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None):
        runtime = need("executorch.runtime", extra="executorch")
        bindings = need("executorch.extension.pybindings._C", extra="executorch")
        insist_on_cpu(device, "ExecuTorch files")
        insist_on_seal(path)
        used = next((session.setup.threads for session in OPEN), None)
        wanted = threads or used or cpu_count()
        if used not in (None, wanted):
            raise UserError(
                f"ExecuTorch has one pool of threads a process, and a file that is open has {used}, not {wanted}; open "
                "them one after the other."
            )
        try:
            with _silent_start():
                if wanted != bindings._threadpool_get_thread_count():
                    bindings._unsafe_reset_threadpool(wanted)
                program = runtime.Runtime.get().load_program(path)
                notes = program.load_method(METADATA_METHOD).execute([])[0]
                self._method = program.load_method("forward")
                self._program = program  # the method lives in its memory
        except RuntimeError as error:
            raise UserError(
                f"{path} cannot be opened by ExecuTorch {version('executorch')}; export it again."
            ) from error
        self.metadata = Metadata.from_json(notes, str(path))
        own = own_precision(self.metadata, precision, "ExecuTorch")
        shape = self._method.metadata.input_tensor_meta(0).sizes()
        self.fixed_batch = 1 if shape[0] == 1 else None
        self._largest = self.metadata.sides(shape)
        count = bindings._threadpool_get_thread_count()
        self.setup = Setup(f"executorch {version('executorch')}, xnnpack", "cpu", own, count)
        OPEN.add(self)

    def __call__(self, batch: np.ndarray) -> Any:
        height, width = self.metadata.sides(batch.shape)
        if height > self._largest[0] or width > self._largest[1]:
            told = f"this file takes up to {self._largest[0]} x {self._largest[1]} pixels, not {height} x {width}"
            cure = "make the image smaller" if self.metadata.takes_pixels else "export it for a larger --image-size"
            raise ImageRejected(f"{told}; {cure}.")
        parts = [batch[start : start + LARGEST_BATCH] for start in range(0, len(batch), LARGEST_BATCH)]
        tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
        try:
            found = [[part.numpy().copy() for part in self._method.execute([tensor])] for tensor in tensors]
            return joined([as_named(arrays, self.metadata) for arrays in found])
        except RuntimeError as error:
            shape = "x".join(map(str, batch.shape))
            raise UserError(f"this file does not take an input of {shape}; was it exported for one size?") from error


@contextmanager
def _silent_start() -> Iterator[None]:
    """Without what the thread pool writes past Python when it first looks at the CPU."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
