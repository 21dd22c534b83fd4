"""Exported segmentation networks: whole, at free sizes and fixed ones, giving logits or classes, in float and int8."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextvit import export, load
from nextvit.create import create_model
from nextvit.data import masks, scenes
from nextvit.data.masks import IGNORED
from nextvit.data.scenes import GROUPS
from nextvit.errors import UserError
from nextvit.exporters import calibration
from nextvit.exporters.calibration import read_calibration
from nextvit.exporters.form import ClassMap, stage_outputs
from nextvit.heads.units import resized
from nextvit.metadata import Preprocess
from nextvit.metrics import PixelConfusion
from nextvit.weights import save_weights
from tests.conftest import fill, nextvit_here

CLASSES = 6
SMALL = Preprocess(image_size=64, crop=1.0, interpolation="bilinear", long_side=256)


def network(head: str = "fpn", name: str = "nextvit_nano"):
    model = fill(create_model(name, task="segment", head=head, num_classes=CLASSES))
    with torch.no_grad():  # so that answers differ from pixel to pixel and from class to class
        model.decode_head.conv_seg.weight.mul_(4)
    model.metadata = replace(model.metadata, labels=("background", *GROUPS), preprocess=SMALL)
    return model


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture
def image():
    return Image.fromarray(scenes.compose("val", 0).image[:150, :190])


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """What an ending and flags were written to, once: path, report."""
    folder, kept = tmp_path_factory.mktemp("files"), {}

    def written(ending, **how):
        key = (ending, *how.items())
        if key not in kept:
            path = folder / f"{len(kept)}{ending}"
            kept[key] = (path, export(model, path, **how))
        return kept[key]

    return written


RUNNABLE = (".onnx", ".xml", ".pt2", ".pte", ".aoti.pt2")
QUICK = ((".onnx", True, False), (".xml", False, True))  # ending, dynamic, class_map


@pytest.mark.parametrize(
    ("ending", "dynamic", "class_map"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(RUNNABLE, (True, False), (True, False))
    ],
)
def test_a_file_answers_as_the_model_does(ending, dynamic, class_map, model, files, image):
    path, report = files(ending, dynamic=dynamic, class_map=class_map)
    assert report.parity.ok
    assert report.parity.live
    assert report.parity.top1_agreement >= 99.9
    assert len({(row.height, row.width) for row in report.parity.rows}) == (3 if dynamic else 1)
    predictor = load(path, trust=True)
    assert predictor.metadata.fixed_sides == (not dynamic)
    sizes = [(1, 64, 64)] + ([(2, 96, 72), (1, 65, 130)] if dynamic else [])
    for batch, height, width in sizes:
        x = np.random.default_rng(0).standard_normal((batch, 3, height, width), np.float32)
        with torch.inference_mode():
            expected = (ClassMap(model) if class_map else model)(torch.from_numpy(x)).numpy()
        found = predictor.run(x)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if class_map:
            assert (found == expected).mean() > 0.999
        else:
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    classes = predictor.predict([image])[0].classes
    assert classes.shape == (150, 190)
    if dynamic and not class_map:
        assert (classes == load_eager(model, path.parent).predict([image])[0].classes).mean() > 0.999
    if not dynamic:
        with pytest.raises(UserError, match="takes 64 x 64 pixels and no other size"):
            predictor.run(np.zeros((1, 3, 64, 96), np.float32))


def load_eager(model, folder):
    path = folder / "eager.safetensors"
    if not path.exists():
        save_weights(path, model.state_dict(), model.metadata)
    return load(path)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "name"), [("upernet", "nextvit_nano"), ("fpn", "timm:resnet18")])
def test_other_heads_and_backbones_are_exported_with_free_sizes(head, name, tmp_path):
    report = export(network(head, name), tmp_path / "m.onnx")
    assert report.parity.top1_agreement >= 99.9
    assert report.parity.relative < 1e-5


@pytest.mark.parametrize(("ending", "dynamic", "class_map"), QUICK)
def test_the_example_beside_a_file_runs_by_itself(ending, dynamic, class_map, files):
    path, _ = files(ending, dynamic=dynamic, class_map=class_map)
    folder = path.with_name(f"{path.name}.example")
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100.00 % of the pixels as expected" in done.stdout
    wrong = np.asarray(Image.open(folder / "classes.png"))
    Image.fromarray(wrong ^ 1).save(folder / "classes.png")
    assert subprocess.run([sys.executable, folder / "run.py"], capture_output=True).returncode == 1


def test_eval_of_a_file_gives_what_the_weights_give(files, model, tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "scenes_folder", lambda: scenes.scenes_folder(6, 3))
    told = []
    load_eager(model, tmp_path)
    exported, _ = files(".onnx", dynamic=True, class_map=False)
    for path in (exported, tmp_path / "eager.safetensors"):
        done = nextvit_here("eval", path, "demo", "--json")
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout)["miou"])
    assert told[0] == pytest.approx(told[1], abs=0.02)
    classes, _ = files(".xml", dynamic=False, class_map=True)
    assert nextvit_here("eval", classes, "demo").returncode == 0
    done = nextvit_here("eval", classes, "demo", "--flip")
    assert done.returncode == 2
    assert "views of an image cannot be averaged" in done.stderr


def test_the_last_of_the_stages_is_what_the_segmenter_gives(model):
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(stage_outputs(model, x)[-1], model(x))


@pytest.mark.slow
def test_stages_say_where_a_file_goes_wrong(model, tmp_path):
    report = export(model, tmp_path / "m.onnx", dynamic=False, stages=True)
    assert [stage.name for stage in report.stages] == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "logits"]
    assert max(stage.relative for stage in report.stages) < 1e-4


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(masks, "scenes_folder", lambda: scenes.scenes_folder(40, 12))


def test_images_to_calibrate_on_are_centres_with_the_labels_of_the_same_pixels(model, few):
    found = read_calibration("demo", model, model.metadata)
    assert (len(found.calibrate), len(found.measure)) == (40, 12)
    assert found.measure[3].shape == (1, 3, 64, 64)
    truth = found.measure.truth
    assert truth.shape == (12, 64, 64)
    labels = found.measure.truths.labelled(3)[1]
    np.testing.assert_array_equal(truth[3], labels[::3, ::3])  # 192 to 64 pixels, by the upper left corner
    assert set(np.unique(truth)) <= {*range(CLASSES), IGNORED}


def test_masks_of_other_classes_are_not_calibrated_on(model, tmp_path):
    for number in range(40):
        for folder, picture in (
            ("images", scenes.compose("val", number).image),
            ("masks", np.zeros((192, 192), np.uint8)),
        ):
            path = tmp_path / "train" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    (tmp_path / "labels.txt").write_text("one\ntwo")
    found = read_calibration(str(tmp_path), model, model.metadata)
    assert (len(found.calibrate), len(found.measure)) == (32, 8)
    assert all(source.parent.name == "images" for source in (*found.calibrate.sources, *found.measure.sources))


@pytest.mark.parametrize("ending", [".xml", pytest.param(".onnx", marks=pytest.mark.slow),
                                    pytest.param(".pte", marks=pytest.mark.slow)])  # fmt: skip
def test_int8_is_measured_in_miou(ending, model, few, tmp_path):
    path = tmp_path / f"m{ending}"
    report = export(model, path, precision="int8", calibration="demo", max_drop=None, dynamic=False)
    a = report.accuracy
    assert (a.metric, a.images) == ("mIoU", 12)
    counted = PixelConfusion(CLASSES)
    images = read_calibration("demo", model, replace(model.metadata)).measure
    for index, truth in enumerate(images.truth):
        with torch.inference_mode():
            logits = resized(model(torch.from_numpy(images[index])), (64, 64))[0]
        counted.update(logits.argmax(0).numpy(), truth)
    assert a.float_value == pytest.approx(counted.miou, abs=0.01)
    assert a.agreement > 60, "of random weights"
    assert load(path).metadata.precision == "int8"


@pytest.mark.slow
def test_int8_gives_accuracy_back_where_too_much_is_lost(model, few, tmp_path):
    report = export(model, tmp_path / "m.xml", precision="int8", calibration="demo", max_drop=1.0, dynamic=False)
    assert report.accuracy.drop <= 1.0


@pytest.mark.slow
def test_without_masks_the_float_model_is_what_counts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FEWEST", 4)
    for index in range(10):
        Image.fromarray(scenes.compose("val", index).image).save(tmp_path / f"{index}.png")
    report = export(
        model, tmp_path / "m.xml", precision="int8", calibration=str(tmp_path), max_drop=None, dynamic=False
    )
    assert report.accuracy.metric == "agreement"
    assert any("no known masks" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("class_map", [False, True])
@pytest.mark.parametrize(
    ("ending", "precision"), [(".mlpackage", "fp16"), (".mlpackage", "fp32"), (".aimodel", "fp32"), (".engine", "fp16")]
)
def test_formats_that_do_not_run_here_are_written(ending, precision, class_map, model, tmp_path):
    path = tmp_path / f"m{ending}"
    report = export(model, path, precision=precision, dynamic=False, class_map=class_map)
    assert report.not_run
    assert Path(report.path).name == path.name
