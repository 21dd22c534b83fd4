"""The composed scenes: what masks, boxes and files say is what the images show, the same every time."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from nextvit.data import scenes
from nextvit.data.rle import rle
from nextvit.data.scenes import GROUPS, SIZE, Scene, compose, scenes_folder

TRAIN, VAL = 6, 3  # scenes on disk
PARTS = {"train": ("training", TRAIN), "val": ("validation", VAL)}


@pytest.fixture(scope="module")
def some() -> list[Scene]:
    return [compose("train", index) for index in range(40)] + [compose("val", index) for index in range(20)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield scenes_folder(TRAIN, VAL)


def decoded(segmentation: dict) -> np.ndarray:
    """bool (H, W) of COCO's uncompressed run lengths."""
    height, width = segmentation["size"]
    flat, value = [], False
    for run in segmentation["counts"]:
        flat += [value] * run
        value = not value
    assert len(flat) == height * width
    return np.array([[flat[x * height + y] for x in range(width)] for y in range(height)])


# ---- one scene -------------------------------------------------------------------------------------------------------


def test_a_scene_is_the_same_every_time():
    first = compose("train", 3)
    compose("val", 3)
    again = compose("train", 3)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert first.labels == again.labels


def test_a_scene_is_the_same_in_another_process():
    code = "import zlib; from nextvit.data.scenes import compose; print(zlib.crc32(compose('val', 5).image.tobytes()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == zlib.crc32(compose("val", 5).image.tobytes())


@pytest.mark.parametrize(
    ("split", "index", "labels", "boxes"),
    [
        ("train", 0, (0, 0, 0), [[33, 31, 63, 111], [82, 98, 60, 80], [135, 18, 53, 66]]),
        ("train", 7, (3, 0, 2, 2), [[36, 41, 56, 40], [19, 92, 40, 65], [66, 110, 33, 62], [84, 11, 47, 74]]),
        ("val", 0, (4, 2), [[25, 96, 113, 57], [130, 49, 39, 91]]),
        ("val", 7, (3,), [[46, 78, 130, 88]]),
    ],
)
def test_the_scenes_stay_those_that_results_were_measured_on(split, index, labels, boxes):
    scene = compose(split, index)
    assert scene.labels == labels
    np.testing.assert_allclose(scene.boxes, boxes, atol=1)  # decoders and resizers may differ by a rounding


def test_splits_and_indices_differ():
    images = [compose(split, index).image.tobytes() for split in ("train", "val") for index in range(5)]
    assert len(set(images)) == len(images)


def test_masks_share_no_pixel_and_keep_at_least_64(some):
    for scene in some:
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.dtype == bool
        assert scene.masks.shape == (len(scene.labels), SIZE, SIZE)
        assert scene.masks.sum(0).max() == 1
        assert scene.masks.sum((1, 2)).min() >= 64


def test_a_mask_is_what_stays_visible(monkeypatch):
    """Garments of one pure colour each, over black: a pixel's colour tells which garment is seen there."""
    colours = np.float32([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    enlarged = scenes._enlarged

    def flat(*arguments):
        light, cover = enlarged(*arguments)
        return np.ones_like(light), cover

    def anywhere(mask, masks, areas):
        overlaps.append(any((mask & below).any() for below in masks))
        return True

    monkeypatch.setattr(scenes, "_background", lambda split, rng: np.zeros((SIZE, SIZE, 3), np.float32))
    monkeypatch.setattr(scenes, "_enlarged", flat)
    monkeypatch.setattr(scenes, "_fits", anywhere)
    overlaps: list[bool] = []
    for index in range(12):
        drawn = iter(colours)
        monkeypatch.setattr(scenes, "_tint", lambda rng, drawn=drawn: next(drawn))
        scene = compose("train", index)
        pure = np.array([(scene.image == colour).all(-1) for colour in colours[: len(scene.masks)]])
        assert not (pure & ~scene.masks).any()
        assert (scene.masks & ~pure).sum() < 0.3 * scene.masks.sum()  # the soft edges
        if len(scene.masks) == 1:
            np.testing.assert_array_equal(scene.masks[0], scene.image.max(-1) >= 128)
    assert any(overlaps)


def test_where_no_garment_is_the_photograph_is_untouched(monkeypatch):
    backgrounds = []
    background = scenes._background

    def kept(*arguments):
        backgrounds.append(background(*arguments))
        return backgrounds[-1].copy()

    monkeypatch.setattr(scenes, "_background", kept)
    scene = compose("train", 1)
    near = scene.masks.any(0)
    for _ in range(4):  # pixels of the soft edge
        padded = np.pad(near, 1)
        near = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    same = (scene.image == backgrounds[0].round()).all(-1)
    assert same[~near].all()
    assert same[scene.masks.any(0)].mean() < 0.05


def test_boxes_are_tight_around_masks(some):
    for scene in some:
        for (x, y, width, height), mask in zip(scene.boxes, scene.masks, strict=True):
            inside = mask[y : y + height, x : x + width]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_labels_are_groups_and_each_group_occurs(some):
    assert {label for scene in some for label in scene.labels} == set(range(len(GROUPS)))


def test_every_class_of_garment_is_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(scenes.garments("train"))


def test_scenes_hold_one_to_four_garments(some):
    assert {len(scene.labels) for scene in some} == {1, 2, 3, 4}


def test_some_objects_are_large_in_cocos_sense(some):
    areas = np.concatenate([scene.masks.sum((1, 2)) for scene in some])
    assert 0.04 < (areas > 96 * 96).mean() < 0.2
    assert (areas < 32 * 32).mean() < 0.1


def test_train_and_val_share_no_background():
    train, val = scenes._photographs("train"), scenes._photographs("val")
    assert (len(train), len(val)) == (6, 3)
    assert not {photograph.tobytes() for photograph in train} & {photograph.tobytes() for photograph in val}


def test_only_train_backgrounds_are_varied():
    def crops(split: str) -> list[bool]:
        """Whether a background is a crop of a photograph as it is."""
        found = []
        for seed in range(6):
            background = scenes._background(split, np.random.default_rng(seed))
            found.append(any(contains(photograph, background) for photograph in scenes._photographs(split)))
        return found

    def contains(photograph: np.ndarray, crop: np.ndarray) -> bool:
        height, width = (side - SIZE + 1 for side in photograph.shape[:2])
        corners = (photograph[:height, :width] == crop[0, 0]).all(-1)
        return any((photograph[y : y + SIZE, x : x + SIZE] == crop).all() for y, x in np.argwhere(corners))

    assert all(crops("val"))
    assert not any(crops("train"))


def test_a_cut_out_has_no_holes_and_is_one_piece_and_keeps_legs_apart():
    grey, mask = scenes._cut_out("val", "trouser", 0)
    assert grey.shape == mask.shape
    legs = mask[-4]
    assert np.count_nonzero(np.diff(legs.astype(int)) == 1) == 2
    for tile in range(10):
        _, mask = scenes._cut_out("val", "bag", tile)
        corner, first = np.zeros(mask.shape, bool), np.zeros(mask.size, bool)
        corner[0, 0] = first[mask.argmax()] = True
        np.testing.assert_array_equal(scenes._joined(corner, ~mask), ~mask)
        np.testing.assert_array_equal(scenes._joined(first.reshape(mask.shape), mask), mask)


def test_the_run_lengths_decode_to_the_mask(some):
    odd = np.array([[True, False, True], [True, True, False]])  # not square, and an object in the first pixel
    assert rle(odd) == {"size": [2, 3], "counts": [0, 2, 1, 2, 1]}
    for mask in (odd, np.zeros((2, 3), bool), np.ones((2, 3), bool), *some[0].masks, *some[-1].masks):
        np.testing.assert_array_equal(decoded(rle(mask)), mask)


# ---- the set on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", PARTS)
def test_the_ade20k_annotation_equals_the_masks(written, split):
    part, count = PARTS[split]
    annotations = sorted((written / "ade20k" / "annotations" / part).iterdir())
    images = sorted((written / "ade20k" / "images" / part).iterdir())
    assert [path.stem for path in annotations] == [path.stem for path in images]
    assert len(annotations) == count
    for index, path in enumerate(annotations):
        scene = compose(split, index)
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            labels = np.asarray(image)
        expected = np.ones((SIZE, SIZE), int)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            expected[mask] = 2 + label
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("split", PARTS)
def test_the_images_on_disk_are_the_scenes(written, split):
    part, count = PARTS[split]
    for index, path in enumerate(sorted((written / "ade20k" / "images" / part).iterdir())):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert np.abs(np.asarray(image, float) - compose(split, index).image).mean() < 5


def test_object_info_counts_what_the_annotations_hold(written):
    header, *rows = (line.split("\t") for line in (written / "ade20k" / "objectInfo.txt").read_text().splitlines())
    assert header == ["Idx", "Ratio", "Train", "Val", "Name"]
    assert [(row[0], row[4]) for row in rows] == [(str(i), n) for i, n in enumerate(("background", *GROUPS), 1)]
    maps = {}
    for split, (part, _) in PARTS.items():
        files = sorted((written / "ade20k" / "annotations" / part).iterdir())
        maps[split] = np.array([np.asarray(Image.open(path)) for path in files])
    for row in rows:
        held = {split: labels == int(row[0]) for split, labels in maps.items()}
        assert [int(row[2]), int(row[3])] == [held[split].any((1, 2)).sum() for split in PARTS]
        assert float(row[1]) == pytest.approx(np.concatenate(list(held.values())).mean(), abs=1e-4)


def test_the_json_is_valid_coco_and_equals_the_scenes(written):
    image_ids, annotation_ids = [], []
    for split, (_, count) in PARTS.items():
        data = json.loads((written / "coco" / "annotations" / f"instances_{split}2017.json").read_text())
        assert [(c["id"], c["name"]) for c in data["categories"]] == list(enumerate(GROUPS, 1))
        assert len(data["images"]) == count
        image_ids += [image["id"] for image in data["images"]]
        annotation_ids += [annotation["id"] for annotation in data["annotations"]]
        assert {a["image_id"] for a in data["annotations"]} <= {image["id"] for image in data["images"]}
        for index, image in enumerate(data["images"]):
            scene = compose(split, index)
            with Image.open(written / "coco" / f"{split}2017" / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
            own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
            assert [a["category_id"] - 1 for a in own] == list(scene.labels)
            assert [a["bbox"] for a in own] == scene.boxes.tolist()
            assert [a["area"] for a in own] == scene.masks.sum((1, 2)).tolist()
            assert {a["iscrowd"] for a in own} == {0}
            for annotation, mask in zip(own, scene.masks, strict=True):
                np.testing.assert_array_equal(decoded(annotation["segmentation"]), mask)
    assert len(set(image_ids)) == len(image_ids)
    assert len(set(annotation_ids)) == len(annotation_ids)


def test_the_images_are_stored_once_where_the_file_system_can(written):
    for split, (part, _) in PARTS.items():
        pairs = zip(
            sorted((written / "ade20k" / "images" / part).iterdir()),
            sorted((written / "coco" / f"{split}2017").iterdir()),
            strict=True,
        )
        assert all(one.samefile(other) for one, other in pairs)


def test_without_hard_links_the_images_are_copied(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no hard links here")

    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes.os, "link", refused)
    folder = scenes_folder(1, 1)
    images = [*folder.glob("ade20k/images/*/*.jpg")], [*folder.glob("coco/*2017/*.jpg")]
    assert sorted(path.read_bytes() for path in images[0]) == sorted(path.read_bytes() for path in images[1])
    assert len(images[1]) == 2


def test_the_folder_is_made_once_and_never_left_unfinished(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "rle", lambda mask: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scenes_folder(1, 1)
    assert list(tmp_path.iterdir()) == []
    folder = scenes_folder(1, 1)
    monkeypatch.setattr(scenes, "_write", lambda *_: pytest.fail("written again"))
    assert scenes_folder(1, 1) == folder
    assert list(tmp_path.iterdir()) == [folder]
