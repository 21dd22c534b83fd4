"""COCO's files: what they hold comes out as pycocotools has it, and what is wrong with them is named first."""

import copy
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as reference
from pycocotools.coco import COCO

from nextvit.cli import main
from nextvit.data.check import check, quick_check
from nextvit.data.convert import convert
from nextvit.data.images import ImageRejected
from nextvit.data.objects import object_split, object_splits
from nextvit.data.rle import from_text, rle
from nextvit.data.scenes import scenes_folder
from nextvit.data.sets import task_of
from nextvit.errors import UserError

SIZE = (40, 60)  # height, width
SQUARE = [[5.0, 5.0, 25.0, 5.0, 25.0, 20.0, 5.0, 20.0]]


def entry(identity, image=1, category=3, box=(5, 5, 20, 15), segmentation=SQUARE, **more):
    return {"id": identity, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3],
            "segmentation": segmentation, "iscrowd": 0} | more  # fmt: skip


def content(images=4, extra=()):
    return {
        "images": [
            {"id": i, "file_name": f"{i:012}.png", "height": SIZE[0], "width": SIZE[1]} for i in range(1, images + 1)
        ],
        "annotations": [*(entry(100 + i, image=i) for i in range(1, images + 1)), *extra],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def coco(folder, whole=None, images=4, splits=("train", "val")):
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        (folder / f"{split}2017").mkdir()
        for i in range(1, images + 1):
            pixels = rng.integers(0, 255, (*SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}2017" / f"{i:012}.png")
        text = json.dumps(content(images) if whole is None else whole)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(text)
    return folder


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_the_scenes_come_out_as_pycocotools_reads_them():
    split = object_split("demo", "val")
    theirs = COCO(scenes_folder() / "coco" / "annotations" / "instances_val2017.json")
    assert split.labels == ("top", "trousers", "dress", "footwear", "bag")
    for index in range(0, len(split), 17):
        image, found = split.labelled(index)
        rows = theirs.loadAnns(theirs.getAnnIds(split.image_ids[index]))
        assert image.size == (192, 192)
        x, y, w, h = np.array([row["bbox"] for row in rows], np.float32).T
        np.testing.assert_array_equal(found.boxes, np.stack([x, y, x + w, y + h], 1))
        assert [split.category_ids[label] for label in found.labels] == [row["category_id"] for row in rows]
        np.testing.assert_array_equal(found.masks(), [theirs.annToMask(row) for row in rows])


def test_polygons_runs_crowds_and_boxes_alone_are_masks_as_pycocotools_has_them(tmp_path):
    mask = np.zeros(SIZE, np.uint8)
    mask[3:9, 40:55] = 1
    text = reference.encode(np.asfortranarray(mask))
    two = [*SQUARE, [30.5, 30.2, 50.1, 31.0, 44.4, 39.5]]
    beyond = [[-20.0, -10.0, 30.0, -5.0, 70.0, 55.0, 10.0, 20.0]]
    rows = [
        entry(1, segmentation=two),
        entry(2, segmentation=rle(mask.astype(bool)), iscrowd=1),
        entry(3, segmentation={"size": list(SIZE), "counts": text["counts"].decode()}),
        entry(4, segmentation=beyond, box=(-5, 0, 80, 40)),
        entry(5, segmentation=[], box=(10, 12, 20, 8)),
    ]
    folder = coco(tmp_path / "set", content(1) | {"annotations": rows}, images=1)
    split = object_split(folder, "train")
    theirs = COCO(folder / "annotations" / "instances_train2017.json")
    _, found = split.labelled(0)
    masks = found.masks()
    for row, ours in zip(rows[:4], masks, strict=False):
        np.testing.assert_array_equal(ours, theirs.annToMask(row))
    assert masks[4].sum() == 160
    assert masks[4][12:20, 10:30].all()
    assert found.crowd.tolist() == [False, True, False, False, False]
    assert found.boxes[3].tolist() == [0, 0, 60, 40], "cut to the image"
    assert any("1 boxes" in note for note in split.notes)
    assert any("1 of 5 objects" in note for note in split.notes)
    assert split.objects_of.tolist() == [4]


def test_classes_are_by_ascending_number_and_a_models_by_name(tmp_path):
    folder = coco(tmp_path / "set")
    split = object_split(folder, "train")
    assert (split.labels, split.category_ids) == (("dog", "cat"), (3, 7))
    ours = object_split(folder, "train", ["bird", "cat", "dog"])
    assert ours.labels == ("bird", "cat", "dog")
    assert ours.category_ids == (8, 7, 3)
    assert set(ours.annotations.labels.tolist()) == {2}
    with pytest.raises(UserError, match="'dog'"):
        object_split(folder, "train", ["bird", "cat"])


def test_layouts_of_others_are_found(tmp_path):
    whole = content(10)
    beside = coco(tmp_path / "beside", whole, images=10)
    for split, name in (("train", "train"), ("val", "valid")):
        (beside / f"{split}2017").rename(beside / name)
        (beside / "annotations" / f"instances_{split}2017.json").rename(beside / name / "_annotations.coco.json")
    (beside / "annotations").rmdir()
    assert object_splits(beside) == ("train", "val")
    assert len(object_split(beside, "val")) == 10
    single = coco(tmp_path / "single", whole, images=10, splits=("train",))
    (single / "annotations" / "instances_train2017.json").rename(single / "annotations" / "instances_default.json")
    (single / "train2017").rename(single / "images")
    parts = [object_split(single, name) for name in ("train", "val")]
    assert [len(part) for part in parts] == [8, 2]
    assert parts[1].image_ids == (5, 10)
    assert [len(part.annotations) for part in parts] == [8, 2]
    assert task_of(single) == "detect"
    (single / "annotations" / "instances_all.json").write_text("{}")
    with pytest.raises(UserError, match="no images with objects for train"):
        object_split(single, "train")


def test_a_batch_never_has_upright_and_lying_images_and_each_image_is_in_a_pass(tmp_path):
    whole = content(11)
    for number, image in enumerate(whole["images"]):
        image["height"], image["width"] = (60, 40) if number % 3 == 0 else (40, 60)
    split = object_split(coco(tmp_path / "set", whole, images=11), "train")
    upright = np.array([h > w for h, w in split.sizes])
    assert split.steps(4) == 3
    for number in range(5):
        found = split.batches(4, 0, number)
        assert found.shape == (3, 4)
        assert set(found.ravel().tolist()) == set(range(11))
        assert all(len(set(upright[row].tolist())) == 1 for row in found)
    assert not np.array_equal(split.batches(4, 0, 0), split.batches(4, 0, 1))


def test_an_image_of_another_size_than_its_entry_is_refused(tmp_path):
    folder = coco(tmp_path / "set")
    Image.new("RGB", (SIZE[0], SIZE[1])).save(folder / "train2017" / f"{1:012}.png")
    with pytest.raises(ImageRejected, match="40 x 60 pixels, upright, and its entry says 60 x 40"):
        object_split(folder, "train").labelled(0)


@pytest.mark.parametrize("counts", [[0, 3, 5], [7, 1], [100000, 2, 3, 999, 12, 5], [1, 1, 1, 1, 1, 1, 90, 2, 90]])
def test_compressed_runs_are_read_as_pycocotools_writes_them(counts):
    total = sum(counts)
    text = reference.frPyObjects({"size": [total, 1], "counts": counts}, total, 1)["counts"]
    assert from_text(text.decode()) == counts
    assert from_text(text.decode() + "o") is None, "a length without its end"
    assert from_text("\x00") is None


# ---- D8: entries -----------------------------------------------------------------------------------------------------


def broken(kind):
    whole = content(4)
    if kind in ("images", "annotations", "categories"):
        del whole[kind]
    elif kind == "image twice":
        whole["images"].append(whole["images"][0])
    elif kind == "annotation twice":
        whole["annotations"].append(entry(101))
    elif kind == "category twice":
        whole["categories"].append({"id": 7, "name": "other"})
    elif kind == "image unknown":
        whole["annotations"].append(entry(900, image=77))
    elif kind == "image missing":
        whole["images"].append({"id": 44, "file_name": "gone.png", "height": 40, "width": 60})
    elif kind == "category unknown":
        whole["annotations"].append(entry(901, category=99))
    elif kind == "outside":
        whole["images"].append({"id": 44, "file_name": "../../gone.png", "height": 40, "width": 60})
    return whole


D8 = {
    "JSON": "is no JSON",
    "images": "no list 'images'",
    "annotations": "no list 'annotations'",
    "categories": "no list 'categories'",
    "image twice": "image 1 is there twice",
    "annotation twice": "annotation 101 is there twice",
    "category twice": "two categories of one number",
    "image unknown": "annotation 900 is of image 77",
    "image missing": "image 44, gone.png, is not in",
    "category unknown": "annotation 901 is of category 99",
    "outside": "image 44 lies outside",
}
LEFT_OUT = ("annotation twice", "image unknown", "image missing", "category unknown", "outside")


@pytest.mark.fault("D8", "11 of 11: exit 2, the first offenders with their numbers")
@pytest.mark.parametrize("kind", D8)
def test_entries_that_fit_nothing_are_named_and_refused(kind, tmp_path, capsys):
    folder = coco(tmp_path / "set", broken(kind))
    if kind == "JSON":
        (folder / "annotations" / "instances_train2017.json").write_text('{"images": [')
    command = [
        "train",
        str(folder),
        "--task",
        "detect",
        "--model",
        "nextvit_nano",
        "--weights",
        "none",
        "--epochs",
        "1",
    ]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert D8[kind] in told
    assert "Traceback" not in told
    assert not list((tmp_path / "run").glob("*.ckpt"))
    if kind in LEFT_OUT:
        splits = [object_split(folder, name) for name in ("train", "val")]
        assert [f.count for f in check(splits).findings if f.kind == "entries"] == [2]
        assert quick_check(*splits, allow_bad=True) is not None
        assert len(splits[0]) == len(splits[0].annotations) == 4


# ---- D9 to D11: boxes and masks --------------------------------------------------------------------------------------

NAN = float("nan")
MISSHAPEN = {
    "D9": {
        "no width": entry(500, box=(5, 5, 0, 10)),
        "negative": entry(500, box=(5, 5, 10, -3)),
        "undefined": entry(500, box=(5, NAN, 10, 10)),
        "outside": entry(500, box=(70, 5, 10, 10)),
        "three numbers": entry(500) | {"bbox": [1, 2, 3]},
        "text": entry(500) | {"bbox": "1 2 3 4"},
    },
    "D10": {
        "far out": entry(500, segmentation=[[2e8, 5, 2e8, 9, 30, 9]]),
        "two points": entry(500, segmentation=[[1, 2, 3, 4]]),
        "odd": entry(500, segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "undefined": entry(500, segmentation=[[1, 2, 3, NAN, 5, 6]]),
        "outside": entry(500, segmentation=[[-30, -30, -20, -30, -20, -20], [70, 5, 90, 5, 90, 9]]),
        "text": entry(500, segmentation=[["1", "2", "3", "4", "5", "6"]]),
        "number": entry(500, segmentation=3),
    },
    "D11": {
        "too short": entry(500, segmentation={"size": list(SIZE), "counts": [5, 6]}),
        "negative": entry(500, segmentation={"size": list(SIZE), "counts": [-5, 2405]}),
        "garbage": entry(500, segmentation={"size": list(SIZE), "counts": "\x01\x02 nonsense"}),
        "short text": entry(500, segmentation={"size": list(SIZE), "counts": "52203"}),
        "huge": entry(500, segmentation={"size": [100000, 100000], "counts": [10**10]}),
        "crowd too short": entry(500, segmentation={"size": list(SIZE), "counts": [5, 6]}, iscrowd=1),
    },
}
CASES = [(row, kind) for row, kinds in MISSHAPEN.items() for kind in kinds]


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_objects_that_are_none_are_left_out_with_a_count(row, kind, tmp_path):
    bad = MISSHAPEN[row][kind]
    split = object_split(coco(tmp_path / "set", content(4, [bad])), "train")
    assert len(split.annotations) == 4
    assert [text.startswith("annotation 500 of 000000000001.png: ") for text in split.misshapen] == [True]
    for index in range(4):
        split.labelled(index)[1].masks()
    with pytest.raises(UserError, match="1 of 5 objects of train are none: annotation 500"):
        quick_check(split, split)
    assert "1 of 5 objects" in quick_check(split, split, allow_bad=True)[0]
    assert [f.count for f in check([split]).findings if f.kind == "objects"] == [1]


@pytest.mark.fault("D9", "dropped with a count; over 1 % exit 2")
@pytest.mark.fault("D10", "checked before the library that ends on it")
@pytest.mark.fault("D11", "refused; a short one is never used")
def test_below_a_hundredth_they_are_a_note(tmp_path):
    many = [entry(1000 + n) for n in range(2000)]
    bad = [copy.deepcopy(MISSHAPEN[row][kind]) | {"id": n} for n, (row, kind) in enumerate(CASES)]
    split = object_split(coco(tmp_path / "set", content(4, [*many, *bad])), "train")
    assert len(split.misshapen) == len(CASES)
    notes = quick_check(split, split)
    assert f"{len(CASES)} of {2004 + len(CASES)} objects of train are none" in notes[0]
    with pytest.raises(UserError, match="are none"):
        quick_check(split, split, strict=True)


# ---- conversion ------------------------------------------------------------------------------------------------------


def voc(folder):
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number in range(6):
        picture = Image.new("RGB", (60, 40), "white")
        ImageDraw.Draw(picture).rectangle((10, 5, 29, 24), fill="red")
        picture.save(folder / "JPEGImages" / f"im{number}.jpg")
        (folder / "Annotations" / f"im{number}.xml").write_text(
            "<annotation><size><width>60</width><height>40</height></size><object><name>red</name><bndbox><xmin>11</xmin>"
            "<ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>"
        )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("im0\nim1\nim2\nim3\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("im4\nim5\n")
    return folder


def yolo(folder):
    for split, count in (("train", 4), ("val", 2)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (60, 40), "white").save(folder / "images" / split / f"{number}.png")
            (folder / "labels" / split / f"{number}.txt").write_text(
                f"0 {20 / 60} {15 / 40} {20 / 60} {20 / 40}\n1 0.5 0.5 0.75 0.5 0.75 0.75\n"
            )
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: red, 1: blue}\n")
    return folder


def test_pascal_voc_becomes_coco(tmp_path, capsys):
    assert main(["data", "convert", str(voc(tmp_path / "voc")), "--output", str(tmp_path / "coco")]) == 0
    assert "train: 4 images" in capsys.readouterr().out
    split = object_split(tmp_path / "coco", "train")
    assert (len(split), split.labels) == (4, ("red",))
    image, found = split.labelled(0)
    assert found.boxes.tolist() == [[10, 5, 30, 25]]
    inside = np.asarray(image)[found.masks()[0].astype(bool)].mean(0)
    assert inside[0] > 220
    assert inside[1] < 40, "VOC counts pixels from 1"


def test_yolo_becomes_coco(tmp_path):
    assert convert(yolo(tmp_path / "yolo"), tmp_path / "coco") == {"train": 4, "val": 2}
    split = object_split(tmp_path / "coco", "val")
    assert split.labels == ("red", "blue")
    _, found = split.labelled(0)
    np.testing.assert_allclose(found.boxes, [[10, 5, 30, 25], [30, 20, 45, 30]], atol=1e-4)
    assert found.masks()[1].sum() == pytest.approx(75, abs=15)


def test_yolos_lists_of_folders_and_names_that_yaml_has_for_other_things(tmp_path):
    folder = yolo(tmp_path / "yolo")
    (folder / "data.yaml").write_text("train: [images/train, images/val]\nval: images/val\nnames: [yes, 1]\n")
    (folder / "another.yaml").write_text("a: b\n")
    (folder / "labels" / "val" / "1.txt").write_text("1.0 0.5 0.5 0.2 0.2\n")
    assert convert(folder, tmp_path / "coco") == {"train": 6, "val": 2}
    assert object_split(tmp_path / "coco", "val").labels == ("yes", "1")


def test_images_without_any_labels_are_no_yolo_set(tmp_path):
    folder = yolo(tmp_path / "yolo")
    shutil.rmtree(folder / "labels")
    with pytest.raises(
        UserError, match="no image of .*data.yaml has labels; they would be such as .*labels/train/0.txt"
    ):
        convert(folder, tmp_path / "coco")


def test_pascal_vocs_trainval_alone_is_divided_and_empty_lists_are_told(tmp_path):
    folder = voc(tmp_path / "voc")
    lists = folder / "ImageSets" / "Main"
    (lists / "train.txt").write_text("")
    (lists / "val.txt").write_text("")
    with pytest.raises(UserError, match="the lists in .* name no images"):
        convert(folder, tmp_path / "coco")
    (lists / "trainval.txt").write_text("im0\nim1\nim2\nim3\nim4\n")
    assert convert(folder, tmp_path / "coco") == {"train": 4, "val": 1}


@pytest.mark.parametrize(("make", "told"), [(None, "there is no folder"), (coco, "COCO's layout needs no conversion")])
def test_what_needs_no_conversion_is_told(make, told, tmp_path):
    if make:
        make(tmp_path / "set")
    with pytest.raises(UserError, match=told):
        convert(tmp_path / "set", tmp_path / "new")


@pytest.mark.parametrize("key", ["id", "image_id", "category_id"])
def test_numbers_beyond_64_bits_fit_nothing(key, tmp_path):
    split = object_split(coco(tmp_path / "set", content(4, [entry(500) | {key: 2**63}])), "train")
    assert len(split.annotations) == 4
    assert len(split.faults) == 1


@pytest.mark.parametrize("where", ["images", "categories"])
def test_images_and_categories_beyond_64_bits_are_refused(where, tmp_path):
    whole = content(4)
    whole[where][0]["id"] = 2**70
    with pytest.raises(UserError, match="64 bits"):
        object_split(coco(tmp_path / "set", whole), "train")


def test_a_file_too_deep_to_be_read_says_so(tmp_path):
    folder = coco(tmp_path / "set")
    (folder / "annotations" / "instances_train2017.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no JSON: maximum recursion depth"):
        object_split(folder, "train")


def test_crowds_alone_teach_nothing(tmp_path):
    whole = content(4)
    for one in whole["annotations"]:
        one["iscrowd"] = 1
    split = object_split(coco(tmp_path / "set", whole), "train")
    with pytest.raises(UserError, match="none of 4 images of train has an object that is no crowd; nothing is learnt"):
        quick_check(split, split)


def test_classes_that_train_lacks_are_found(tmp_path):
    folder = coco(tmp_path / "set")
    file = folder / "annotations" / "instances_val2017.json"
    whole = content(4)
    whole["categories"].append({"id": 9, "name": "cow"})
    file.write_text(json.dumps(whole))
    found = check([object_split(folder, name) for name in ("train", "val")])
    (finding,) = [finding for finding in found.findings if finding.kind == "other classes"]
    assert (finding.serious, finding.examples) == (True, ("cow in val",))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("yolo/labels/train/1.txt", "0 0.5 0.5 nonsense 1", "1.txt, line 1 is no list of numbers"),
        ("yolo/labels/train/1.txt", "7 0.5 0.5 0.1 0.1", "line 1 has a class or a place that is none"),
        ("yolo/labels/train/1.txt", "0 0.5 0.5 0.1", "3 numbers behind the class"),
        ("yolo/data.yaml", "names: 3", "no names of the classes"),
        ("yolo/data.yaml", "names: [a, b]\ntrain: nowhere", "nowhere, which is not there"),
        ("voc/Annotations/im1.xml", "<annotation>", "is no XML"),
        ("voc/Annotations/im1.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "declares a document type"),
        (
            "voc/Annotations/im1.xml",
            "<annotation><size><width>9</width><height>9</height></size></annotation>",
            "9 x 9",
        ),
        ("voc/ImageSets/Main/val.txt", "absent", "no image absent"),
        ("yolo/data.yaml", "names: [a, b]\nkpt_shape: [4, 3]\ntrain: images/train", "is of poses"),
        ("yolo/data.yaml", "names: [a, b]\ntrain: {a: b}", "train is neither a folder nor a list of folders"),
        ("yolo/data.yaml", "names: [a, b]\ntrain: [images/train", "is not plain YAML: while parsing .* line 2"),
        ("yolo/labels/train/1.txt", "0 0.5 0.5 -0.3 0.1", "a box has sides of -18 x 4 pixels"),
        ("yolo/labels/train/1.txt", "0.5 0.5 0.5 0.1 0.1", "line 1 has a class or a place that is none"),
        (
            "voc/Annotations/im1.xml",
            "<annotation><object><name>red</name><bndbox><xmin>30</xmin><ymin>6</ymin><xmax>11</xmax><ymax>25</ymax>"
            "</bndbox></object></annotation>",
            "a box has sides of -18 x 20 pixels",
        ),
    ],
)
def test_labels_that_cannot_be_read_leave_nothing_behind(name, text, told, tmp_path):
    voc(tmp_path / "voc"), yolo(tmp_path / "yolo")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="(?s)" + told):
        convert(tmp_path / name.partition("/")[0], tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["voc", "yolo"]
