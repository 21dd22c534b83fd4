"""Detection: AP as pycocotools counts it, masks pasted as the authors paste them, answers in the image's own pixels."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nextvit import class_names, load
from nextvit.average_precision import AveragePrecision
from nextvit.data import objects
from nextvit.data.objects import object_split
from nextvit.data.scenes import compose, scenes_folder
from nextvit.evaluate import evaluate_objects
from nextvit.metadata import Metadata, Preprocess
from nextvit.tasks.detect import LEAST, Detections, decode, detect, pasted
from nextvit.weights import save_weights
from tests.conftest import nextvit_here
from tests.detectors import lively

# ---- average precision -----------------------------------------------------------------------------------------------

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium",
         "ar_large")  # fmt: skip


def drawn(rng, size, count, crowd=0.0):
    """Entries with blobs for masks."""
    rows = []
    for _ in range(count):
        h, w = (int(rng.integers(2, 1 + side * 2 // 3)) for side in size)
        y, x = (int(rng.integers(0, side - part + 1)) for side, part in zip(size, (h, w), strict=True))
        mask = np.zeros(size, np.uint8)
        mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.8
        mask[y, x] = 1
        runs = reference.encode(np.asfortranarray(mask))
        rows.append({"category_id": int(rng.choice([1, 3, 7])), "bbox": [float(v) for v in (x, y, w, h)],
                     "area": float(mask.sum()), "iscrowd": int(rng.random() < crowd),
                     "segmentation": {"size": list(size), "counts": runs["counts"].decode()}})  # fmt: skip
    return rows


def shaken(rng, rows, size):
    """Detections: most objects a little moved, some twice, with scores that are often equal."""
    found = []
    for row in rows:
        for _ in range(int(rng.integers(0, 3))):
            x, y, w, h = row["bbox"]
            box = [x + rng.normal(0, 1), y + rng.normal(0, 1), max(1.0, w + rng.normal(0, 2)), max(1.0, h)]
            mask = reference.decode(row["segmentation"])
            mask = np.roll(mask, int(rng.integers(-2, 3)), axis=int(rng.integers(2)))
            runs = reference.encode(np.asfortranarray(mask))
            category = row["category_id"] if rng.random() < 0.8 else int(rng.choice([1, 3, 7]))
            found.append({"category_id": category, "bbox": box, "score": float(round(rng.random(), 1)),
                          "segmentation": {"size": list(size), "counts": runs["counts"].decode()}})  # fmt: skip
    return found


def theirs(images, truth, found, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": i} for i in (1, 3, 7)]}
        coco.createIndex()
        rows = [dict(row) for row in found]
        for row in rows if kind == "segm" else ():
            row.pop("bbox")
        results = coco.loadRes(rows)
        run = COCOeval(coco, results, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    per_class = []
    for k in range(3):
        values = run.eval["precision"][:, :, k, 0, 2]
        per_class.append(float(values[values > -1].mean()) if (values > -1).any() else None)
    return run.stats, per_class


CASES = {
    "random": (8, 6, 0.0),
    "crowds": (8, 6, 0.4),
    "few": (3, 1, 0.0),
    "many": (2, 90, 0.1),  # over a hundred detections an image
    "large": (3, 5, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_ap_is_pycocotools_to_a_millionth(case):
    count, most, crowd = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    metrics, images, truth = AveragePrecision((1, 3, 7)), [], []
    for number in range(1, count + 1):
        size = (150, 170) if case == "large" else (50, 60)
        rows = drawn(rng, size, int(rng.integers(most // 2, most + 1)), crowd)
        rows = [] if number == 2 else rows  # an image without an object, with detections all the same
        found = shaken(rng, rows or drawn(rng, size, 3), size)
        metrics.update(10 * number, size, rows, found)
        images.append({"id": 10 * number, "height": size[0], "width": size[1]})
        truth += [{**row, "image_id": 10 * number, "id": len(truth) + 1 + i} for i, row in enumerate(rows)]
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected, per_class = theirs(images, truth, metrics.found, kind)
        ours = metrics.scores[name]
        for key, value in zip(NAMES, expected, strict=True):
            mine = getattr(ours, key)
            assert (mine is None and value == -1) or mine / 100 == pytest.approx(value, abs=1e-6), key
        for mine, value in zip(ours.per_class, per_class, strict=True):
            assert (mine is None and value is None) or mine / 100 == pytest.approx(value, abs=1e-6)
    assert case == "few" or metrics.scores["mask"].ap > 1


def test_nothing_found_is_0_and_nothing_to_find_is_no_number():
    metrics = AveragePrecision((1, 2))
    rows = drawn(np.random.default_rng(0), (50, 60), 2)
    metrics.update(1, (50, 60), [{**row, "category_id": 1} for row in rows], [])
    assert metrics.scores["box"].ap == 0
    assert metrics.scores["box"].per_class == (0.0, None)
    metrics = AveragePrecision((1, 2))
    metrics.update(1, (50, 60), [], [])
    assert (metrics.scores["box"].ap, metrics.scores["mask"].ar100) == (None, None)


def test_several_processes_count_as_one():
    rng = np.random.default_rng(3)
    parts = [AveragePrecision((1, 3, 7)) for _ in range(3)]
    for number in range(1, 7):
        rows = drawn(rng, (50, 60), 4)
        found = shaken(rng, rows, (50, 60))
        for part in (parts[0], parts[1 + number % 2]):
            part.update(number, (50, 60), rows, found)
    parts[1].merge(lambda value: [value, (parts[2].images, parts[2].truth, parts[2].found)])
    assert parts[1].scores == parts[0].scores


# ---- masks in the image ----------------------------------------------------------------------------------------------


def as_the_authors_paste(mask, box, size):
    """Bilinear grid sampling at the centres of pixels, with the box as it is; by torch's own operator."""
    x1, y1, x2, y2 = box.tolist()
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    grid = torch.stack(
        torch.broadcast_tensors(((x - x1) / (x2 - x1) * 2 - 1)[None], ((y - y1) / (y2 - y1) * 2 - 1)[:, None]), dim=2
    )
    values = F.grid_sample(torch.from_numpy(mask)[None, None].double(), grid[None], align_corners=False)[0, 0]
    return values.numpy()


def test_masks_are_pasted_as_the_authors_paste_them():
    rng = np.random.default_rng(0)
    for _ in range(40):
        coarse = torch.from_numpy(rng.random((1, 1, 7, 7)))
        mask = F.interpolate(coarse, (28, 28), mode="bilinear")[0, 0].numpy()
        corner = rng.uniform(-10, 50, 2)
        box = np.concatenate([corner, corner + rng.uniform(0.5, 60, 2)])
        expected = as_the_authors_paste(mask, torch.from_numpy(box), (70, 60))
        clear = abs(expected - 0.5) > 1e-9
        found = pasted(mask, box, (70, 60))
        np.testing.assert_array_equal(found[clear], (expected >= 0.5)[clear])


@pytest.mark.parametrize("box", [[5, 5, 5, 20], [5, 5, 20, 5], [9, 9, 9, 9], [200, 200, 210, 210], [-50, 3, -40, 9]])
def test_empty_boxes_and_those_outside_have_no_pixel(box):
    assert not pasted(np.ones((28, 28), np.float32), np.array(box, np.float32), (40, 40)).any()


def test_a_full_mask_covers_its_box():
    found = pasted(np.ones((28, 28), np.float32), np.array([3.0, 4, 13, 9]), (20, 30))
    assert found[4:9, 3:13].all()
    assert found.sum() == 50


# ---- an image's answer -----------------------------------------------------------------------------------------------

RECORD = Metadata("nextvit_nano", "detect", "mask_rcnn", ("a", "b"), Preprocess(96, 1.0, "bilinear", long_side=160),
                  num_classes=2)  # fmt: skip


def finding(box):
    """A network that finds one object at the same share of every image."""
    seen = []

    def run(batch):
        seen.append(batch.shape)
        return [{"boxes": np.array([box], np.float32), "labels": np.array([1]), "scores": np.array([0.9], np.float32),
                 "masks": np.ones((1, 28, 28), np.float32)}]  # fmt: skip

    return run, seen


def test_boxes_are_in_pixels_of_the_image_as_it_was():
    run, seen = finding([16, 24, 80, 96])
    found = detect(run, Image.new("RGB", (320, 192)), RECORD, ("a", "b"))
    assert seen == [(1, 3, 96, 160)]
    assert found.boxes.tolist() == [[32, 48, 160, 192]]
    assert found.mask(0).sum() == 128 * 144 - 12, "corners are rounded, as the authors' sampling does"
    (row,) = found.to_dict()["boxes"]
    assert (row["label"], row["class"], row["box"]) == ("b", 1, [32.0, 48.0, 160.0, 192.0])
    assert reference.area(row["segmentation"]) == 128 * 144 - 12


@pytest.mark.parametrize("size", [(1, 1), (3000, 40), (40, 3000)])
def test_images_of_any_shape_are_padded_to_what_files_take(size):
    run, seen = finding([0, 0, 4000, 4000])
    found = detect(run, Image.new("RGB", size), RECORD, ("a", "b"))
    assert min(seen[0][2:]) >= LEAST
    assert found.boxes.tolist() == [[0, 0, *size]], "cut to the image, without its padding"


def test_coco_results_have_cocos_own_numbers():
    assert class_names.coco_ids(class_names.coco())[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    assert class_names.coco_ids(class_names.coco())[-1] == 90
    assert len(class_names.coco_ids(class_names.coco())) == 80
    assert class_names.coco_ids(("a", "b")) == (1, 2)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = lively(classes=5, size=(96, 96))
    m = model.metadata
    preprocess = Preprocess(96, 1.0, "bilinear", m.preprocess.mean, m.preprocess.std, 96)
    labels = ("top", "trousers", "dress", "footwear", "bag")
    model.metadata = Metadata("nextvit_nano", "detect", "mask_rcnn", labels, preprocess, 5)
    path = tmp_path_factory.mktemp("detector") / "m.safetensors"
    save_weights(path, model.state_dict(), model.metadata)
    return path


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(objects, "scenes_folder", lambda: scenes_folder(6, 4))


def test_eval_writes_what_it_found_as_coco_and_pycocotools_agrees(checkpoint, few, tmp_path):
    done = nextvit_here("eval", checkpoint, "demo", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "precision.png", "precision.csv", "classes.csv", "detections.json"}  # fmt: skip
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(found) == told["detections"] > 100
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(scenes_folder(6, 4) / "coco" / "annotations" / "instances_val2017.json")
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert told["box"]["ap"] / 100 == pytest.approx(run.stats[0], abs=1e-6)
    assert told["box"]["ar100"] / 100 == pytest.approx(run.stats[8], abs=1e-6)


def test_the_truth_itself_has_100(few):
    split = object_split("demo", "val")

    class Perfect:
        index = 0

        def __call__(self, batch):
            truth = split.objects(self.index)
            self.index += 1
            masks = np.zeros((len(truth), 28, 28), np.float32)
            return [{"boxes": truth.boxes, "labels": truth.labels, "scores": np.ones(len(truth), np.float32),
                     "masks": masks}]  # fmt: skip

    whole = Metadata("nextvit_nano", "detect", "mask_rcnn", (), Preprocess(192, 1.0, "bilinear", long_side=192), 5)
    result = evaluate_objects(Perfect(), split, whole)
    assert result.numbers["box_ap"] == pytest.approx(100)
    assert result.numbers["mask_ap"] == 0


def test_predict_writes_rows_pictures_and_cocos_results(checkpoint, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    scene = Image.fromarray(compose("val", 0).image)
    scene.save(folder / "7.png")
    (folder / "8.png").write_bytes(b"no image")
    turned = scene.crop((0, 0, 192, 120)).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees to the right
    turned.save(folder / "9.png", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "10.png")
    flags = ["--save-images", out / "i", "--save-coco", out / "c.json"]
    done = nextvit_here("predict", checkpoint, folder, "--output", out / "rows.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    rows = {
        row["file"].rpartition("/")[2]: row for row in map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    }
    assert list(rows) == ["10.png", "7.png", "8.png", "9.png"]
    assert "cannot be read" in rows["8.png"]["error"]
    upright = load(checkpoint).predict([scene.crop((0, 0, 192, 120))])[0]
    assert [row["box"] for row in rows["9.png"]["boxes"]] == [row["box"] for row in upright.to_dict()["boxes"]]
    found = json.loads((out / "c.json").read_text())
    assert {row["image_id"] for row in found} >= {7, 9}
    assert {row["category_id"] for row in found} <= {1, 2, 3, 4, 5}
    assert Image.open(out / "i" / "000002-7.png").size == (192, 192)
    done = nextvit_here("predict", checkpoint, folder / "7.png", "--output", out / "rows.csv")
    assert done.returncode == 0
    (row,) = csv.DictReader((out / "rows.csv").read_text().splitlines())
    assert float(row["score"]) == pytest.approx(rows["7.png"]["boxes"][0]["score"], abs=1e-5)


def test_an_image_without_objects_has_an_empty_answer(checkpoint, tmp_path):
    model = lively(classes=5)
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias[-1] += 100  # all is background
    save_weights(tmp_path / "m.safetensors", model.state_dict(), model.metadata)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    predictor = load(tmp_path / "m.safetensors")
    found = predictor.predict([tmp_path / "a.png"])[0]
    assert isinstance(found, Detections)
    assert (len(found), found.to_dict()) == (0, {"boxes": []})
    assert found.drawn(Image.new("RGB", (40, 30))).size == (40, 30)
    done = nextvit_here("predict", tmp_path / "m.safetensors", tmp_path / "a.png", "--output", tmp_path / "r.csv")
    assert done.returncode == 0
    assert (tmp_path / "r.csv").read_text().splitlines()[1].endswith("a.png,,0.000000,")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["predict", "FILE", "IMAGE", "--save-masks", "m"], "--save-masks has no meaning for the task 'detect'"),
        (["eval", "FILE", "demo", "--crop", "timm"], "--crop has no meaning for the task 'detect'"),
        (["eval", "FILE", "demo", "--flip"], "--flip has no meaning for the task 'detect'"),
        (["eval", "FILE", "EMPTY"], "no images with objects for val"),
        (["export", "FILE", "--to", "onnx", "--preprocess"], "leave --preprocess out"),
        (["export", "FILE", "--to", "onnx", "--stages"], "leave --stages out"),
        (["export", "FILE", "--to", "onnx", "--class-map"], "leave --class-map out"),
        (["export", "FILE", "--to", "executorch", "--precision", "int8", "--calibration", "demo"], "for whole files"),
        (["predict", "FILE", "IMAGE", "--save-coco", "c.json", "--resume", "--output", "x.jsonl"], "does not go with"),
    ],
)
def test_what_has_no_meaning_is_refused(flags, told, checkpoint, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    place = {"FILE": checkpoint, "IMAGE": tmp_path / "a.png", "EMPTY": tmp_path / "empty"}
    done = nextvit_here(*(place.get(flag, flag) for flag in flags))
    assert done.returncode == 2, done.stdout
    assert told in done.stderr


def test_boxes_of_which_nothing_lies_in_the_image_are_left_out():
    found = {
        "boxes": np.array([[5, 5, 20, 20], [40, 5, 60, 20], [3, 30, 9, 44]], np.float32),
        "labels": np.array([0, 1, 0]),
        "scores": np.array([0.9, 0.8, 0.7], np.float32),
        "masks": np.ones((3, 28, 28), np.float32),
    }
    left = decode(found, (30, 40), (60, 80), ("a", "b"))  # an image of 40 x 30 pixels in what the network was given
    assert left.boxes.tolist() == [[10, 10, 40, 40]]
    assert (left.classes.tolist(), len(left.masks)) == ([0], 1)
