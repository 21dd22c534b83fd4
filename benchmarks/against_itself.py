"""One network opened twice in each runtime: the benchmark measured against itself, with real sessions.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/against_itself.py

Two sessions have buffers and caches of their own, so they may truly differ by some percent. A larger difference says
that no smaller one is to be believed on this machine now.
"""

import tempfile
from pathlib import Path

import nextvit
from nextvit.benchmark import benchmark
from nextvit.exporters.export import export
from nextvit.formats import RUN, format_named
from nextvit.report import latency_lines
from nextvit.runtime.coreml_session import not_here
from nextvit.runtime.open import open_session

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        files = ["nextvit_nano"]  # on torch
        for name in RUN:
            if name != "coreml" or not_here() is None:
                files.append(str(Path(folder, f"nano{format_named(name).suffix}")))
                export(nextvit.create_model("nextvit_nano"), Path(files[-1]))
        for file in files:
            twice = [(name, open_session(file, device="cpu", threads=1, trust=True)) for name in ("first", "second")]
            print("\n".join(latency_lines(benchmark(twice, rounds=15, image_size=224))))
