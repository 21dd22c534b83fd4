"""Looking after folders of images: each fault that is planted is found, and nothing else is."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextvit.data.check import check
from nextvit.data.sets import read_split, read_splits
from nextvit.errors import UserError
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.train import train
from tests.conftest import nextvit_here


def picture(seed: int, side: int = 64) -> Image.Image:
    """Smooth, with structure: what hashes are made for."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path) -> Path:
    """train/ and val/ of two classes with different pictures, and nothing wrong with them."""
    folder, seed = tmp_path / "data", 0
    for split, count in (("train", 8), ("val", 4)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                picture(seed := seed + 1).save(folder / split / label / f"{index}.png")
    return folder


def found(data: Path) -> dict[str, tuple[str, ...]]:
    return {finding.kind: finding.examples for finding in check(read_splits(data)).findings}


def test_nothing_is_found_where_nothing_is_wrong(data):
    done = nextvit_here("data", "check", data)
    assert done.returncode == 0
    assert "nothing to mend" in done.stdout
    assert "8 to 8" not in done.stdout
    assert found(data) == {}


@pytest.mark.fault("D5", "unreadable files of four kinds are found by decoding them whole, before epoch 1")
def test_files_that_cannot_be_decoded_are_found(data):
    folder = data / "train" / "a"
    picture(99).save(folder / "cut.jpg", quality=95)
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "zeros.png").write_bytes(b"\0" * 3000)
    told = found(data)
    assert set(told) == {"unreadable"}
    assert sorted(Path(line.split(" ")[0]).name for line in told["unreadable"]) == [
        "cut.jpg", "empty.jpg", "text.png", "zeros.png",
    ]  # fmt: skip
    recipe = read_recipe("default", ["images.size=32"])
    with pytest.raises(UserError, match="4 of 20 images of train cannot be read"):
        train(data, recipe, data.parent / "run", machine=Machine(workers=0))
    assert not (data.parent / "run").exists()


@pytest.mark.fault(
    "D7", "the same file in train and val (copy, hard link, renamed): 10 of 10 found; --strict-data: exit 2"
)
def test_files_in_two_splits_are_found(data):
    for index in range(4):
        shutil.copy(data / "train" / "a" / f"{index}.png", data / "val" / "a" / f"copy-{index}.png")
        os.link(data / "train" / "b" / f"{index}.png", data / "val" / "b" / f"link-{index}.png")
    for index in (4, 5):
        shutil.copy(data / "train" / "a" / f"{index}.png", data / "val" / "b" / f"{index}-other.jpg")
    checked = check(read_splits(data))
    (same,) = (finding for finding in checked.findings if finding.kind == "same in two splits")
    assert (same.count, same.serious, checked.serious) == (10, True, True)
    done = nextvit_here("data", "check", data, "--strict")
    assert (done.returncode, "10 images lie in two splits" in done.stdout) == (2, True)
    flags = ["--image-size", 32, "--epochs", 1, "--workers", 0]
    done = nextvit_here("train", data, "--output", data.parent / "strict", "--strict-data", *flags)
    assert (done.returncode, "10 images are in train and val both" in done.stderr) == (2, True)
    done = nextvit_here("train", data, "--output", data.parent / "run", *flags)
    assert (done.returncode, "10 images are in train and val both" in done.stderr) == (0, True)


def test_pictures_that_look_the_same_are_found_and_others_are_not(data):
    for index, change in enumerate(("smaller", "jpeg", "brighter")):
        image = Image.open(data / "train" / "a" / f"{index}.png")
        if change == "smaller":
            image = image.resize((50, 50), Image.Resampling.BICUBIC)
        elif change == "brighter":
            image = image.point(lambda level: min(255, int(level * 1.05)))
        image.save(data / "val" / "a" / f"near-{index}.jpg", quality=60 if change == "jpeg" else 95)
    told = found(data)
    assert set(told) == {"near duplicates"}
    assert sorted(line.rsplit("near-", 1)[1] for line in told["near duplicates"]) == ["0.jpg", "1.jpg", "2.jpg"]


@pytest.mark.fault("D2", "an empty class is kept and told; hidden folders are left out; a lone file is told")
def test_classes_without_images_uneven_ones_and_small_images_are_told(data):
    (data / "train" / "c").mkdir()
    (data / "train" / ".ipynb_checkpoints").mkdir()
    picture(500).save(data / "train" / ".ipynb_checkpoints" / "x.png")
    (data / "train" / "lone.png").write_bytes(b"")
    for index in range(80):
        picture(1000 + index, 20).save(data / "train" / "b" / f"more-{index}.png")
    checked = check(read_splits(data))
    kinds = {finding.kind: finding for finding in checked.findings}
    assert set(kinds) == {"empty class", "imbalance", "small", "elsewhere"}
    assert not checked.serious
    assert kinds["empty class"].examples[0] == "c in train"
    assert kinds["imbalance"].examples == ("train: 88 of b, 8 of a",)
    assert kinds["small"].count == 80
    assert read_split(data, "train").labels == ("a", "b", "c")


def test_the_page_and_the_json_say_what_the_terminal_says(data, tmp_path):
    shutil.copy(data / "train" / "a" / "0.png", data / "val" / "b" / "<b>.png")
    done = nextvit_here("data", "check", data, "--json", "--output", tmp_path / "check.html")
    told = json.loads(done.stdout)
    assert told["serious"] is True
    assert told["splits"]["val"] == {"a": 4, "b": 5}
    page = (tmp_path / "check.html").read_text()
    assert "1 images lie in two splits" in page
    assert "&lt;b&gt;.png" in page
    assert "<b>" not in page


def test_a_single_folder_is_checked_as_training_would_split_it(garment_folder):
    done = nextvit_here("data", "check", garment_folder, "--json")
    told = json.loads(done.stdout)
    assert {name: sum(by.values()) for name, by in told["splits"].items()} == {"train": 48, "val": 12}


def test_what_is_no_data_set_is_refused(tmp_path):
    done = nextvit_here("data", "check", tmp_path / "none")
    assert (done.returncode, "there is no folder" in done.stderr) == (2, True)
