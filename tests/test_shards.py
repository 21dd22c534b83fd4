"""Images in tar files: the same images, the same run, from a disk and over HTTP; and what may be wrong with them."""

import io
import json
import re
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from nextvit.data.images import ImageRejected
from nextvit.data.sets import default_eval_split, read_split, read_splits, split_names
from nextvit.data.shards import pack, write_index
from nextvit.errors import UserError
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.train import train
from nextvit.weights import read_weights
from tests.conftest import nextvit_here


@pytest.fixture(scope="module")
def packed(garment_folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shards") / "clothes"
    done = nextvit_here("data", "pack", garment_folder, "--output", place)
    assert done.returncode == 0, done.stderr
    assert "train: 48 images" in done.stdout
    return place


def test_a_split_of_shards_is_that_of_the_folder(garment_folder, packed):
    assert split_names(packed) == split_names(garment_folder) == ("train", "val")
    assert default_eval_split(packed) == "val"
    for ours, theirs in zip(read_splits(packed), read_splits(garment_folder), strict=True):
        assert (ours.labels, ours.targets, ours.sha256) == (theirs.labels, theirs.targets, theirs.sha256)
        for index in range(len(theirs)):
            assert ours.content(index) == theirs.files[index].read_bytes()
            assert ours.size(index) == theirs.size(index)
            assert np.array_equal(ours.read(index), theirs.read(index))


def test_the_shards_are_what_webdataset_expects(packed, garment_folder):
    """By an independent reader: tarfile; a sample is members in a row that share the name up to the first dot."""
    split = read_split(garment_folder, "train")
    with tarfile.open(packed / "train-000000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:2]] == ["00000000.jpg", "00000000.cls"]
        assert [int(tar.extractfile(m).read()) for m in members[1::2]] == list(split.targets)
        assert tar.extractfile(members[-2]).read() == split.files[-1].read_bytes()


def test_many_shards_hold_what_one_holds(garment_folder, tmp_path, monkeypatch):
    split = read_split(garment_folder, "train")
    total = sum(split.size(index) for index in range(len(split)))
    monkeypatch.setattr("nextvit.data.shards.MB", total // 4)
    counts = pack(read_splits(garment_folder), tmp_path / "set", shard_mb=1)
    assert counts == {"train": 48, "val": 12}
    assert len(list((tmp_path / "set").glob("train-*.tar"))) in (4, 5)
    again = read_split(tmp_path / "set", "train")
    assert [again.content(i) for i in range(48)] == [split.content(i) for i in range(48)]


def test_training_on_shards_is_training_on_the_folder(garment_folder, packed, tmp_path):
    recipe = read_recipe("default", ["images.size=32", "schedule.epochs=1", "images.randaugment=rand-m5-inc1"])
    for name, data, workers in (("folder", garment_folder, 0), ("shards", packed, 2)):
        machine = Machine(threads=1, workers=workers, deterministic=True)
        train(data, recipe, tmp_path / name, machine=machine)
    torch.use_deterministic_algorithms(False)
    one, other = (read_weights(tmp_path / name / "last.ckpt").tensors for name in ("folder", "shards"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    # The data is told by its images, not by its place: a run goes on where they were moved.
    train(packed, recipe, tmp_path / "folder", resume=True, changes=["schedule.epochs=2"], machine=Machine(workers=0))


class Ranges(SimpleHTTPRequestHandler):
    """A file server that gives parts of files, as object stores do."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, wanted = path.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        return


@pytest.fixture(scope="module")
def url(packed):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=packed.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{packed.name}"
        server.shutdown()


def test_shards_are_read_where_they_are(url, packed, garment_folder, tmp_path):
    from nextvit.data.loader import batches, eval_transform
    from nextvit.metadata import Metadata

    near, far = read_split(packed, "val"), read_split(url, "val")
    assert far.sha256 == near.sha256
    transform = eval_transform(Metadata("nextvit_nano"))
    loaded = [torch.cat([b.images for b in batches(s, transform, workers=w)]) for s, w in ((near, 0), (far, 2))]
    assert torch.equal(*loaded)
    done = nextvit_here("data", "check", url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"] == {"bag": 16, "sandal": 16, "trouser": 16}


def test_a_place_that_cannot_be_read_is_a_sentence(url, tmp_path):
    for place in (f"{url}/nowhere", "nosuchscheme://bucket/set", "http://127.0.0.1:9/set"):
        with pytest.raises(UserError, match="cannot be reached"):
            read_split(place, "train")


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


@pytest.fixture
def jpeg(garment_folder) -> bytes:
    return next((garment_folder / "bag").glob("*.jpg")).read_bytes()


def test_shards_that_others_made_are_indexed(tmp_path, jpeg):
    """Folders in names, other members beside the image, labels.txt, two splits."""
    tar(
        tmp_path / "my-train-0.tar",
        {"x/a.jpg": jpeg, "x/a.cls": b"1", "x/a.json": b"{}", "b.JPG": jpeg, "b.cls": b"0\n"},
    )
    tar(tmp_path / "my-validation-0.tar", {"c.cls": b"1", "c.jpeg": jpeg})
    with pytest.raises(UserError, match="nextvit data index"):
        read_split(tmp_path, "train")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    done = nextvit_here("data", "index", tmp_path)
    assert done.returncode == 0, done.stderr
    training, validation = read_splits(tmp_path)
    assert (training.labels, training.targets) == (("cat", "dog"), (1, 0))
    assert validation.targets == (1,)
    assert training.content(0) == jpeg
    mapped = read_split(tmp_path, "train", labels=("dog", "bird", "cat"))
    assert mapped.targets == (0, 2)
    with pytest.raises(UserError, match="'cat' that the model does not know"):
        read_split(tmp_path, "train", labels=("dog", "bird"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.cls": b"0"}, "no image for a"),
        ({"a.jpg": b"x"}, r"no \.cls for a"),
        ({"a.jpg": b"x", "a.cls": b"zero"}, "no shard that can be read"),
        ({"a.jpg": b"x", "a.cls": b"-3"}, "classes below 0"),
        ({}, "holds no images"),
        ({"a.jpg": b"x", "a.cls": b"99999999999"}, "class numbers go up to"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(members, message, tmp_path):
    tar(tmp_path / "train.tar", members)
    with pytest.raises(UserError, match=message):
        write_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"cat", "has 1 lines and the shards 2 classes"),
        (b"cat\n\n", "line 2: '' is no name"),
        (b"cat\n/etc\n", "line 2: '/etc' is no name"),
        (b"cat\ncat\n", "is there twice"),
        (b"caf\xe9\ndog\n", "is not UTF-8 text"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels, message, tmp_path, jpeg):
    tar(tmp_path / "train.tar", {"a.jpg": jpeg, "a.cls": b"1"})
    (tmp_path / "labels.txt").write_bytes(labels)
    with pytest.raises(UserError, match=message):
        write_index(tmp_path)


def test_members_that_belong_to_no_image_are_told_and_links_refused(tmp_path, jpeg, capsys):
    others = {"README": b"x", "._a.jpg": b"x"}
    tar(tmp_path / "train 1.tar", {**others, "a.jpg": jpeg, "a.cls": b"0", "x/../b.jpg": jpeg, "x/../b.cls": b"1"})
    (tmp_path / "labels.txt").write_bytes("\ufeffcat\ndog\n".encode())
    assert write_index(tmp_path) == {"train": 2}
    assert "2 other files" in capsys.readouterr().err
    split = read_split(tmp_path, "train")
    assert split.labels == ("cat", "dog")
    assert split.read(1).size == split.read(0).size
    with tarfile.open(tmp_path / "train 1.tar", "a") as file:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        file.addfile(link)
    with pytest.raises(UserError, match=r"has c\.jpg, a link"):
        write_index(tmp_path)


def test_splits_with_other_classes_keep_their_labels(tmp_path, jpeg):
    """As in folders: each split has its own classes, and they are matched by name."""
    for place in ("train/a", "train/b", "train/c", "val/b", "val/c", "test/c", "test/d"):
        folder = tmp_path / "data" / place
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(jpeg)
    pack(read_splits(tmp_path / "data"), tmp_path / "set")
    for name in ("train", "val", "test"):
        folder, shards = (read_split(tmp_path / data, name) for data in ("data", "set"))
        assert (shards.labels, shards.targets, shards.sha256) == (folder.labels, folder.targets, folder.sha256)
    trained = read_split(tmp_path / "set", "train").labels
    assert read_split(tmp_path / "set", "val", trained).targets == (1, 2)
    with pytest.raises(UserError, match="'d' that the model does not know"):
        read_split(tmp_path / "set", "test", trained)


def test_files_that_cannot_be_read_are_left_out_with_a_note(tmp_path, jpeg):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(5):
            (tmp_path / "data" / label / f"{index}.jpg").write_bytes(jpeg)
    (tmp_path / "data" / "a" / "0.jpg").unlink()
    (tmp_path / "data" / "a" / "0.jpg").symlink_to(tmp_path / "nowhere")
    inside = nextvit_here("data", "pack", tmp_path / "data", "--output", tmp_path / "data" / "shards")
    assert (inside.returncode, "lies among the images" in inside.stderr) == (2, True)
    done = nextvit_here("data", "pack", tmp_path / "data", "--output", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "note: 1 files of train are left out" in done.stderr
    assert len(read_split(tmp_path / "set", "train")) == 7
    checked = nextvit_here("data", "check", tmp_path / "data", "--json")
    assert checked.returncode == 0, checked.stderr
    assert {f["kind"]: f["count"] for f in json.loads(checked.stdout)["findings"]}["unreadable"] == 1


def test_an_archive_beside_folders_makes_no_shards_of_them(garment_folder, tmp_path):
    import shutil

    shutil.copytree(garment_folder, tmp_path / "data")
    (tmp_path / "data" / "download.tar").write_bytes(b"")
    (tmp_path / "data" / "index.json").write_text("{}")
    assert read_split(tmp_path / "data", "train").labels == ("bag", "sandal", "trouser")


def test_what_is_kept_of_a_url_is_kept_for_all(url, tmp_path, monkeypatch):
    """By every loading process and every later run, in one place."""
    from nextvit.data.loader import batches, eval_transform
    from nextvit.metadata import Metadata

    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path / "cache"))
    split, kept = read_split(f"filecache::{url}", "val"), []
    for _ in range(2):
        for batch in batches(split, eval_transform(Metadata("nextvit_nano")), workers=2):
            assert not batch.rejected
        kept.append({p.name for p in (tmp_path / "cache" / "shards").iterdir()})
    assert kept[0] == kept[1]
    assert len(kept[0]) >= 2, "the index, a shard, and a list of them"


def test_shards_that_do_not_say_their_split_are_refused(tmp_path, jpeg):
    tar(tmp_path / "constrained.tar", {"a.jpg": jpeg, "a.cls": b"0"})
    with pytest.raises(UserError, match="does not say which split"):
        write_index(tmp_path)
    (tmp_path / "constrained.tar").rename(tmp_path / "train.tar")
    (tmp_path / "train.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="no shard that can be read"):
        write_index(tmp_path)


CHANGES = {
    "a shard elsewhere": lambda i: i["splits"]["train"]["shards"].__setitem__(0, "../secret.tar"),
    "an absolute shard": lambda i: i["splits"]["train"]["shards"].__setitem__(0, "/etc/passwd"),
    "a URL": lambda i: i["splits"]["train"]["shards"].__setitem__(0, "http://x/y.tar"),
    "a name that climbs": lambda i: i["splits"]["train"]["files"].__setitem__(0, "../../x.jpg"),
    "an unknown class": lambda i: i["splits"]["train"]["targets"].__setitem__(0, 99),
    "an unknown shard": lambda i: i["splits"]["train"]["shard"].__setitem__(0, 7),
    "a place before the start": lambda i: i["splits"]["train"]["offset"].__setitem__(0, -5),
    "columns of two lengths": lambda i: i["splits"]["train"]["size"].pop(),
    "text for a number": lambda i: i["splits"]["train"]["size"].__setitem__(0, "many"),
    "a fraction for a class": lambda i: i["splits"]["train"]["targets"].__setitem__(0, 0.5),
    "text for a class": lambda i: i["splits"]["train"]["targets"].__setitem__(0, "1"),
    "a number too large": lambda i: i["splits"]["train"]["offset"].__setitem__(0, 2**64),
    "a name that is no text": lambda i: i["splits"]["train"]["files"].__setitem__(0, "\ud800/x.jpg"),
    "a label twice": lambda i: i["labels"].__setitem__(1, i["labels"][0]),
    "labels that are text": lambda i: i.__setitem__("labels", "abc"),
    "no splits": lambda i: i.__setitem__("splits", {}),
    "no labels": lambda i: i.pop("labels"),
    "another split": lambda i: i["splits"].__setitem__("extra", i["splits"]["train"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_was_tampered_with_is_refused(change, packed, tmp_path):
    index = json.loads((packed / "index.json").read_text())
    CHANGES[change](index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no index of shards"):
        read_split(tmp_path, "train")


def test_a_shard_that_is_cut_short_rejects_its_last_images(packed, tmp_path, garment_folder):
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    split = read_split(tmp_path, "train")
    assert split.read(0).size == (40, 36)
    with pytest.raises(ImageRejected, match="cut short"):
        split.read(47)
    shard.unlink()
    with pytest.raises(ImageRejected, match="cannot be read"):
        split.read(0)


def test_nothing_is_written_over(garment_folder, packed, tmp_path):
    before = {file: file.read_bytes() for file in packed.iterdir()}
    done = nextvit_here("data", "pack", garment_folder, "--output", packed)
    assert (done.returncode, "is not empty; choose another --output" in done.stderr) == (2, True)
    assert {file: file.read_bytes() for file in packed.iterdir()} == before


def test_a_pack_that_was_killed_has_no_index(garment_folder, tmp_path):
    """So what it left is no data set, and says so."""
    script = (
        "import os, sys\n"
        "from nextvit.data import shards\n"
        "shards._write_index = lambda *a: os._exit(9)\n"
        "from nextvit.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    place = tmp_path / "set"
    command = [sys.executable, "-c", script, "data", "pack", str(garment_folder), "--output", str(place)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    with pytest.raises(UserError, match=r"index\.json"):
        read_split(place, "train")
