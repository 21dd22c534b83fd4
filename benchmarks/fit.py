"""How well `nextvit fit` predicts: configurations drawn at random, predicted from what blocks cost, built and measured.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/fit.py --precision int8 --output fit.csv

Blocks are measured once for each frame and size, as `fit` does, and kept where it keeps them. A network that is in the
file already is not built again.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from nextvit.devices import cpu_count
from nextvit.files import write_rows
from nextvit.fit import FRAMES, ROUNDS, Candidate, Device, build, fitted_row, latencies, operations
from nextvit.progress import say
from nextvit.reproduce import chosen_setups, machine
from nextvit.spec import Configuration

MIX = 0.75  # r
NEAR = 0.10  # of what was measured


def drawn(count: int, frames: list[str], sizes: list[int], seed: int) -> list[tuple[Configuration, int]]:
    """Networks and pixels a side; blocks in any number that the search has, and stages alike or not."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first, second, fourth = (int(rng.integers(1, 4)) for _ in range(3))
        n, groups = int(rng.integers(1, 7)), int(rng.integers(1, 13))
        frame, size = frames[rng.integers(len(frames))], sizes[rng.integers(len(sizes))]
        found.append((Configuration(frame, first, second, n, groups, fourth, MIX), size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", nargs="+", default=list(FRAMES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[160, 224])
    parser.add_argument("--device-runtime", default="openvino")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path("fit.csv"))
    asked = parser.parse_args()
    ((runtime, precision),) = chosen_setups([asked.device_runtime], [asked.precision])
    device = Device(runtime, precision, cpu_count(), machine())
    here = {"machine": device.machine, "threads": str(device.threads), "runtime": runtime, "precision": precision}
    done: list[dict[str, str]] = []
    if asked.output.exists():
        with open(asked.output, encoding="utf-8", newline="") as handle:
            done = list(csv.DictReader(handle))
    networks = drawn(asked.count, asked.frames, asked.sizes, asked.seed)
    for number, (c, size) in enumerate(networks, 1):
        if any({**row, **here, "network": c.name, "pixels": str(size)} == row for row in done):
            continue
        times, counted = latencies(device, c.frame, size, MIX, asked.rounds), operations(c.frame, size, MIX)
        found = build(Candidate(c, size, times.of(c), times.base, counted.of(c), 0.0), device, asked.rounds)
        row = fitted_row(found)
        del row["promise"]
        done.append({**here, **{key: str(value) for key, value in row.items()}})
        write_rows(asked.output, done)
        say(f"{number} of {len(networks)}: {row}")
    drawn_here = {(c.name, str(size)) for c, size in networks}
    shown = [row for row in done if {**row, **here} == row and (row["network"], row["pixels"]) in drawn_here]
    errors = np.array([float(row["error"].rstrip("%")) for row in shown])
    near = int((abs(errors) <= 100 * NEAR).sum())
    clock = sum(abs(float(row["predicted_ms"]) / float(row["measured_ms"]) - 1) <= NEAR for row in shown)
    print(f"{near} of {len(errors)} predictions are within {NEAR:.0%} of what was measured; median error ", end="")
    print(f"{np.median(errors):+.1f} %, of its size {np.median(abs(errors)):.1f} %, largest {abs(errors).max():.1f} %")
    print(f"by the clock alone, without the machine's speed, {clock} are")


if __name__ == "__main__":
    main()
