"""Images and folders: every kind of file is read right or rejected by name, and every file is accounted for."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from nextvit import class_names
from nextvit.data.demo_images import demo_folder, garments
from nextvit.data.images import ImageRejected, preprocess, read_image
from nextvit.data.loader import batches, eval_transform
from nextvit.data.sets import read_split
from nextvit.data.sources import expand
from nextvit.errors import UserError
from nextvit.exporters.parity import real_images
from nextvit.metadata import Metadata, Preprocess


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """A colour photograph that is not square."""
    return real_images()[-3].crop((0, 0, 96, 64))


def difference(found: Image.Image, expected: Image.Image) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photograph, orientation, tmp_path):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that makes the stored pixels
    stored = photograph if orientation == 1 else photograph.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "i.png", exif=exif)
    assert difference(read_image(tmp_path / "i.png"), photograph) == 0


def test_corrupt_exif_leaves_the_pixels_as_they_are(photograph, tmp_path):
    photograph.save(tmp_path / "i.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert difference(read_image(tmp_path / "i.png"), photograph) == 0


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_and_not_clipped(photograph, suffix, tmp_path):
    grey = photograph.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / f"i.{suffix}")
    assert difference(read_image(tmp_path / f"i.{suffix}"), grey.convert("RGB")) <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with transparency"])
def test_alpha_is_laid_over_white(mode, tmp_path):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    if mode == "P with transparency":
        palette = Image.new("P", (40, 40), 0)
        palette.putpalette([0, 0, 0, 200, 0, 0])
        palette.paste(1, (20, 0, 40, 40))
        palette.save(tmp_path / "i.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "i.png")
    found = read_image(tmp_path / "i.png")
    assert found.getpixel((5, 5)) == (0, 0, 0)
    assert found.getpixel((35, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "suffix", "limit"), [("CMYK", "jpg", 12), ("P", "png", 90), ("1", "png", 255), ("L", "webp", 60)]
)
def test_other_modes_are_converted(photograph, mode, suffix, limit, tmp_path):
    photograph.convert(mode).save(tmp_path / f"i.{suffix}", quality=95)
    found = read_image(tmp_path / f"i.{suffix}")
    assert (found.mode, found.size) == ("RGB", photograph.size)
    expected = photograph if mode in ("CMYK", "P") else photograph.convert(mode).convert("RGB")
    assert difference(found, expected) <= limit


def test_the_first_frame_of_an_animation_is_taken(photograph, tmp_path):
    photograph.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", photograph.size)])
    assert difference(read_image(tmp_path / "a.gif"), photograph) < 90


def test_the_content_counts_and_not_the_ending(photograph, tmp_path):
    photograph.save(tmp_path / "png.jpg", format="PNG")
    assert difference(read_image(tmp_path / "png.jpg"), photograph) == 0


def _bad_files(folder: Path, photograph: Image.Image) -> list[Path]:
    """One file of each kind that must be rejected."""
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    noisy.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:9000])
    noisy.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:9000])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    photograph.save(folder / "figure.eps", format="EPS")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("L", (40_000, 1)).save(folder / "long.png")
    Image.new("L", (32_768, 3)).save(folder / "thin.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tiff")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere")
    return sorted(folder.iterdir())


def test_bad_files_are_rejected_by_name_quickly_and_without_decoding_bombs(photograph, tmp_path):
    files = _bad_files(tmp_path, photograph)
    assert len(files) == 11
    for file in files:
        with pytest.raises(ImageRejected, match=file.name) as error:
            read_image(file)
        assert "\n" not in str(error.value)


def test_arrays_and_pil_images_are_taken_as_they_are(photograph):
    assert difference(read_image(np.asarray(photograph)), photograph) == 0
    assert difference(read_image(photograph), photograph) == 0
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ImageRejected, match="uint8 of shape"):
            read_image(bad)


# ---- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (224, 0.95), (384, 1.0), (64, 0.875)])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (250, 250), (50, 41)])
def test_preprocessing_equals_timms(size, crop, interpolation, shape):
    image = real_images()[-1].resize(shape)
    p = Preprocess(image_size=size, crop=crop, interpolation=interpolation)
    theirs = timm.data.create_transform(
        (3, size, size), interpolation=interpolation, crop_pct=crop, mean=p.mean, std=p.std
    )
    expected = theirs(image)
    found = torch.from_numpy(preprocess(image, p))
    assert found.shape == expected.shape == (3, size, size)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"image_size": 31}, {"crop": 0.0}, {"crop": 1.5}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}]
)
def test_preprocessing_that_cannot_be_done_is_refused(change):
    with pytest.raises(UserError, match="images cannot be prepared to"):
        Preprocess(**change)


# ---- folders ---------------------------------------------------------------------------------------------------------


def _folder(root: Path, files: dict[str, list[str]]) -> Path:
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for index, name in enumerate(names):
            Image.new("RGB", (40, 40), (index, 0, 0)).save(root / folder / name, format="PNG")
    return root


def test_a_single_folder_is_split_the_same_way_each_time(tmp_path):
    names = [f"{i:02}.png" for i in range(20)]
    root = _folder(tmp_path, {"a": names, "b": names})
    train, val = read_split(root, "train"), read_split(root, "val")
    assert (len(train), len(val)) == (32, 8)
    assert not set(train.files) & set(val.files)
    assert train == read_split(root, "train")
    assert val.labels == ("a", "b")


@pytest.mark.fault("D1", "classes mapped by name; an unknown one: exit 2")
def test_classes_are_mapped_by_name_and_an_unknown_one_is_refused(tmp_path):
    root = _folder(
        tmp_path,
        {"train/a": ["1.png"], "train/b": ["1.png"], "train/c": ["1.png"], "val/b": ["1.png"], "val/c": ["2.png"]},
    )
    train = read_split(root, "train")
    val = read_split(root, "val", train.labels)
    assert [val.labels[t] for t in val.targets] == ["b", "c"]
    with pytest.raises(UserError, match="class 'c' that the model does not know; it knows a, b"):
        read_split(root, "val", ("a", "b"))


@pytest.mark.fault("D2", "empty classes kept and told; hidden folders left out")
def test_hidden_folders_are_left_out_and_empty_classes_kept_with_a_note(tmp_path):
    root = _folder(tmp_path, {"a": ["1.png"] * 1, "b": [], ".ipynb_checkpoints": ["x.png"], "a/.hidden": ["y.png"]})
    Image.new("RGB", (8, 8)).save(root / "stray.png")
    found = read_split(root, "train")
    assert found.labels == ("a", "b")
    assert [f.name for f in found.files] == ["1.png"]
    assert any("'b' has no images" in note for note in found.notes)
    assert any("outside a class folder" in note for note in found.notes)


def test_folders_that_hold_no_data_set_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_split(tmp_path / "missing", "train")
    with pytest.raises(UserError, match="no class folders; put the images of each class"):
        read_split(tmp_path, "train")
    with pytest.raises(UserError, match="gives train and val, not 'test'"):
        read_split(_folder(tmp_path / "single", {"a": ["1.png"]}), "test")
    with pytest.raises(UserError, match="no val/ folder, only train"):
        read_split(_folder(tmp_path, {"train/a": ["1.png"]}), "val")


@pytest.mark.fault("D3", "an unreadable image is reported, nothing stands in for it")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_rejected_image_is_reported_and_never_replaced(workers, photograph, tmp_path):
    root = _folder(tmp_path, {"a": [f"{i}.png" for i in range(8)], "b": [f"{i}.png" for i in range(8)]})
    planted = [root / "a" / "3.png", root / "b" / "0.png"]
    for path in planted:
        path.write_bytes(b"broken")
    split = read_split(root, "train")
    got = list(
        batches(
            split, eval_transform(Metadata("nextvit_nano", preprocess=Preprocess(32))), batch_size=4, workers=workers
        )
    )
    seen = [int(i) for batch in got for i in batch.indices]
    rejected = {split.files[i]: why for batch in got for i, why in batch.rejected}
    assert set(rejected) == set(planted) & set(split.files)
    assert all(path.name in why for path, why in rejected.items())
    assert sorted(seen) == [i for i, file in enumerate(split.files) if file not in planted], "each good one once"
    for batch in got:
        assert [split.targets[i] for i in batch.indices] == batch.targets.tolist()


# ---- the embedded images ---------------------------------------------------------------------------------------------


def test_the_demo_is_8000_and_2000_garments_of_ten_classes_without_overlap():
    folder = demo_folder()
    splits = {name: read_split(folder, name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 7500, "val": 500, "test": 2000}
    assert all(np.bincount(s.targets).tolist() == [len(s) // 10] * 10 for s in splits.values())
    assert splits["train"].labels == tuple(sorted(garments("train")))
    seen = [{file.read_bytes() for file in split.files} for split in splits.values()]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert demo_folder() == folder


def test_the_demo_images_are_the_tiles_of_the_sheets():
    tile = garments("val")["sandal"][41]
    sheet = Image.open(Path(nextvit_data() / "garments/val/5_sandal.png"))
    assert np.array_equal(np.asarray(tile), np.asarray(sheet)[28:56, 28:56]), "row 1, column 1 of 40 a row"
    assert difference(read_image(demo_folder() / "test/sandal/0041.png"), tile.convert("RGB")) == 0


def nextvit_data() -> Path:
    import nextvit.data

    return Path(nextvit.data.__file__).parent / "demo"


def test_the_embedded_files_come_with_their_licences():
    assert "Zalando SE" in (nextvit_data() / "garments" / "LICENSE").read_text()
    notes = (nextvit_data() / "README.md").read_text()
    assert all(path.stem in notes for path in (nextvit_data() / "backgrounds").rglob("*.jpg"))


# ---- sources of predict ----------------------------------------------------------------------------------------------


def test_sources_are_files_folders_and_globs_each_file_once_in_order(tmp_path, monkeypatch):
    _folder(tmp_path, {"d": ["b.png", "a.png"], "d/sub": ["c.png"]})
    monkeypatch.chdir(tmp_path)
    assert expand(["d/b.png", "d", "d/*.png", "missing.png"]) == [
        Path(p) for p in ("d/b.png", "d/a.png", "d/sub/c.png", "missing.png")
    ]
    with pytest.raises(UserError, match="none\\*.png holds no files"):
        expand(["none*.png"])


def test_a_loop_of_links_is_walked_once(tmp_path):
    _folder(tmp_path, {"d": ["a.png"]})
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert [p.name for p in expand([str(tmp_path)])] == ["a.png"]


def test_folders_named_by_wordnet_ids_are_the_classes_of_imagenet(tmp_path):
    info = timm.data.ImageNetInfo()
    assert list(class_names.imagenet_wordnet_ids()) == info.label_names()
    lemmas = [info.index_to_description(i) for i in range(1000)]
    named = sum(name.lower() in lemma.lower() for name, lemma in zip(class_names.imagenet(), lemmas, strict=True))
    assert named > 900, "names and ids are in the same order; some names are shortened"
    for folder in ("n01440764", "n15075141"):
        (tmp_path / "val" / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / folder / "0.png")
    split = read_split(tmp_path, "val", class_names.imagenet())
    assert split.targets == (0, 999)
    with pytest.raises(UserError, match="'n01440764' that the model does not know"):
        read_split(tmp_path, "val", ["tench", "toilet tissue"])


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set NEXTVIT_CACHE"):
        read_split("demo", "val")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_although_its_exif_cannot_be_written_again(orientation, tmp_path):
    """Pillow's exif_transpose gives such an image up; the draft is asked with the upright size in any case."""
    entries = [(0x0112, 3, 1, orientation.to_bytes(4, "little")), (0x0100, 2, 4, b"abc\0")]
    tiff = b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little")
    for tag, kind, count, value in sorted(entries):
        tiff += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)).resize((96, 32))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each one
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    stored.save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=b"Exif\0\0" + tiff + b"\0\0\0\0")
    asked = []
    found = read_image(tmp_path / "a.jpg", draft=lambda *size: asked.append(size) or size)
    assert asked == [upright.size]
    assert found.size == upright.size
    assert np.abs(np.asarray(found, int) - np.asarray(upright, int)).mean() < 3
