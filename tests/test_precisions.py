"""fp16, bf16 and int8 files: what they compute in, what they cost in accuracy, and calibration that will not do."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextvit
from nextvit.create import open_checkpoint
from nextvit.data.demo_images import garments
from nextvit.errors import AccuracyError, UserError
from nextvit.exporters.calibration import read_calibration
from nextvit.exporters.openvino import layers_run
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.runtime.open import open_session
from nextvit.runtime.openvino_session import core
from nextvit.train import train
from tests.conftest import fill, nextvit_here

BF16 = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def model(garment_folder, tmp_path_factory):
    """A network that has learnt something: three classes, 48 images."""
    run = tmp_path_factory.mktemp("learnt") / "run"
    steps = ["schedule.epochs=2", "schedule.steps_per_epoch=36", "schedule.warmup_epochs=0.5"]
    recipe = read_recipe("default", ["images.size=32", "batch_size=8", "optimizer.lr=2e-3", *steps])
    assert train(garment_folder, recipe, run, machine=Machine(threads=1, workers=0)).metrics.top1 > 60
    return open_checkpoint(run / "model.safetensors")


@pytest.fixture(scope="module", params=[".xml", pytest.param(".onnx", marks=pytest.mark.slow)])
def int8(request, model, garment_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / f"m{request.param}"
    return path, nextvit.export(model, path, precision="int8", calibration=garment_folder, max_drop=None)


@pytest.mark.parametrize(
    ("ending", "precision"), [(".onnx", "fp16"), pytest.param(".xml", "fp16", marks=pytest.mark.slow), (".xml", "bf16")]
)
def test_half_precision_files_agree_within_their_bound(ending, precision, model, tmp_path):
    if precision == "bf16" and not BF16:
        with pytest.raises(UserError, match="does not compute in bf16"):
            nextvit.export(model, tmp_path / f"m{ending}", precision=precision)
        assert not list(tmp_path.iterdir())
        return
    report = nextvit.export(model, tmp_path / f"m{ending}", precision=precision, dynamic=ending == ".xml")
    assert report.parity.ok
    assert report.parity.live
    assert report.parity.max_abs > 1e-6, "a file in half precision does not answer to the last digit"
    share = report.bytes / (4 * sum(p.numel() for p in model.parameters()))
    assert share < 0.6 if precision == "fp16" else share > 0.9
    assert nextvit.load(tmp_path / f"m{ending}").metadata.precision == precision


def test_int8_is_small_and_keeps_the_answers(int8, model):
    path, report = int8
    assert report.accuracy.metric == "top-1"
    assert report.accuracy.images == 12
    assert report.accuracy.agreement >= 90
    assert report.bytes < 0.45 * 4 * sum(p.numel() for p in model.parameters())
    predictor = nextvit.load(path)
    assert predictor.session.setup.precision == "int8"
    assert predictor.labels == ["bag", "sandal", "trouser"]
    with pytest.raises(UserError, match="precision out"):
        nextvit.load(path, precision="fp32")
    beside = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert beside["accuracy"]["drop"] == pytest.approx(report.accuracy.drop)
    assert beside["float_layers"] == list(report.float_layers)


def test_grouped_convolutions_run_in_int8(int8):
    """By the runtime's own report; read from ONNX as they are, NNCF leaves all of them in float."""
    path, report = int8
    if path.suffix == ".xml":
        convolutions = {layer: kernel for layer, kind, kernel in layers_run(path) if kind == "Convolution"}
        kernels = {layer: kernel for layer, kernel in convolutions.items() if "group_conv3x3/Conv" in layer}
        assert len(kernels) == sum(
            m.__class__.__name__ == "MHCA" for m in nextvit.create_model("nextvit_nano").modules()
        )
        assert {kernel.lower()[-2:] for kernel in kernels.values()} == {"i8"}
        assert report.float_layers == ()


def test_each_size_is_compiled_once_and_the_last_few_are_kept(int8):
    path, _ = int8
    if path.suffix == ".xml":
        session = open_session(path)
        for side in (32, 64, 96, 32, 128, 160, 32):
            session(np.zeros((1, 3, side, side), np.float32))
        assert [shape[2] for shape in session._kept] == [96, 128, 160, 32]


def misled(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """Images to calibrate with; ranges are then taken from nearly black ones, and are far too small for these."""
    from nextvit.exporters import export as module

    images = [tile for tiles in garments("val").values() for tile in tiles[:12]]
    dark = [tile.point(lambda value: value // 64) for tile in images]
    honest = module.read_calibration

    def read(_: object, network: object, metadata: object, *, tune: bool) -> object:
        wrong = honest(dark, network, metadata, tune=tune).calibrate
        return replace(honest(images, network, metadata, tune=tune), calibrate=wrong)

    monkeypatch.setattr(module, "read_calibration", read)
    return images


@pytest.mark.slow
def test_accuracy_that_is_lost_is_won_back_or_nothing_is_written(model, tmp_path, monkeypatch):
    from nextvit.exporters import openvino as writer

    images = misled(monkeypatch)
    poor = nextvit.export(model, tmp_path / "poor.xml", precision="int8", calibration=images, max_drop=None)
    assert poor.accuracy.drop > 2
    assert poor.accuracy.metric == "agreement"
    monkeypatch.setattr(writer, "INT8", replace(writer.INT8, plans=lambda *_: iter(())))
    with pytest.raises(AccuracyError, match=r"loses [\d.]+ points of agreement on 24 images, and at most 0.5"):
        nextvit.export(model, tmp_path / "m.xml", precision="int8", calibration=images, max_drop=0.5)
    assert {path.name for path in tmp_path.iterdir()} == {
        "poor.xml",
        "poor.bin",
        "poor.xml.json",
        "poor.xml.example",
    }


@pytest.mark.slow
def test_sensitive_layers_go_back_to_float_and_are_named(model, tmp_path, monkeypatch):
    images = misled(monkeypatch)
    report = nextvit.export(model, tmp_path / "m.xml", precision="int8", calibration=images, max_drop=0.5)
    assert report.accuracy.drop <= 0.5
    assert any("stages" in layer or "stem" in layer for layer in report.float_layers)


@pytest.mark.slow
def test_sensitive_parts_stay_float_in_onnx_and_what_that_cannot_mend_is_not_written(model, tmp_path, monkeypatch):
    """NNCF restores no accuracy in ONNX graphs, so parts are left out; ranges as wrong as these nothing mends."""
    from nextvit.exporters import onnx as writer

    images, tried, honest = misled(monkeypatch), [], writer.quantize

    def quantize(graph, calibration, plan):
        tried.append((plan.float_parts, honest(graph, calibration, plan)))
        return tried[-1][1]

    monkeypatch.setattr(writer, "quantize", quantize)
    with pytest.raises(AccuracyError, match="loses"):
        nextvit.export(model, tmp_path / "m.onnx", precision="int8", calibration=images, max_drop=0.5)
    assert not list(tmp_path.iterdir())
    assert len(tried) == 5
    for parts, graph in tried[2:]:
        assert parts
        rounded = {out for node in graph.graph.node if node.op_type == "DequantizeLinear" for out in node.output}
        of_parts = [
            n for n in graph.graph.node if n.op_type == "Conv" and n.name.startswith(tuple(f"{p}." for p in parts))
        ]
        assert of_parts
        assert not [node.name for node in of_parts if rounded & set(node.input)]


# ---- calibration -----------------------------------------------------------------------------------------------------


def save(folder: Path, images: list[Image.Image]) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index:03}.png")
    return folder


def test_calibration_images_that_will_not_do_are_refused(model, tmp_path):
    tiles = garments("train")["bag"]
    few = save(tmp_path / "few", tiles[:20])
    same = save(tmp_path / "same", [tiles[0]] * 60)
    bad = tmp_path / "bad"
    bad.mkdir()
    for index in range(50):
        (bad / f"{index}.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (few, "has 16 images to calibrate on and 4 to measure on; int8 needs 32"),
        (same, "all calibration images are the same"),
        (bad, "has 0 images to calibrate on"),
        (tmp_path / "empty", "has 0 images"),
        (tmp_path / "missing", "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            nextvit.export(model, tmp_path / "m.xml", precision="int8", calibration=folder)
    assert not (tmp_path / "m.xml").exists()


def test_what_is_odd_about_the_images_is_said(model, garment_folder, tmp_path):
    good = read_calibration(garment_folder, model, model.metadata)
    assert good.notes == ()
    assert (len(good.calibrate), len(good.measure)) == (48, 12)
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 40, 3), dtype=np.uint8)
    strange = read_calibration([image // 32 for image in noise], model, model.metadata)
    assert "unlike those that the model was trained on" in strange.notes[0]
    mixed = save(tmp_path / "mixed" / "shoes", garments("train")["sneaker"][:50])
    (mixed / "broken.png").write_text("no image")
    found = read_calibration(tmp_path / "mixed", model, model.metadata)
    assert found.measure.targets is None
    assert "'shoes' that the model does not know" in found.notes[0]
    assert "1 images could not be read" in found.notes[1]


def test_precision_and_calibration_must_fit_each_other(tmp_path):
    model = fill(nextvit.create_model("nextvit_nano", num_classes=3))
    with pytest.raises(UserError, match="int8 needs calibration images"):
        nextvit.export(model, tmp_path / "m.xml", precision="int8")
    with pytest.raises(UserError, match="int8 alone takes calibration images"):
        nextvit.export(model, tmp_path / "m.xml", calibration="demo")
    with pytest.raises(UserError, match="onnx files are fp32, fp16, int8, not 'bf16'"):
        nextvit.export(model, tmp_path / "m.onnx", precision="bf16")
    done = nextvit_here("export", "nextvit_nano", "--to", "openvino", "--precision", "int4")
    assert (done.returncode, "openvino files are fp32, fp16, bf16, int8" in done.stderr) == (2, True)
    done = nextvit_here("export", "nextvit_nano", "--to", "tflite")
    assert (done.returncode, "there is no format 'tflite'" in done.stderr) == (2, True)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_files_that_are_closed_in_any_order_leave_signals_alone(precision, small_file, tmp_path):
    """A core of OpenVINO brings a signal stack; several that go in the wrong order let the next signal kill us."""
    script = (
        "import faulthandler, signal, subprocess, sys\n"
        "import nextvit\n"
        "faulthandler.enable()  # as pytest and notebooks have it\n"
        "if sys.argv[2] == 'int8':\n"
        "    model = nextvit.create_model('nextvit_nano', num_classes=3)\n"
        "    kw = {'precision': 'int8', 'calibration': 'demo', 'max_drop': None}\n"
        "    nextvit.export(model, sys.argv[1], image_size=32, **kw)\n"
        "open_files = [nextvit.load(sys.argv[1]) for _ in range(4)]\n"
        "while open_files:\n"
        "    del open_files[0]\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "subprocess.run(['true'])\n"
        "print('alive')\n"
    )
    command = [sys.executable, "-c", script, small_file(".xml", tmp_path), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_activations_that_hardly_vary_end_nothing(suffix, garment_folder, tmp_path, capfd):
    """A fresh network has such: NNCF's histograms have no bins for them."""
    model = fill(nextvit.create_model("nextvit_nano", num_classes=3))
    with torch.no_grad():
        model.stages[1].blocks[0].mlp.fc1.weight.mul_(1e-7)  # the last digits of what is 1 vary
        model.stages[1].blocks[0].mlp.fc1.bias.fill_(1.0)
    model.metadata = model.metadata.with_image_size(32)
    report = nextvit.export(model, tmp_path / f"a{suffix}", precision="int8", calibration=garment_folder, max_drop=None)
    assert "hardly vary over the calibration images" in capfd.readouterr().err
    assert report.checked.finite
