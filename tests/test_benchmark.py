"""The benchmark states its error, and keeps to it."""

import csv
import time

import numpy as np
import pytest

from nextvit.benchmark import CONFIDENCE, benchmark, fewest_rounds, median_interval
from nextvit.errors import UserError
from nextvit.metadata import Metadata, Preprocess
from nextvit.runtime.session import Setup
from tests.conftest import nextvit, nextvit_here


class Clock:
    """Time that passes only while a session computes, on a machine that is now fast, now slow."""

    def __init__(self, seed: int = 0):
        self.now = 0.0
        self.rng = np.random.default_rng(seed)

    def __call__(self) -> float:
        return self.now

    def compute(self, seconds: float) -> None:
        state = 1.6 if int(self.now / 0.7) % 3 == 0 else 1.0  # a neighbour comes and goes
        self.now += seconds * state * self.rng.uniform(0.8, 1.2)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Busy:
    """A session that computes for a given time."""

    fixed_batch = None

    def __init__(self, seconds: float, clock: Clock):
        self.seconds, self.clock = seconds, clock
        self.metadata = Metadata("nextvit_nano", preprocess=Preprocess(32))
        self.setup = Setup("busy", "cpu", "fp32", 1)

    def __call__(self, batch):
        self.clock.compute(self.seconds)
        return np.zeros((len(batch), 1))


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (10, 20, 31):
        values = rng.lognormal(0, 1, (4000, n))  # its median is 1
        inside = np.mean([low <= 1 <= high for low, _, high in map(median_interval, values)])
        assert CONFIDENCE - 0.004 <= inside <= 1


def test_too_few_rounds_for_an_interval_are_refused(clock):
    assert fewest_rounds() == 8
    with pytest.raises(UserError, match="needs 8 rounds or more, not 7"):
        benchmark([("a", Busy(1e-4, clock))], rounds=7)


def test_a_session_measured_against_itself_differs_no_more_often_than_stated(monkeypatch):
    found = 0
    for seed in range(300):
        clock = Clock(seed)
        monkeypatch.setattr(time, "perf_counter", clock)
        same = Busy(0.02, clock)
        _, again = benchmark([("a", same), ("again", same)], rounds=15, seed=seed)
        found += again.differs
        assert again.ratio == pytest.approx(1, abs=0.3)
    assert found <= 9, "3 are expected of 300; more than 9 has a probability of one in a thousand"


def test_a_session_that_is_slower_is_found_slower_by_its_factor(clock):
    first, slower = benchmark([("a", Busy(0.002, clock)), ("b", Busy(0.003, clock))], rounds=20)
    assert slower.differs
    assert slower.ratio == pytest.approx(1.5, rel=0.1)
    assert slower.ratio_low <= 1.5 <= slower.ratio_high
    assert 2 <= first.median_ms <= 3.2
    assert first.p25_ms <= first.median_ms <= first.p75_ms
    assert first.images_per_s == pytest.approx(1e3 / first.median_ms)


def test_a_row_for_each_batch_is_compared_image_by_image(clock):
    class Each(Busy):  # 2 ms an image
        def __call__(self, batch):
            for _ in batch:
                super().__call__(batch)
            return batch

    one, four = benchmark([("a", Each(0.002, clock))], batches=[1, 4], rounds=10)
    assert (one.batch, four.batch) == (1, 4)
    assert four.median_ms == pytest.approx(4 * one.median_ms, rel=0.25)
    assert four.ratio == pytest.approx(1, abs=0.2)
    assert four.images_per_s == pytest.approx(4e3 / four.median_ms)
    with pytest.raises(UserError, match="batch size must be 1 or more, not 0"):
        benchmark([("a", Each(0.002, clock))], batches=[0])


def test_the_command_prints_a_row_for_each_runtime_with_threads_and_precision(tmp_path):
    output = tmp_path / "b.csv"
    done = nextvit(
        "benchmark", "nextvit_nano", "--runtimes", "eager,folded,onnx,openvino",
        "--image-size", 64, "--rounds", 8, "--threads", 1, "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["runtime"].split(" ")[0] for row in rows] == ["torch", "torch", "onnxruntime", "openvino"]
    assert ["eager" in rows[0]["runtime"], "folded" in rows[1]["runtime"]] == [True, True]
    assert {(row["precision"], row["threads"], row["batch"], row["image_size"]) for row in rows} == {
        ("fp32", "1", "1", "64")
    }
    assert output.with_suffix(".png").stat().st_size > 5000
    for row in rows:
        assert row["runtime"] in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runtimes", "tensorflow"], "no runtime 'tensorflow'; take of eager, folded, onnx, openvino"),
        (["--precision", "fp8"], "no precision 'fp8'"),
        (["--rounds", "3"], "8 rounds or more"),
        (["--device", "cuda"], "no device 'cuda' here"),
        (["--image-size", "8"], "image-size"),
    ],
)
def test_arguments_that_will_not_do_are_refused(flags, message):
    done = nextvit_here("benchmark", "nextvit_nano", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
