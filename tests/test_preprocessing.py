"""Preprocessing inside a file: Pillow's, to the edge of rounding, in every runtime that has it."""

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import nextvit
from nextvit.data.images import pixels, preprocess
from nextvit.errors import UserError
from nextvit.exporters.parity import real_images
from nextvit.exporters.preprocessing import Preprocessing
from nextvit.formats import FORMATS
from nextvit.metadata import Preprocess
from tests.conftest import fill, nextvit_here

ENDINGS = [fmt.suffix for fmt in FORMATS if fmt.pixels is not None and fmt.name != "aotinductor"]
SLOW = pytest.mark.slow
SIZES = [(375, 500), (877, 325), (100, 1000), (60, 41), (1, 5), (3, 2), (256, 256), (257, 256), (224, 224), (225, 500)]


@pytest.fixture(scope="module")
def model():
    return fill(nextvit.create_model("nextvit_nano", num_classes=5))


def levels(image: Image.Image, p: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """The same image prepared by Pillow and by the graph, in levels of 255."""
    graph = Preprocessing(p)(torch.from_numpy(np.array(image)[None]))[0].numpy()
    return pixels(preprocess(image, p), p).astype(int), pixels(graph, p).astype(int)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "crop"), [(224, 0.875), (32, 1.0), (97, 0.9), pytest.param(384, 1.0, marks=pytest.mark.slow)]
)
def test_a_pixel_is_pillow_s_but_where_a_sum_lies_on_the_edge_of_rounding(interpolation, size, crop):
    p = Preprocess(image_size=size, crop=crop, interpolation=interpolation)
    rng, off = np.random.default_rng(0), []
    for sides in SIZES:
        for image in (
            Image.fromarray(rng.integers(0, 256, (*sides, 3), np.uint8)),  # noise: bicubic goes below 0 and above 255
            real_images()[10 + sides[0] % 9].resize(sides[::-1]),
        ):
            ours, graph = levels(image, p)
            grown = min(sides) < p.resize_size  # by 3 / 2 and the like many sums are whole halves, in both passes
            assert np.abs(ours - graph).max() <= 1 + grown, sides
            off.append((ours != graph).mean())
    assert np.mean(off) < 0.02
    assert np.median(off) < 1e-3


def test_an_image_of_the_size_that_is_wanted_is_left_as_it_is():
    image = real_images()[10].resize((96, 96))
    ours, graph = levels(image, Preprocess(image_size=96, crop=1.0))
    assert np.array_equal(ours, np.asarray(image))
    assert np.array_equal(graph, np.asarray(image))


def test_columns_are_resized_before_rows_whatever_the_shape():
    """Pillow takes the cheaper order since version 13, and rounds in between: another order is another image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (877, 325, 3), np.uint8))
    p = Preprocess(image_size=256, crop=1.0)
    first = np.stack([np.asarray(Image.fromarray(c.astype(np.float32)).resize((256, 877), 3)) for c in channels(image)])
    first = np.floor(first + 0.5).clip(0, 255)
    both = np.stack([np.asarray(Image.fromarray(c).resize((256, 690), 3)) for c in first])
    expected = np.floor(both + 0.5).clip(0, 255).transpose(1, 2, 0)[217:473]
    assert np.abs(pixels(preprocess(image, p), p) - expected).max() <= 1


def channels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("ending", [end if end == ".onnx" else pytest.param(end, marks=SLOW) for end in ENDINGS])
def test_a_file_prepares_images_of_any_size_as_the_model_s_user_would(ending, model, tmp_path):
    report = nextvit.export(model, tmp_path / f"m{ending}", image_size=64, preprocess=True)
    assert report.checked.ok
    assert report.checked.live
    assert {(row.height, row.width) for row in report.checked.rows} >= {(28, 28), (256, 384), (335, 384), (65, 91)}
    ours = nextvit.load(tmp_path / f"m{ending}")
    assert ours.metadata.takes_pixels
    images = [*real_images()[9:14], Image.fromarray(np.full((1, 40, 3), 7, np.uint8))]
    with torch.inference_mode():
        batch = np.stack([preprocess(image, ours.metadata.preprocess) for image in images])
        expected = model(torch.from_numpy(batch)).softmax(1).numpy()
    for answer, scores in zip(ours.predict(images), expected, strict=True):
        assert answer.scores == pytest.approx(sorted(scores, reverse=True), abs=1e-3)
    several = [ours.run(np.stack([np.asarray(images[1])] * count)) for count in (1, 3)]
    assert np.abs(several[1] - several[0]).max() < 1e-4
    for wrong in (batch, np.zeros((1, 3, 64, 64), np.uint8), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"must be uint8 of shape \(B, H, W, 3\)"):
            ours.run(wrong)
    with pytest.raises(UserError, match="too small"):
        ours.run(np.zeros((1, 0, 5, 3), np.uint8))
    done = subprocess.run([sys.executable, tmp_path / f"m{ending}.example" / "run.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".xml", ".pte"])
def test_int8_leaves_preprocessing_exact(ending, model, tmp_path):
    images = [image.rotate(90 * turn) for turn in range(3) for image in real_images()]
    kw = {"image_size": 64, "precision": "int8", "calibration": images, "max_drop": None, "dynamic": False}
    plain = nextvit.export(model, tmp_path / f"a{ending}", **kw)
    inside = nextvit.export(model, tmp_path / f"b{ending}", preprocess=True, **kw)
    assert not any("preprocess" in name for name in inside.float_layers)
    assert inside.accuracy.agreement == pytest.approx(plain.accuracy.agreement, abs=10)
    a, b = (nextvit.load(tmp_path / f"{name}{ending}") for name in "ab")
    own = [a.prepare(image)[None] for image in images[:9]]
    first = np.concatenate([a.run(image) for image in own])
    second = np.concatenate([b.run(b.prepare(image)[None]) for image in images[:9]])
    assert np.abs(first - second).max() < 0.05 * np.abs(first).max()


@pytest.mark.slow
def test_predict_eval_and_benchmark_take_such_a_file(trained, garment_folder, tmp_path):
    file = tmp_path / "m.onnx"
    done = nextvit_here("export", trained / "model.safetensors", "--to", "onnx", "--preprocess", "--output", file)
    assert done.returncode == 0, done.stderr
    scores = [nextvit_here("eval", model, garment_folder, "--json") for model in (trained / "model.safetensors", file)]
    assert [done.returncode for done in scores] == [0, 0], scores[1].stderr
    assert scores[0].stdout.split('"top1"')[1][:12] == scores[1].stdout.split('"top1"')[1][:12]
    assert nextvit_here("predict", file, garment_folder).stdout.count('"labels"') == 60
    assert nextvit_here("benchmark", file, "--rounds", 8).returncode == 0


def test_what_cannot_prepare_images_says_so_before_any_work(model, tmp_path):
    for ending in (".mlpackage", ".engine", ".aimodel"):
        with pytest.raises(UserError, match="do not prepare images themselves; --preprocess goes with onnx, openvino"):
            nextvit.export(model, tmp_path / f"m{ending}", preprocess=True)
    with pytest.raises(UserError, match="only RGB images"):
        nextvit.export(nextvit.create_model("nextvit_nano", in_channels=4), tmp_path / "m.onnx", preprocess=True)
    nearest = copy.deepcopy(model)
    nearest.metadata = replace(model.metadata, preprocess=Preprocess(interpolation="nearest"))
    with pytest.raises(UserError, match="nearest pixel"):
        nextvit.export(nearest, tmp_path / "m.onnx", preprocess=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_image_that_is_too_large_for_the_file_is_a_row_and_ends_nothing(model, tmp_path):
    nextvit.export(model, tmp_path / "m.pte", image_size=64, preprocess=True)
    for name, side in (("a", 100), ("b", 2100), ("c", 50)):
        Image.new("RGB", (side, 40), "red").save(tmp_path / f"{name}.png")
    files = sorted(tmp_path.glob("?.png"))
    answers = [answer for _, answer in nextvit.load(tmp_path / "m.pte").stream(files)]
    assert [isinstance(answer, str) for answer in answers] == [False, True, False]
    assert "takes up to 2048 x 2048 pixels, not 40 x 2100; make the image smaller" in answers[1]


def test_hints_and_caches_that_are_none_are_a_sentence(model, tmp_path, monkeypatch):
    nextvit.export(model, tmp_path / "m.xml", image_size=64, preprocess=True)
    with pytest.raises(UserError, match="no hint 'speed'; take of latency, throughput"):
        nextvit.load(tmp_path / "m.xml", hint="speed")
    with pytest.raises(UserError, match="takes them one at a time; leave --hint out"):
        nextvit.load(tmp_path / "m.xml", hint="throughput")
    monkeypatch.setenv("NEXTVIT_OPENVINO_CACHE", str(tmp_path / "m.xml" / "inside"))
    with pytest.raises(UserError, match="NEXTVIT_OPENVINO_CACHE is .*; name a folder"):
        nextvit.load(tmp_path / "m.xml")
