"""Answers of segmentation networks: sizes, windows, scales; and eval of a checkpoint from end to end."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nextvit.create import create_model
from nextvit.data import masks, scenes
from nextvit.data.images import fitted, normalise
from nextvit.data.masks import mask_split
from nextvit.data.scenes import GROUPS
from nextvit.metadata import DENSE, Preprocess
from nextvit.metrics import PixelConfusion
from nextvit.tasks import segment
from nextvit.tasks.segment import View, class_map
from nextvit.weights import save_weights
from tests.conftest import fill, nextvit_here

CLASSES = 6
SMALL = Preprocess(image_size=64, crop=1.0, interpolation="bilinear", long_side=256)


@pytest.fixture(scope="module")
def model():
    model = fill(create_model("nextvit_nano", task="segment", num_classes=CLASSES))
    with torch.no_grad():  # so that answers differ from pixel to pixel and from class to class
        model.decode_head.conv_seg.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def run(model):
    def run(batch):
        with torch.inference_mode():
            return model(torch.from_numpy(batch)).numpy()

    return run


@pytest.fixture
def image():
    return Image.fromarray(scenes.compose("val", 0).image[:150, :190])


def enlarge(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(150, 190), (300, 41), (64, 256), (700, 700)])
def test_images_are_resized_as_opencv_does(size):
    import cv2

    pixels = np.asarray(Image.fromarray(scenes.compose("train", 3).image).resize(size[::-1]))
    found = fitted(pixels, 64, 256)
    factor = min(256 / max(size), 64 / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    expected = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_very_thin_image_is_made_as_large_as_the_network_needs():
    assert fitted(np.zeros((10, 900, 3), np.uint8), 64, 256).shape == (32, 256, 3)


@pytest.mark.parametrize("at_once", [2**25, 1000])
def test_logits_are_enlarged_to_the_input_and_then_to_the_image(run, image, at_once, monkeypatch):
    monkeypatch.setattr(segment, "AT_ONCE", at_once)  # some rows at a time, or all
    x = normalise(fitted(np.asarray(image), 64, 256), SMALL)[None]
    logits = enlarge(enlarge(torch.from_numpy(run(x)), x.shape[2:]), (150, 190))
    found = class_map(run, image, SMALL)
    assert found.shape == (150, 190)
    assert len(np.unique(found)) > 2
    assert (found == logits.argmax(1)[0].numpy()).mean() > 0.9999


def test_scales_and_mirrored_images_are_averaged_as_probabilities(run, image):
    total = 0
    for scale in (0.5, 1.25):
        for mirrored in (False, True):
            pixels = np.asarray(image)[:, ::-1] if mirrored else np.asarray(image)
            x = normalise(fitted(pixels, int(64 * scale), int(256 * scale)), SMALL)[None]
            shares = enlarge(enlarge(torch.from_numpy(run(x)), x.shape[2:]), (150, 190)).softmax(1)
            total = total + (shares.flip(3) if mirrored else shares)
    found = class_map(run, image, SMALL, View((0.5, 1.25), flip=True))
    assert (found == total.argmax(1)[0].numpy()).mean() > 0.9999
    assert (found != class_map(run, image, SMALL)).any()


def test_windows_cover_the_image_and_overlaps_are_averaged(run, image):
    x = normalise(fitted(np.asarray(image), 64, 256), SMALL)[None]
    height, width = x.shape[2:]
    assert (height, width) == (64, 81)
    total, count = torch.zeros(1, CLASSES, height, width), torch.zeros(height, width)
    for top in (0, 16):  # windows of 48, 32 apart, the last one moved back to the border
        for left in (0, 32, 33):
            part = np.ascontiguousarray(x[:, :, top : top + 48, left : left + 48])
            total[:, :, top : top + 48, left : left + 48] += enlarge(torch.from_numpy(run(part)), (48, 48))
            count[top : top + 48, left : left + 48] += 1
    assert count.min() == 1
    expected = enlarge(total / count, (150, 190)).argmax(1)[0].numpy()
    assert (class_map(run, image, SMALL, View(window=48)) == expected).mean() > 0.9999


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    from dataclasses import replace

    path = tmp_path_factory.mktemp("segment") / "a.safetensors"
    record = replace(model.metadata, labels=("background", *GROUPS), preprocess=SMALL)
    save_weights(path, model.state_dict(), record)
    return path


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(masks, "scenes_folder", lambda: scenes.scenes_folder(6, 3))


def test_eval_tells_what_counting_gives(checkpoint, run, few_scenes, tmp_path):
    done = nextvit_here("eval", checkpoint, "demo", "--json", "--boundary", "--output", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    split, metric = mask_split("demo", "val"), PixelConfusion(CLASSES, boundary=True)
    for index in range(len(split)):
        image = split.read(index)
        metric.update(class_map(run, image, SMALL), split.labels_of(index, image.size))
    assert told["miou"] == pytest.approx(metric.miou, abs=0.02)  # folded: rounding may turn a pixel
    assert told["pixel_accuracy"] == pytest.approx(metric.accuracy, abs=0.02)
    assert told["boundary_miou"] == pytest.approx(metric.boundary_miou, abs=0.05)
    assert told["images"] == 3
    assert list(told["per_class"]) == ["background", *GROUPS]
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"classes.csv", "confusion.csv", "confusion.png"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "whole images"),
        (["--scales", "0.5,1", "--flip"], "scales 0.5, 1, each mirrored too"),
        (["--window", 48], "windows of 48 pixels"),
    ],
)
def test_eval_says_how_it_looked(checkpoint, few_scenes, flags, said):
    done = nextvit_here("eval", checkpoint, "demo", *flags)
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout
    assert said in done.stdout


def test_eval_leaves_bad_masks_out_only_when_asked(checkpoint, tmp_path):
    for index in range(3):
        scene = scenes.compose("val", index)
        for folder, pixels in (("images", scene.image), ("masks", scenes.annotation_map(scene) - 1)):
            path = tmp_path / "val" / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / "labels.txt").write_text("\n".join(("background", *GROUPS)))
    Image.fromarray(np.full((192, 192), 9, np.uint8)).save(tmp_path / "val" / "masks" / "1.png")
    done = nextvit_here("eval", checkpoint, tmp_path)
    assert done.returncode == 2
    assert "1 of 3 images" in done.stderr
    assert "1.png has 36864 pixels of values that are no class, the first is 9" in done.stderr
    done = nextvit_here("eval", checkpoint, tmp_path, "--allow-bad", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["eval", "{}", "demo", "--crop", "timm"], "--crop has no meaning for the task 'segment'"),
        (["eval", "nextvit_nano", "demo", "--flip"], "--flip has no meaning for the task 'classify'"),
        (["eval", "{}", "demo", "--scales", "1,x"], "--scales takes numbers above 0"),
        (["predict", "{}", "photo.png"], "is for the task 'segment', and a classifier is needed here"),
        (["export", "{}", "--to", "onnx"], "is for the task 'segment', and a classifier is needed here"),
    ],
)
def test_what_has_no_meaning_is_told(checkpoint, arguments, told, few_scenes, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    arguments = [str(a).format(checkpoint).replace("photo.png", str(tmp_path / "photo.png")) for a in arguments]
    done = nextvit_here(*arguments)
    assert done.returncode == 2
    assert told in done.stderr


def test_published_segmenters_are_prepared_as_the_authors_evaluate():
    assert create_model("nextvit_nano", task="segment").metadata.preprocess == DENSE
    assert (DENSE.image_size, DENSE.long_side, DENSE.interpolation) == (512, 2048, "bilinear")
