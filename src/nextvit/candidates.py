"""The rows of a benchmark, opened: every model on every runtime and precision that was asked for and can be had."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from nextvit.devices import fast_precisions, pick_device
from nextvit.errors import UserError
from nextvit.exporters.export import export
from nextvit.formats import RUN, format_named, format_of
from nextvit.progress import say
from nextvit.runtime.open import open_model, open_session
from nextvit.runtime.session import Session
from nextvit.runtime.torch_session import TorchSession

RUNTIMES = ("eager", "folded", *RUN)


@contextmanager
def open_candidates(
    models: Sequence[str],
    *,
    runtimes: Sequence[str],
    precisions: Sequence[str],
    weights: str | None,
    device: str,
    threads: Sequence[int],
    trust: bool = False,
) -> Iterator[list[tuple[str, Session]]]:
    """(name, session) of each row. A precision that a runtime does not have here is left out, and a line says so."""
    if unknown := [name for name in runtimes if name not in RUNTIMES]:
        raise UserError(f"there is no runtime {unknown[0]!r}; take of {', '.join(RUNTIMES)}.")
    if unknown := [name for name in precisions if name not in ("fp32", "bf16", "fp16")]:
        raise UserError(f"there is no precision {unknown[0]!r}; take of fp32, bf16, fp16.")
    sessions: list[tuple[str, Session]] = []
    refusals: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(models):
            files = {"": Path(name)} if format_of(Path(name)) else {}
            network = None if files else open_model(name, weights)
            for runtime in () if files else runtimes:
                if runtime not in ("eager", "folded"):
                    assert network is not None
                    say(f"exporting {name} to {runtime} ...")
                    files[runtime] = Path(folder, f"{number}{format_named(runtime).suffix}")
                    export(network, files[runtime])
            asked = [""] if "" in files else runtimes
            for precision, runtime, count in product(precisions, asked, threads):
                try:
                    if runtime in files:
                        own = files[runtime] == Path(name)
                        session = open_session(
                            files[runtime],
                            device=device if own else "cpu",
                            threads=count,
                            precision=precision,
                            trust=trust or not own,
                        )
                    else:
                        assert network is not None
                        folded = runtime == "folded"
                        session = TorchSession(
                            network, device=device, threads=count, precision=precision, folded=folded
                        )
                    sessions.append((name, session))
                except UserError as error:
                    if len(precisions) == 1:
                        raise
                    refusals.append(f"{name}, {runtime or 'its own runtime'}, {precision}: {error}")
        for refusal in refusals:
            say(f"left out: {refusal}")
        if not sessions:
            raise UserError(f"nothing is left to measure; fp32 runs everywhere, and {_fast(device)} on torch here.")
        yield sessions


def _fast(device: str) -> str:
    return ", ".join(fast_precisions(pick_device(device)))
