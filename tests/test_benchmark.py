"""The benchmark states its error, and keeps to it."""

import csv
import json
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from nextvit import create_model, export, load, pipeline
from nextvit.benchmark import CONFIDENCE, benchmark, fewest_rounds, median_interval
from nextvit.errors import UserError
from nextvit.exporters.parity import real_images
from nextvit.metadata import Metadata, Preprocess
from nextvit.runtime.session import Setup
from nextvit.runtime.torch_session import TorchSession
from tests.conftest import fill, nextvit_here


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


def test_a_call_without_copies_answers_as_one_with_them(tmp_path):
    model = fill(create_model("nextvit_nano"))
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    eager = TorchSession(model, device="cpu", threads=1, precision="fp32")
    assert np.array_equal(eager.resident(images)().numpy(), eager(images))
    onnx = load(export(model, tmp_path / "nano.onnx", image_size=64).path, device="cpu").session
    (found,) = onnx.resident(images)()
    assert np.array_equal(found.numpy(), onnx(images))


class Far(Busy):
    """A session on a device with a memory of its own, a copy to which takes as long as what is computed there."""

    def __init__(self, seconds: float, clock: Clock):
        super().__init__(seconds, clock)
        self.setup = Setup("far", "cuda", "fp32", 1)

    def __call__(self, batch):
        self.clock.compute(self.seconds)
        return super().__call__(batch)

    def resident(self, batch):
        return partial(super().__call__, batch)


def test_copies_are_left_out_where_there_are_any(clock):
    sessions = [("near", Busy(0.01, clock)), ("far", Far(0.01, clock))]
    for resident, ratio in ((False, 2.0), (True, 1.0)):
        assert benchmark(sessions, rounds=60, resident=resident)[1].ratio == pytest.approx(ratio, rel=0.1)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@CUDA
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recorded_kernels_answer_as_the_network_for_every_shape(precision):
    model = fill(create_model("nextvit_nano"))
    eager, graph = (
        TorchSession(model, device="cuda", threads=None, precision=precision, kind=kind) for kind in ("eager", "graph")
    )
    rng = np.random.default_rng(0)
    for shape in ((1, 3, 64, 64), (4, 3, 96, 64), (1, 3, 64, 64)):
        images = rng.standard_normal(shape, np.float32)
        found, wanted = graph(images), eager(images)
        assert np.abs(found - wanted).max() < {"fp32": 1e-4, "fp16": 2e-2}[precision] * np.abs(wanted).max()
    assert benchmark([("graph", graph)], rounds=8, image_size=64, resident=True)[0].median_ms > 0


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_runtime_with_threads_and_precision(tmp_path):
    output = tmp_path / "b.csv"
    done = nextvit_here(
        "benchmark", "nextvit_nano", "--runtimes", "eager,folded,openvino",
        "--image-size", 64, "--rounds", 8, "--threads", 1, "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["runtime"].split(" ")[0] for row in rows] == ["torch", "torch", "openvino"]
    assert ["eager" in rows[0]["runtime"], "folded" in rows[1]["runtime"]] == [True, True]
    assert {(row["precision"], row["threads"], row["batch"], row["image_size"]) for row in rows} == {
        ("fp32", "1", "1", "64")
    }
    assert output.with_suffix(".png").stat().st_size > 5000
    for row in rows:
        assert row["runtime"] in done.stdout


@pytest.mark.slow
def test_memory_and_the_parts_of_an_image_s_time_are_told(tmp_path, garment_folder):
    export(create_model("nextvit_nano"), tmp_path / "n.xml", image_size=64, dynamic=False)
    (garment_folder / "notes.txt").write_text("no image")
    done = nextvit_here(
        "benchmark", tmp_path / "n.xml", "nextvit_small", "--rounds", 8, "--memory",
        "--images", garment_folder, "--output", tmp_path / "b.csv", "--json", "--image-size", 64,
    )  # fmt: skip
    (garment_folder / "notes.txt").unlink()
    assert done.returncode == 0, done.stderr
    nano, small = json.loads(done.stdout)["rows"]
    assert nano["footprint"]["file_mb"] == pytest.approx(
        sum((tmp_path / f"n.{end}").stat().st_size for end in ("xml", "bin")) / 1e6
    )
    assert small["footprint"]["file_mb"] is None
    assert 4.8 * 4 < nano["footprint"]["memory_mb"] < small["footprint"]["memory_mb"] < 1000
    assert small["footprint"]["memory_mb"] > 31.7 * 4, "its weights alone"
    assert 0.01 < nano["footprint"]["load_s"] < 60
    for row in (nano, small):
        assert row["pipeline"]["images"] == 60
        assert all(row["pipeline"][f"{part}_ms"] > 0 for part in ("decode", "preprocess", "forward", "post"))
    with open(tmp_path / "b.csv", newline="") as file:
        assert {"memory_mb", "load_s", "decode_ms"} <= set(next(csv.DictReader(file)))


def test_each_part_of_the_time_stands_in_its_own_column(monkeypatch, clock, tmp_path):
    steps = {"read_image": 0.003, "as_taken": 0.002}
    for name, seconds in steps.items():
        function = getattr(pipeline, name)
        monkeypatch.setattr(
            pipeline, name, lambda *a, f=function, s=seconds: [clock.__setattr__("now", clock.now + s), f(*a)][1]
        )

    class Fixed(Busy):
        def __call__(self, batch):
            assert batch.shape == (1, 3, 64, 64), "of the size that is measured"
            clock.now += self.seconds
            return np.zeros((len(batch), 1000), np.float32)

    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    fast, slow = pipeline.measure_pipelines([Fixed(0.01, clock), Fixed(0.02, clock)], [tmp_path / "a.png"], 64)
    assert (fast.decode_ms, fast.preprocess_ms, fast.forward_ms) == pytest.approx((3, 2, 10))
    assert slow.forward_ms == pytest.approx(20)
    with pytest.raises(UserError, match="none of the 1 files"):
        pipeline.measure_pipelines([Fixed(0.01, clock)], [tmp_path / "missing.png"])


def test_an_int8_file_needs_no_flag_to_be_measured(tmp_path):
    file = tmp_path / "n.xml"
    images = [image.rotate(90 * turn) for turn in range(3) for image in real_images()]
    model = create_model("nextvit_nano", num_classes=5)
    export(model, file, image_size=32, precision="int8", calibration=images, max_drop=None, dynamic=False)
    done = nextvit_here("benchmark", file, "--rounds", 8, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["setup"]["precision"] == "int8"


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_parts_of_a_batch_computed_side_by_side_give_the_same_answers(dynamic, tmp_path, monkeypatch):
    file = tmp_path / "n.xml"
    export(fill(create_model("nextvit_nano", num_classes=5)), file, image_size=64, dynamic=dynamic)
    monkeypatch.setenv("NEXTVIT_OPENVINO_CACHE", str(tmp_path / "cache"))
    one, side_by_side = (load(file, threads=2, hint=hint) for hint in ("latency", "throughput"))
    assert "streams" in side_by_side.session.setup.runtime
    assert list((tmp_path / "cache").glob("*.blob"))
    batch = np.random.default_rng(0).standard_normal((16, 3, 64, 64), dtype=np.float32)
    for count in (16, 1, 3, 5):
        a, b = one.run(batch[:count]), side_by_side.run(batch[:count])
        assert a.shape == b.shape
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max()
        assert len(np.unique(b[:, 0])) == count, "each image has its own answer"
    if not dynamic:
        done = nextvit_here("benchmark", file, "nextvit_nano", "--hint", "latency,throughput", "--rounds", 8, "--json")
        assert ["streams" in row["setup"]["runtime"] for row in json.loads(done.stdout)["rows"]] == [False, True, False]
        assert "left out: nextvit_nano, folded" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--runtimes", "tensorflow"],
            "no runtime 'tensorflow'; take of eager, folded, compiled, graph, onnx, openvino",
        ),
        (["--runtimes", "graph", "--device", "cpu"], "graph records kernels of NVIDIA GPUs, and this is cpu"),
        (["--precision", "fp8"], "no precision 'fp8'"),
        (["--hint", "speed"], "no hint 'speed'; take of latency, throughput"),
        (["--hint", "throughput"], "torch has no throughput hint"),
        (["missing.xml", "--hint", "latency,throughput"], "there is no file missing.xml"),
        (["--images", "missing.jpg"], "none of the 1 files of --images can be read"),
        (["--rounds", "3"], "'--rounds'"),
        (["--device", "cuda"], "no device 'cuda' here"),
        (["--image-size", "8"], "image-size"),
    ],
)
def test_arguments_that_will_not_do_are_refused(flags, message):
    done = nextvit_here("benchmark", "nextvit_nano", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_loader_alone_is_measured(garment_folder, tmp_path):
    flags = ["--workers", "0,1", "--rounds", 8, "--image-size", 32, "--recipe", "in1k_300e"]
    done = nextvit_here("benchmark", "--data", garment_folder, *flags, "--output", tmp_path / "l.csv", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [row["workers"] for row in told["rows"]] == [0, 1]
    assert all(row["p25"] <= row["images_per_s"] <= row["p75"] for row in told["rows"])
    assert told["rows"][0]["ratio"] == 1
    assert told["parts"]["images"] == 48
    assert 0 < told["parts"]["read_ms"] < 50
    assert told["image_size"] == 32
    assert {file.name for file in tmp_path.iterdir()} == {"l.csv", "l.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a model to measure, or --data"),
        (["nextvit_nano", "--data", "demo"], "leave the models out"),
        (["--data", "demo", "--workers", "many"], "--workers takes whole numbers from 0"),
        (["--data", "demo", "--rounds", "2"], "'--rounds'"),
        (["--data", "nowhere"], "there is no folder"),
        (["--data", "demo", "--memory"], "--data goes with --recipe"),
        (["nextvit_nano", "--workers", "1"], "--recipe and --workers go with --data"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(arguments, message):
    done = nextvit_here("benchmark", *arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_a_loader_without_images_is_a_sentence(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(3):
            (tmp_path / label / f"{index}.jpg").write_bytes(b"no image")
    done = nextvit_here("benchmark", "--data", tmp_path)
    assert (done.returncode, "none of the images of" in done.stderr) == (2, True), done.stderr
