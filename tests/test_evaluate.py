"""Figures of an evaluation, counted again by hand."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nextvit import class_names
from nextvit.create import create_model
from nextvit.data.sets import read_split
from nextvit.errors import UserError
from nextvit.evaluate import prepared_for, real_labels
from nextvit.metadata import Metadata
from nextvit.metrics import TopK
from nextvit.weights import save_weights
from tests.conftest import nextvit_here


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (500, 7)), rng.integers(0, 7, 500)
    metrics = TopK(7)
    for start in range(0, 500, 64):
        metrics.update(logits[start : start + 64], targets[start : start + 64])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    expected = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert metrics.calibration_error == pytest.approx(100 * expected)
    assert metrics.reliability[:, 0].sum() == 500


def test_figures_of_parts_add_up_to_those_of_the_whole():
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(0, 3, (90, 7)), rng.integers(0, 7, 90)
    whole, parts = TopK(7), [TopK(7) for _ in range(3)]
    whole.update(logits, targets)
    for rank, part in enumerate(parts):
        part.update(logits[rank::3], targets[rank::3])
    values = [[p.confusion, p.reliability, np.array(p.top5_hits), np.array(p.loss_sum)] for p in parts]
    sums = iter([sum(column) for column in zip(*values, strict=True)])
    parts[0].merge(lambda mine: next(sums))
    for name in ("top1", "top5", "loss", "calibration_error"):
        assert getattr(parts[0], name) == pytest.approx(getattr(whole, name))


@pytest.mark.parametrize(
    ("size", "crop", "resized", "share"),
    [
        (None, None, 256, 0.875),
        (384, "official", 438, 0.875),
        (224, "timm", 235, 0.95),
        (384, "timm", 384, 1.0),
        (192, "0.9", 213, 0.9),
    ],
)
def test_test_sizes_and_crops_by_name(size, crop, resized, share):
    p = prepared_for(Metadata("nextvit_small"), size, crop).preprocess
    assert (p.image_size, p.resize_size, p.crop) == (size or 224, resized, share)


def test_a_sweep_of_sizes_has_a_row_each_and_the_rest_in_files(trained, garment_folder, tmp_path):
    weights = trained / "model.safetensors"
    done = nextvit_here(
        "eval", weights, garment_folder, "--image-size", "32,40,48", "--output", tmp_path / "figures", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [row["preprocess"]["image_size"] for row in told["sizes"]] == [32, 40, 48]
    alone = json.loads(nextvit_here("eval", weights, garment_folder, "--image-size", "48", "--json").stdout)
    assert told["sizes"][2]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert len({row["loss"] for row in told["sizes"]}) == 3, "the sizes are really different"
    with open(tmp_path / "figures" / "sizes.csv", newline="") as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [row["top1"] for row in told["sizes"]]
    with open(tmp_path / "figures" / "classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    assert {row["class"]: float(row["recall"]) for row in classes} == pytest.approx(told["per_class"], abs=1e-3)
    with open(tmp_path / "figures" / "reliability.csv", newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == told["images"] == 12
    assert (tmp_path / "figures" / "confusion.png").stat().st_size > 5000
    shown = nextvit_here("eval", weights, garment_folder, "--image-size", "32,48").stdout
    assert "calibration error" in shown
    assert "least right" in shown


@pytest.fixture
def imagenet_like(tmp_path):
    """Four validation images of two of ImageNet's classes, named as there."""
    for number, wordnet_id in zip((1, 2, 3, 5), ("n01440764", "n01440764", "n01443537", "n01443537"), strict=True):
        folder = tmp_path / "imagenet" / "val" / wordnet_id
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(folder / f"ILSVRC2012_val_{number:08}.JPEG")
    return tmp_path / "imagenet"


def test_imagenet_s_reassessed_labels_are_found_by_the_number_in_the_name(imagenet_like, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[0], [], [1, 7], [3], list(range(1000))]))
    split = read_split(imagenet_like, "val", class_names.imagenet())
    assert [len(labels) for labels in real_labels(tmp_path / "real.json", split)] == [1, 0, 2, 1000]
    model = create_model("nextvit_nano")
    weights = tmp_path / "nano.safetensors"
    save_weights(weights, model.state_dict(), replace(model.metadata, labels=class_names.imagenet()))
    done = nextvit_here(
        "eval", weights, imagenet_like, "--real", tmp_path / "real.json", "--image-size", "32", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["images"] == 4
    assert 100 / 3 - 0.01 <= told["real_top1"] <= 100, "of three images; the last one's every answer is right"


@pytest.mark.parametrize("fault", ["no file", "no list", "too short", "other classes"])
def test_reassessed_labels_that_do_not_fit_are_refused(fault, imagenet_like, tmp_path, garment_folder):
    path = tmp_path / "real.json"
    if fault != "no file":
        path.write_text({"no list": "{}", "too short": "[[1], [2]]"}.get(fault, "[[0]]"))
    split = (
        read_split(garment_folder, "val")
        if fault == "other classes"
        else read_split(imagenet_like, "val", class_names.imagenet())
    )
    with pytest.raises(UserError):
        real_labels(path, split)


@pytest.mark.parametrize(
    ("flags", "message"), [(["--crop", "wide"], "--crop takes"), (["--image-size", "a"], "--image-size")]
)
def test_flags_that_will_not_do_are_refused(flags, message, trained, garment_folder):
    done = nextvit_here("eval", trained / "model.safetensors", garment_folder, *flags)
    assert (done.returncode, message in done.stderr) == (2, True)
