"""Folders of images and masks: every layout is read as it is, and what does not fit is named."""

import numpy as np
import pytest
from PIL import Image

from nextvit import class_names
from nextvit.data.masks import IGNORED, MaskRejected, mask_split, mask_splits
from nextvit.data.scenes import GROUPS
from nextvit.errors import UserError

NAMES = ("sky", "road", "tree")
COLOURS = {"sky": (0, 0, 255), "road": (90, 90, 90), "tree": (0, 255, 0), "ignored": (0, 0, 0)}


def save(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def write(root, layout, count=5, size=(8, 6), mask=None):
    """`count` images with masks, whose labels differ from image to image."""
    rng = np.random.default_rng(0)
    kept = []
    for i in range(count):
        labels = rng.integers(0, len(NAMES), size[::-1]).astype(np.uint8)
        labels[0, 0] = IGNORED
        kept.append(labels)
        save(root / layout.format("images") / f"{i}.jpg", rng.integers(0, 255, (*size[::-1], 3)).astype(np.uint8))
        save(root / layout.format("masks") / f"{i}.png", labels if mask is None else mask(labels))
    return kept


@pytest.mark.parametrize("layout", ["train/{}", "{}/train"])
def test_images_and_masks_below_or_above_the_name_of_the_split(layout, tmp_path):
    kept = write(tmp_path, layout)
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(NAMES).encode())  # as Windows writes it
    split = mask_split(tmp_path, "train")
    assert (split.labels, len(split), mask_splits(tmp_path)) == (NAMES, 5, ("train",))
    for index, labels in enumerate(kept):
        image = split.read(index)
        np.testing.assert_array_equal(split.labels_of(index, image.size), labels)


def test_a_single_folder_holds_every_fifth_image_out(tmp_path):
    write(tmp_path, "{}", count=11)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    train, val = (mask_split(tmp_path, name) for name in ("train", "val"))
    assert mask_splits(tmp_path) == ("train", "val")
    assert len(val) == 2
    assert sorted([*train.files, *val.files]) == sorted((tmp_path / "images").iterdir())
    assert not set(train.masks) & set(val.masks)
    with pytest.raises(UserError, match="no images and masks for test"):
        mask_split(tmp_path, "test")


def test_colours_are_classes_by_the_table(tmp_path):
    lookup = np.zeros((256, 3), np.uint8)
    for index, name in enumerate(NAMES):
        lookup[index] = COLOURS[name]
    kept = write(tmp_path, "train/{}", mask=lambda labels: lookup[labels])
    rows = [f"{name},{','.join(map(str, colour))}" for name, colour in COLOURS.items()]
    (tmp_path / "colours.csv").write_text("\n".join(["name,red,green,blue", rows[3], *rows[:3]]))  # any order of rows
    split = mask_split(tmp_path, "train")
    assert split.labels == NAMES
    for index, labels in enumerate(kept):
        np.testing.assert_array_equal(split.labels_of(index, (8, 6)), labels)
    save(split.masks[2], np.full((6, 8, 3), 7, np.uint8))
    with pytest.raises(
        MaskRejected, match=r"2\.png has 48 pixels of colours that colours\.csv has not, such as \(7, 7, 7\)"
    ):
        split.labels_of(2, (8, 6))


def test_ade20ks_zero_is_no_class(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    labels = np.array([[0, 1, 2], [149, 150, 255]], np.uint8)
    save(root / "images" / "validation" / "ADE_val_1.jpg", np.zeros((2, 3, 3), np.uint8))
    save(root / "annotations" / "validation" / "ADE_val_1.png", labels)
    split = mask_split(tmp_path, "val")
    assert split.labels == class_names.ade20k()
    np.testing.assert_array_equal(split.labels_of(0, (3, 2)), [[255, 0, 1], [148, 149, 255]])
    with pytest.raises(UserError, match="no images and masks for train"):
        mask_split(tmp_path, "train")


def test_the_shipped_scenes_are_read_as_ade20k(monkeypatch):
    from nextvit.data import masks, scenes

    monkeypatch.setattr(masks, "scenes_folder", lambda: scenes.scenes_folder(6, 3))
    split = mask_split("demo", "val")
    assert split.labels == ("background", *GROUPS)
    scene = scenes.compose("val", 1)
    expected = scenes.annotation_map(scene) - 1
    np.testing.assert_array_equal(split.labels_of(1, split.read(1).size), expected)


@pytest.mark.parametrize(
    ("pixels", "how", "told"),
    [
        (np.zeros((6, 9), np.uint8), {}, r"has 9 x 6 pixels and its image, upright, 8 x 6"),
        (
            np.full((6, 8), 3, np.uint8),
            {},
            r"has 48 pixels of values that are no class, the first is 3; there are 3 .*from 1",
        ),
        (np.zeros((6, 8), np.uint16), {}, r"has more than 8 bits a pixel"),
        (np.zeros((6, 8, 3), np.uint8), {}, r"has colours; a mask holds class numbers"),
        (np.zeros((6, 8), np.uint8), {"format": "JPEG"}, r"is a JPEG, which changes labels"),
    ],
    ids=["another size", "a value that is no class", "16 bits", "colours", "JPEG"],
)
def test_a_mask_that_does_not_fit_is_named(pixels, how, told, tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    split = mask_split(tmp_path, "train")
    save(split.masks[3], pixels, **how)
    with pytest.raises(MaskRejected, match=rf"3\.png {told}"):
        split.labels_of(3, (8, 6))


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "cut short"])
def test_a_mask_that_cannot_be_read_is_named(content, tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    split = mask_split(tmp_path, "train")
    split.masks[1].write_bytes(split.masks[1].read_bytes()[:-30] if content is None else content)
    with pytest.raises(MaskRejected, match=r"1\.png cannot be read"):
        split.labels_of(1, (8, 6))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: save(root / "train/images/2.bmp", np.zeros((6, 8, 3), np.uint8)), r"two images of one name"),
        (lambda root: save(root / "train/masks/2.bmp", np.zeros((6, 8), np.uint8)), r"two masks of one name"),
        (lambda root: (root / "labels.txt").unlink(), r"neither labels\.txt nor colours\.csv"),
        (lambda root: (root / "labels.txt").write_text("a\na\nb"), r"must name two to 254 classes, each once"),
        (lambda root: (root / "labels.txt").write_bytes(b"\xff\xfe"), r"cannot be read as text"),
    ],
)
def test_a_folder_that_does_not_fit_is_told(change, told, tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    change(tmp_path)
    with pytest.raises(UserError, match=told):
        mask_split(tmp_path, "train")


def test_images_without_masks_and_masks_without_images_are_named_and_left_out(tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    (tmp_path / "train/masks/2.png").unlink()
    (tmp_path / "train/images/4.jpg").unlink()
    split = mask_split(tmp_path, "train")
    assert {file.stem for file in split.files} == {mask.stem for mask in split.masks} == {"0", "1", "3"}
    without, alone = split.faults
    assert "2.jpg has no mask of the same name in" in without
    assert "4.png has no image of the same name in" in alone


@pytest.mark.parametrize(
    "rows",
    ["name,red\nsky,1", "name,red,green,blue\nsky,1,2,x\nroad,1,2,3", "name,red,green,blue\nsky,1,2,3\nroad,1,2,3"],
)
def test_a_table_of_colours_that_does_not_fit_is_told(rows, tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "colours.csv").write_text(rows)
    with pytest.raises(UserError, match=r"colours\.csv must have"):
        mask_split(tmp_path, "train")


def test_other_classes_than_the_models_are_refused(tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    with pytest.raises(UserError, match="other classes than the model: 'road' where the model has 'rail'"):
        mask_split(tmp_path, "train", ("sky", "rail", "tree"))


def test_the_fingerprint_tells_pairs_apart(tmp_path):
    write(tmp_path, "train/{}")
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    before = mask_split(tmp_path, "train").sha256
    assert mask_split(tmp_path, "train").sha256 == before
    (tmp_path / "train/masks/4.png").rename(tmp_path / "train/masks/5.png")
    (tmp_path / "train/images/4.jpg").rename(tmp_path / "train/images/5.jpg")
    assert mask_split(tmp_path, "train").sha256 != before
