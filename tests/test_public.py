"""Public sets, fetched from a server of the test's own that has small ones in the real formats."""

import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from nextvit.data.sets import read_split, split_names
from tests.conftest import nextvit_here


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        return


@pytest.fixture
def server(tmp_path):
    """(folder, URL)"""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


def picture(level: int, ending: str) -> bytes:
    file, grey = io.BytesIO(), Image.new("L", (12, 10), level)
    (grey if ending == "PNG" else grey.convert("RGB")).save(file, ending)
    return file.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> str:
    """Write a .tar.gz and return its MD5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def imagenette(folder: Path, url: str, patch: pytest.MonkeyPatch) -> dict[str, int]:
    classes = datasets.Imagenette._WNID_TO_CLASS
    members = {
        f"imagenette2/{split}/{wnid}/{number}.JPEG": picture(9 * index, "JPEG")
        for split, count in (("train", 2), ("val", 1))
        for index, wnid in enumerate(classes)
        for number in range(count)
    }
    digest = archive(folder / "imagenette2.tgz", members)
    patch.setattr(datasets.Imagenette, "_ARCHIVES", {"full": (f"{url}imagenette2.tgz", digest)})
    return {"train": 20, "val": 10}


def flowers102(folder: Path, url: str, patch: pytest.MonkeyPatch) -> dict[str, int]:
    members = {f"jpg/image_{number:05}.jpg": picture(number, "JPEG") for number in range(1, 205)}
    labels = {"labels": np.arange(204) % 102 + 1}
    sets = {"trnid": np.arange(1, 103), "valid": np.arange(103, 153), "tstid": np.arange(153, 205)}
    scipy.io.savemat(folder / "imagelabels.mat", labels)
    scipy.io.savemat(folder / "setid.mat", sets)
    files = {"image": ("102flowers.tgz", archive(folder / "102flowers.tgz", members))}
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        files[key] = (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
    patch.setattr(datasets.Flowers102, "_file_dict", files)
    patch.setattr(datasets.Flowers102, "_download_url_prefix", url)
    return {"train": 102, "val": 50, "test": 52}


def pets(folder: Path, url: str, patch: pytest.MonkeyPatch) -> dict[str, int]:
    images, notes = {}, {}
    for split, count in (("trainval", 10), ("test", 3)):
        lines = []
        for label, breed in enumerate(("Abyssinian", "great_dane"), 1):
            for number in range(count):
                name = f"{breed}_{split}{number}"
                images[f"images/{name}.jpg"] = picture(20 * number, "JPEG")
                notes[f"annotations/trimaps/{name}.png"] = picture(1 + number % 3, "PNG")
                lines.append(f"{name} {label} {label} {label}\n")
        notes[f"annotations/{split}.txt"] = "".join(lines).encode()
    parts = {"images.tar.gz": images, "annotations.tar.gz": notes}
    resources = tuple((url + name, archive(folder / name, members)) for name, members in parts.items())
    patch.setattr(datasets.OxfordIIITPet, "_RESOURCES", resources)
    return {"train": 16, "val": 4, "test": 6, "masks": 26}


@pytest.mark.parametrize("serve", [imagenette, flowers102, pets])
def test_a_set_is_laid_out_as_training_takes_it(serve, server, tmp_path, monkeypatch):
    counts = serve(*server, monkeypatch)
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path / "cache"))
    into = tmp_path / "set"
    done = nextvit_here("data", "get", serve.__name__, "--output", into)
    assert done.returncode == 0, done.stderr
    splits = [name for name in ("train", "val", "test") if name in counts]
    assert split_names(into) == tuple(splits)
    for name in splits:
        split = read_split(into, name)
        assert len(split) == counts[name]
        assert all(split.read(index).size == (12, 10) for index in range(len(split)))
    assert not list((tmp_path / "cache" / "downloads").iterdir()), "archives are gone when all is laid out"
    if serve is pets:
        for file in read_split(into, "train").files:
            mask = into / "masks" / file.relative_to(into).with_suffix(".png")
            assert np.asarray(Image.open(mask)).max() in (1, 2, 3)
    again = nextvit_here("data", "get", serve.__name__, "--output", into)
    assert (again.returncode, "exists; choose another --output" in again.stderr) == (2, True)


@pytest.mark.parametrize("fault", ["no server", "another file"])
def test_a_set_that_cannot_be_had_leaves_nothing(fault, server, tmp_path, monkeypatch):
    imagenette(*server, monkeypatch)
    archives = datasets.Imagenette._ARCHIVES
    url, digest = archives["full"]
    wrong = ("http://127.0.0.1:9/imagenette2.tgz", digest) if fault == "no server" else (url, "0" * 32)
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"full": wrong})
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path / "cache"))
    done = nextvit_here("data", "get", "imagenette", "--output", tmp_path / "set")
    assert done.returncode == 2
    assert "imagenette cannot be fetched" in done.stderr
    assert "needs a network" in done.stderr
    assert not (tmp_path / "set").exists()


def test_what_an_interrupted_call_unpacked_is_not_taken_for_the_set(server, tmp_path, monkeypatch):
    counts = imagenette(*server, monkeypatch)
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        for wnid in datasets.Imagenette._WNID_TO_CLASS:
            path = tmp_path / "cache" / "downloads" / "imagenette" / "imagenette2" / split / wnid / "0.JPEG"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture(0, "JPEG"))
    done = nextvit_here("data", "get", "imagenette", "--output", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert [len(read_split(tmp_path / "set", split)) for split in ("train", "val")] == list(counts.values())


def test_an_unknown_set_is_refused(tmp_path):
    done = nextvit_here("data", "get", "imagenet", "--output", tmp_path / "set")
    assert (done.returncode, "take one of imagenette, flowers102, pets" in done.stderr) == (2, True)
