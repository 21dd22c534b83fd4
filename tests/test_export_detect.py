"""Detectors as files: whole where the format can, and the same objects; int8 with its drop in AP; what cannot be."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextvit import export, load
from nextvit.cli import main
from nextvit.data import objects
from nextvit.data.scenes import compose, scenes_folder
from nextvit.detector import Padded
from nextvit.errors import ParityError, UserError
from nextvit.exporters.calibration import read_calibration
from nextvit.exporters.object_parity import BOUNDS, compared
from nextvit.metadata import Preprocess
from nextvit.networks import as_arrays
from nextvit.weights import save_weights
from tests.conftest import nextvit_here
from tests.detectors import lively, noise

LABELS = ("top", "trousers", "dress", "footwear", "bag")


@pytest.fixture(scope="module")
def model():
    found = lively(classes=5, size=(128, 160))
    p = found.metadata.preprocess
    preprocess = Preprocess(128, 1.0, "bilinear", p.mean, p.std, long_side=160)
    found.metadata = replace(found.metadata, labels=LABELS, preprocess=preprocess)
    return found


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """(ending, dynamic) -> file and report, each written once."""
    folder, kept = tmp_path_factory.mktemp("files"), {}

    def written(ending, dynamic=True, **how):
        key = ending, dynamic, *how.items()
        if key not in kept:
            path = folder / f"{len(kept)}{ending}"
            kept[key] = (path, export(model, path, dynamic=dynamic, **how))
        return kept[key]

    return written


WHOLE = [(".onnx", True)]
SLOW = [(".xml", True), (".xml", False), (".onnx", False), (".pt2", True), (".pt2", False)]


@pytest.mark.parametrize(
    ("ending", "dynamic"), [*WHOLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_file_finds_what_the_model_finds(ending, dynamic, model, files):
    path, report = files(ending, dynamic)
    assert report.parity.ok
    assert report.parity.live
    assert report.parity.agreement >= 99.5
    assert (len(report.parity.rows) > 1) == dynamic
    predictor = load(path, trust=True)
    assert (predictor.task, predictor.metadata.fixed_sides) == ("detect", not dynamic)
    assert predictor.metadata.outputs == ("boxes", "labels", "scores", "masks")
    sizes = [(128, 128)] + ([(65, 129), (160, 112), (101, 203)] if dynamic else [])
    for size in sizes:
        image = noise(size)
        with torch.inference_mode():
            (ours,) = as_arrays(Padded(model)(image))
        (theirs,) = predictor.run(image.numpy())
        assert {name: theirs[name].dtype for name in theirs} == {
            "boxes": np.float32, "labels": np.int64, "scores": np.float32, "masks": np.float32}  # fmt: skip
        row = compared(ours, theirs, BOUNDS["fp32"], size)
        assert row.matched >= 0.98 * row.detections > 90, size
        assert row.max_mask < 1e-3
    if dynamic:
        both = predictor.run(np.concatenate([image.numpy()] * 2))
        assert len(both) == 2
        np.testing.assert_array_equal(both[0]["boxes"], both[1]["boxes"])
    scene = Image.fromarray(compose("val", 1).image[:150])
    found = predictor.predict([scene])[0]
    assert found.size == (150, 192)
    assert len(found) > 10


@pytest.mark.parametrize("ending", [".onnx", pytest.param(".xml", marks=pytest.mark.slow)])
def test_the_example_beside_a_file_runs_by_itself(ending, files):
    path, _ = files(ending)
    folder = path.with_name(f"{path.name}.example")
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as expected" in done.stdout
    expected = json.loads((folder / "expected.json").read_text())
    kept = json.dumps(expected)
    expected["labels"] = [(label + 1) % 5 for label in expected["labels"]]
    (folder / "expected.json").write_text(json.dumps(expected))
    assert subprocess.run([sys.executable, folder / "run.py"], capture_output=True).returncode == 1
    (folder / "expected.json").write_text(kept)


@pytest.mark.slow
def test_a_file_that_finds_something_else_is_not_kept(model, tmp_path, monkeypatch):
    from nextvit.exporters import onnx as writer

    honest = writer.onnx_graph

    def spoilt(job, **how):
        graph = honest(job, **how)
        for tensor in graph.graph.initializer:
            if tensor.name.endswith("fc_reg.weight"):
                values = np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.5)
                tensor.raw_data = values.tobytes()
                return graph
        raise AssertionError("there is no such weight")

    monkeypatch.setattr(writer, "onnx_graph", spoilt)
    with pytest.raises(ParityError, match="objects on 16 images where the model finds"):
        export(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_fresh_networks_are_exported_with_a_note(tmp_path, capsys):
    command = ["export", "FILE", "--to", "onnx", "--output", str(tmp_path / "m.onnx")]
    from nextvit import create_model

    fresh = create_model("nextvit_nano", task="detect", num_classes=30)
    fresh.metadata = replace(fresh.metadata, preprocess=replace(fresh.metadata.preprocess, image_size=96, long_side=96))
    save_weights(tmp_path / "m.safetensors", fresh.state_dict(), fresh.metadata)
    command[1] = str(tmp_path / "m.safetensors")
    assert main(command) == 0
    assert "hardly any objects" in capsys.readouterr().out


PARTS = [".pte", ".mlpackage", ".aoti.pt2", ".aimodel", ".engine"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", PARTS)
def test_other_formats_hold_backbone_and_pyramid_and_say_so(ending, model, files):
    path, report = files(ending, False)
    assert any("backbone and feature pyramid alone" in note for note in report.notes)
    if report.parity is None:
        assert report.not_run
        return
    assert report.parity.ok
    if ending == ".engine":
        return
    predictor = load(path, trust=True)
    assert predictor.metadata.gives_maps
    image = noise((128, 128))
    with torch.inference_mode():
        expected = model.neck(model.backbone(image))
    (found,) = predictor.run(image.numpy())
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for ours, theirs in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-3 * float(ours.abs().max()), rtol=0)
    with pytest.raises(UserError, match="backbone and feature pyramid alone"):
        predictor.predict([Image.new("RGB", (40, 40))])
    done = nextvit_here("eval", path, "demo", *(["--trust"] if path.name.endswith(".pt2") else []))
    assert done.returncode == 2
    assert "backbone and feature pyramid alone" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "precision"), [(".onnx", "fp16"), (".xml", "fp16"), (".xml", "bf16")])
def test_half_precisions_find_most_of_it(ending, precision, files):
    from nextvit.errors import NotHere

    try:
        _, report = files(ending, precision=precision)
    except NotHere:
        pytest.skip("this CPU has no bf16")
    assert report.parity.agreement >= BOUNDS[precision].agreement


def test_calibration_tells_of_objects_that_it_leaves_out(model, tmp_path):
    shutil.copytree(scenes_folder(40, 4) / "coco", tmp_path / "mine")
    file = next((tmp_path / "mine" / "annotations").glob("instances_train*.json"))
    whole = json.loads(file.read_text())
    whole["annotations"][3]["bbox"] = [5, 5, -4, 9]
    file.write_text(json.dumps(whole))
    found = read_calibration(tmp_path / "mine", model, model.metadata)
    assert [note for note in found.notes if "1 entries of train are left out" in note and "-4 x 9 pixels" in note]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".xml", ".onnx"])
def test_int8_of_a_size_below_the_least_open_one_takes_images_of_any_shape(ending, model, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "scenes_folder", lambda: scenes_folder(40, 4))
    model = copy.deepcopy(model)
    model.metadata = model.metadata.with_image_size(64)
    report = export(model, tmp_path / f"m{ending}", precision="int8", calibration="demo", max_drop=None)
    assert any("leaves them open from 65 pixels up only" in note for note in report.notes)
    assert len(load(tmp_path / f"m{ending}").predict([Image.new("RGB", (300, 100), "red")])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".xml", ".onnx"])
def test_int8_tells_its_ap_beside_the_float_models(ending, model, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "scenes_folder", lambda: scenes_folder(40, 4))
    report = export(model, tmp_path / f"m{ending}", precision="int8", calibration="demo", max_drop=None, dynamic=False)
    assert report.accuracy.metric == "box AP"
    assert report.accuracy.images == 4
    assert report.accuracy.agreement > 20
    found = load(tmp_path / f"m{ending}").predict([Image.fromarray(compose("val", 0).image)])[0]
    assert len(found) > 10
    assert (tmp_path / f"m{ending}").exists()
