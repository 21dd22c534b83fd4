"""Answers of segmentation networks: sizes, windows, scales; and eval of a checkpoint from end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nextvit import export
from nextvit.create import create_model
from nextvit.data import masks, scenes
from nextvit.data.images import fitted, normalise
from nextvit.data.masks import mask_split
from nextvit.data.scenes import GROUPS
from nextvit.errors import UserError
from nextvit.metadata import DENSE, Metadata, Preprocess
from nextvit.metrics import PixelConfusion
from nextvit.runtime.predictor import load
from nextvit.tasks import segment
from nextvit.tasks.segment import Segmentation, View, class_map, palette, tiled_map
from nextvit.weights import save_weights
from tests.conftest import fill, nextvit_here

CLASSES = 6
SMALL = Preprocess(image_size=64, crop=1.0, interpolation="bilinear", long_side=256)
RECORD = Metadata("nextvit_nano", "segment", "fpn", ("background", *GROUPS), preprocess=SMALL, num_classes=CLASSES)


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
    found = class_map(run, image, RECORD)
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
    found = class_map(run, image, RECORD, View((0.5, 1.25), flip=True))
    assert (found == total.argmax(1)[0].numpy()).mean() > 0.9999
    assert (found != class_map(run, image, RECORD)).any()


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
    assert (class_map(run, image, RECORD, View(window=48)) == expected).mean() > 0.9999


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("segment") / "a.safetensors"
    save_weights(path, model.state_dict(), RECORD)
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
        metric.update(class_map(run, image, RECORD), split.labels_of(index, image.size))
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
        (["predict", "nextvit_nano", "photo.png", "--tile", 64], "--tile has no meaning for the task 'classify'"),
        (["export", "nextvit_nano", "--to", "onnx", "--class-map"], "leave --class-map out"),
        (["export", "{}", "--to", "onnx", "--preprocess"], "do not prepare images"),
        (["train", "demo", "--task", "segment", "--recipe", "default"], "default is a recipe for the task classify"),
    ],
)
def test_what_has_no_meaning_is_told(checkpoint, arguments, told, few_scenes, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    arguments = [str(a).format(checkpoint).replace("photo.png", str(tmp_path / "photo.png")) for a in arguments]
    done = nextvit_here(*arguments)
    assert done.returncode == 2
    assert told in done.stderr


def test_published_segmenters_are_prepared_as_the_authors_evaluate():
    assert create_model("nextvit_nano", task="segment").metadata.preprocess == DENSE["segment"]
    p = DENSE["segment"]
    assert (p.image_size, p.long_side, p.interpolation) == (512, 2048, "bilinear")


# ---- files of one size, files that give classes, tiles ---------------------------------------------------------------


def by_colour(batch):
    """A network whose answer for a block of 4 x 4 pixels is that block's alone: logits of three classes."""
    return F.avg_pool2d(torch.from_numpy(batch), 4, ceil_mode=True, count_include_pad=False).numpy()


def classes_by_colour(batch):
    return batch.argmax(1).astype(np.int32)


PLAIN = replace(SMALL, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
THREE = replace(RECORD, labels=("red", "green", "blue"), num_classes=3, preprocess=PLAIN)


@pytest.fixture(scope="module")
def patches():
    """Blocks of 16 pixels of one of three colours: 176 x 240."""
    colours = np.random.default_rng(0).integers(0, 3, (11, 15))
    return np.kron(colours, np.ones((16, 16), int)).astype(np.uint8)


@pytest.mark.parametrize("tile", [64, 96, 512])
@pytest.mark.parametrize("gives_classes", [False, True])
def test_tiles_give_each_pixel_the_answer_of_the_image_as_it_is(tile, gives_classes, patches):
    image = Image.fromarray(np.eye(3, dtype=np.uint8)[patches] * 255)
    m = replace(THREE, gives_classes=gives_classes)
    found = tiled_map(classes_by_colour if gives_classes else by_colour, image, m, tile)
    inner = found[2:-2, 2:-2]  # logits are enlarged, and between two colours a third may win at the border of a tile
    assert found.shape == patches.shape
    assert (inner == patches[2:-2, 2:-2]).mean() > (0.999 if gives_classes else 0.9)


@pytest.mark.parametrize("size", [(150, 190), (64, 64), (40, 700), (33, 33)])
@pytest.mark.parametrize("gives_classes", [False, True])
def test_a_file_of_one_size_is_only_ever_given_that_size(size, gives_classes):
    seen = []

    def run(batch):
        seen.append(batch.shape)
        return classes_by_colour(batch) if gives_classes else by_colour(batch)

    image = Image.fromarray(scenes.compose("val", 2).image).resize(size[::-1])
    found = class_map(run, image, replace(THREE, fixed_sides=True, gives_classes=gives_classes))
    assert found.shape == size
    assert set(seen) == {(1, 3, 64, 64)}
    free = class_map(by_colour, image, THREE)
    assert gives_classes or (found == free).mean() > 0.8


def test_a_file_that_gives_classes_answers_as_its_logits_would(run, image):
    def classes(batch):
        logits = torch.from_numpy(run(batch))
        return enlarge(logits, batch.shape[2:]).argmax(1).numpy().astype(np.int32)

    found = class_map(classes, image, replace(RECORD, gives_classes=True))
    assert found.dtype == np.uint8
    assert (found == class_map(run, image, RECORD)).mean() > 0.9, "but at the borders of regions"
    with pytest.raises(UserError, match="views of an image cannot be averaged"):
        class_map(classes, image, replace(RECORD, gives_classes=True), View(flip=True))


# ---- what predict writes ---------------------------------------------------------------------------------------------


def decoded(runs):
    """Of COCO's uncompressed runs, by its definition."""
    values = np.repeat(np.arange(len(runs["counts"])) % 2, runs["counts"])
    return values.reshape(runs["size"], order="F").astype(bool)


@pytest.fixture(scope="module")
def answer():
    classes = np.zeros((40, 60), np.uint8)
    classes[5:30, 10:40] = 2
    classes[10:20, 15:30] = 1  # a hole in it
    classes[33:35, 50:59] = 2  # and a second region
    return Segmentation(classes, ("ground", "a", "b", "never"))


def test_runs_say_where_each_class_is(answer):
    found = json.loads(json.dumps(answer.to_dict()))["mask"]
    assert [entry["label"] for entry in found] == ["ground", "b", "a"], "the largest first"
    for entry in found:
        np.testing.assert_array_equal(decoded(entry["segmentation"]), answer.classes == entry["class"])
        assert entry["pixels"] == int((answer.classes == entry["class"]).sum())


def test_polygons_have_their_holes_and_cover_their_pixels(answer):
    import cv2

    features = answer.polygons()["features"]
    assert [feature["properties"]["label"] for feature in features] == ["ground", "b", "a"]
    b = features[1]["geometry"]["coordinates"]
    assert sorted(len(polygon) for polygon in b) == [1, 2], "two regions, one of them with a hole"
    for feature in features:
        covered = np.zeros((40, 60), np.uint8)
        for outer, *holes in feature["geometry"]["coordinates"]:
            assert outer[0] == outer[-1]
            cv2.fillPoly(covered, [np.array(outer)], 1)
            for hole in holes:  # its corners are pixels of the region
                cv2.fillPoly(covered, [np.array(hole)], 0)
                cv2.polylines(covered, [np.array(hole)], True, 1)
        np.testing.assert_array_equal(covered, answer.classes == feature["properties"]["class"])


@pytest.mark.parametrize("classes", [6, 150, 256])
def test_every_class_has_a_colour_of_its_own_that_is_not_black(classes):
    colours = {tuple(colour) for colour in palette(classes).tolist()}
    assert len(colours - {(0, 0, 0)}) >= min(classes, 255)


@pytest.mark.fault("P1", "a row for each file in order, with a mask or a reason; masks as PNG, GeoJSON, overlays")
def test_pictures_and_masks_of_the_same_names_do_not_share_a_folder(checkpoint, tmp_path):
    Image.fromarray(scenes.compose("val", 0).image).save(tmp_path / "a.png")
    same = ["--save-masks", tmp_path / "out", "--save-images", tmp_path / "out"]
    done = nextvit_here("predict", checkpoint, tmp_path / "a.png", *same)
    assert done.returncode == 2
    assert "a folder of its own" in done.stderr


def test_predict_writes_rows_masks_polygons_and_overlays(checkpoint, run, tmp_path, found):
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.fromarray(scenes.compose("val", 0).image[:150, :190])
    image.save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees to the right
    turned.save(folder / "c.png", exif=exif)
    out = tmp_path / "out"
    flags = ["--save-masks", out / "m", "--save-polygons", out / "g", "--save-images", out / "i"]
    done = nextvit_here("predict", checkpoint, folder, "--output", out / "rows.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png", "c.png"]
    assert "cannot be read" in rows[1]["error"]
    expected = class_map(run, image, RECORD)
    for row, name in ((rows[0], "000001-a"), (rows[2], "000003-c")):
        with Image.open(out / "m" / f"{name}.png") as mask:
            assert mask.mode == "P"
            kept = np.asarray(mask)
        assert (kept == expected).mean() > 0.999, "upright, and folded: rounding may turn a pixel"
        for entry in row["mask"]:
            np.testing.assert_array_equal(decoded(entry["segmentation"]), kept == entry["class"])
        assert {f["properties"]["class"] for f in json.loads((out / "g" / f"{name}.geojson").read_text())["features"]}
        with Image.open(out / "i" / f"{name}.png") as overlay:
            assert overlay.size[0] > 190
    assert len(list((out / "m").iterdir())) == 2
    found("3 rows: 2 masks, upright, and 1 reason")
    done = nextvit_here("predict", checkpoint, folder, "--output", out / "rows.csv")
    assert done.returncode == 0, done.stderr
    first = (out / "rows.csv").read_text().splitlines()[1]
    largest = rows[0]["mask"][0]
    assert first == f"{folder / 'a.png'},{largest['label']},{largest['pixels'] / expected.size:.6f},"


def test_a_predictor_of_segmentation_is_typed(checkpoint, run, image):
    predictor = load(checkpoint)
    assert (predictor.task, predictor.labels) == ("segment", list(RECORD.labels))
    one, two = predictor.predict([image, np.asarray(image)])
    assert isinstance(one, Segmentation)
    np.testing.assert_array_equal(one.classes, two.classes)
    assert (one.classes == class_map(run, image, RECORD)).mean() > 0.999
    assert predictor.run(np.zeros((2, 3, 64, 96), np.float32)).shape == (2, CLASSES, 16, 24)
    x = predictor.prepare(image)[None]
    same = predictor.decoded(predictor.run(x), x.shape[2:], (image.height, image.width))
    np.testing.assert_array_equal(same.classes, one.classes)
    assert predictor.segment(image, tile=64).classes.shape == (150, 190)


@pytest.mark.slow
def test_an_image_of_400_megapixels_takes_less_than_4_gb(model, tmp_path, monkeypatch):
    """By an int8 file in a process of its own, tile by tile, with its mask and its runs."""
    monkeypatch.setattr(masks, "scenes_folder", lambda: scenes.scenes_folder(40, 12))
    model.metadata = replace(RECORD, preprocess=replace(SMALL, image_size=512, long_side=2048))
    file = tmp_path / "m.xml"
    export(model, file, precision="int8", calibration="demo", max_drop=None, dynamic=False)
    code = (
        "import resource, sys; from nextvit.cli import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr); sys.exit(code)"
    )
    large = Image.fromarray(np.kron(scenes.compose("val", 0).image, np.ones((4, 4, 1), np.uint8)))
    canvas = Image.new("RGB", (20_000, 20_000))
    for left in range(0, 20_000, 768):
        for top in range(0, 20_000, 768):
            canvas.paste(large, (left, top))
    canvas.save(tmp_path / "large.jpg", quality=80)
    canvas.close()
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", str(file), str(tmp_path / "large.jpg"), "--tile", "512",
         "--save-masks", str(tmp_path / "m"), "--output", str(tmp_path / "rows.jsonl")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1])
    assert peak < 4e9
    print(f"{peak / 1e9:.2f} GB")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit
    with Image.open(tmp_path / "m" / "000001-large.png") as mask:
        assert mask.size == (20_000, 20_000)
