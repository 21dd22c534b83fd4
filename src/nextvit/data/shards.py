"""Shards in WebDataset's layout: images packed into tar files, each read at its place, on a disk or an object store.

Nothing is unpacked. `index.json` beside the shards tells where each image lies, so that they are read in any order, as
files in folders are: training on them is training on the folder that was packed, image by image.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nextvit.data.folders import SPLITS
from nextvit.data.images import ImageRejected, printable
from nextvit.data.split import Places, Split, file_system, numbered
from nextvit.errors import UserError
from nextvit.progress import say, track

INDEX = "index.json"
LABELS = "labels.txt"  # beside shards that others made: a class a line
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SHARD_MB, MB = 256, 10**6
SPLIT_NAMES = {  # words in the names of shards
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
COLUMNS = ("targets", "shard", "offset", "size")  # of numbers, one for each image
LARGEST = 2**62


# ---- reading ---------------------------------------------------------------------------------------------------------


def are_shards(data: str | Path) -> bool:
    """Whether DATA names shards: a URL, or a folder with an index or tar files and no folders in it."""
    if are_urls(data):
        return True
    folder = Path(data)
    if not folder.is_dir() or any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir()):
        return False
    return (folder / INDEX).is_file() or any(folder.glob("*.tar"))


def shard_splits(data: str | Path) -> tuple[str, ...]:
    """Names of the splits that the shards have."""
    index = _read_index(data)
    return tuple(name for name in SPLITS if name in index["splits"])


def shard_split(data: str | Path, name: str, labels: Sequence[str] | None = None) -> Split:
    """A split of the shards at `data`, a folder or a URL that fsspec knows; labels: see `numbered`."""
    index = _read_index(data)
    part = index["splits"].get(name)
    if part is None:
        raise UserError(f"{data} has no images of {name}, only of {', '.join(index['splits'])}.")
    own = [index["labels"][number] for number in part["classes"]]
    classes, number = numbered(own, labels, f"{data}, {name},")
    mapped = {old: number[label] for old, label in zip(part["classes"], own, strict=True)}
    folder = Path(str(data), name)
    return Split(
        name,
        folder,
        classes,
        tuple(folder / file for file in part["files"]),
        tuple(mapped[target] for target in part["targets"]),
        places=Places(
            tuple(_join(data, shard) for shard in part["shards"]),
            *(np.array(part[column], np.int64) for column in ("shard", "offset", "size")),
        ),
    )


def _read_index(data: str | Path) -> dict[str, Any]:
    url = _join(data, INDEX)
    with _reaching(url, "it has none: `nextvit data index` makes shards readable that others made"):
        system, path = file_system(url)
        content = system.cat_file(path)
    try:
        index = json.loads(content)
        _insist_on_index(index)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{printable(url)} is no index of shards that nextvit wrote; `nextvit data index` writes it."
        ) from error
    if not are_urls(data):
        for shard in (shard for part in index["splits"].values() for shard in part["shards"]):
            _insist_on_regular(Path(data, shard))
    return dict(index)


def _insist_on_index(index: Any) -> None:
    """Raise one of several errors where it is not as `_write_index` writes it: it may come from anywhere."""
    labels, splits = index["labels"], index["splits"]
    _insist(isinstance(labels, list) and all(map(_is_name, labels)) and len(set(labels)) == len(labels))
    _insist(isinstance(splits, dict) and bool(splits) and set(splits) <= set(SPLITS))
    for part in splits.values():
        lists = [part[key] for key in ("classes", "shards", "files", *COLUMNS)]
        _insist(all(isinstance(found, list) and found for found in lists))
        _insist(len({len(part[key]) for key in ("files", *COLUMNS)}) == 1)
        _insist(all(type(n) is int and 0 <= n < LARGEST for key in ("classes", *COLUMNS) for n in part[key]))
        _insist(max(part["classes"]) < len(labels) and len(set(part["classes"])) == len(part["classes"]))
        _insist(set(part["targets"]) <= set(part["classes"]) and max(part["shard"]) < len(part["shards"]))
        _insist(all(map(_is_shard, part["shards"])))
        _insist(all(_is_name(file) and ".." not in Path(file).parts for file in part["files"]))


def _insist(right: bool) -> None:
    if not right:
        raise ValueError


def _is_name(text: object) -> bool:
    """Whether it can be a part of a path: text that a file system takes, and no absolute path."""
    return isinstance(text, str) and bool(os.fsencode(text)) and "\0" not in text and not text.startswith("/")


def _is_shard(name: object) -> bool:
    """Whether it is the name of a tar file beside the index, and no path or URL."""
    return _is_name(name) and re.fullmatch(r"[^/\\:]+\.tar", str(name)) is not None


def _insist_on_regular(shard: Path) -> None:
    if shard.exists() and not shard.is_file():
        raise UserError(f"{printable(shard)} is not a regular file, so it is no shard.")


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack(splits: Sequence[Split], output: str | Path, *, shard_mb: int = SHARD_MB) -> dict[str, int]:
    """Write the images of the splits as they are into shards below `output`, and the index last.

    Returns the number of images of each split; a file that cannot be read is left out, with a note. Raises UserError
    where something lies at `output` already.
    """
    if not are_urls(output) and any(Path(output).resolve().is_relative_to(s.folder.resolve()) for s in splits):
        raise UserError(f"{output} lies among the images themselves; choose another --output.")
    labels = list(dict.fromkeys(label for split in splits for label in split.labels))
    parts = {}
    with _reaching(output, "choose another --output"):
        system, root = file_system(str(output))
        if system.exists(root) and system.ls(root):
            raise UserError(f"{output} is not empty; choose another --output.")
        system.makedirs(root, exist_ok=True)
        for split in splits:
            shards, files = _pack_split(split, labels, system, root, shard_mb)
            classes = [labels.index(label) for label in split.labels]
            parts[split.name] = {**_places(output, shards), "classes": classes, "files": files}
        _write_index(output, labels, parts)
    return {name: len(part["files"]) for name, part in parts.items()}


def _pack_split(split: Split, labels: list[str], system: Any, root: str, shard_mb: int) -> tuple[list[str], list[str]]:
    """Names of the shards that were written, and of the images in them."""
    shards: list[str] = []
    files: list[str] = []
    waiting = _contents(split)
    first = next(waiting, None)
    while first is not None:
        shards.append(f"{split.name}-{len(shards):06}.tar")
        with system.open(f"{root}/{shards[-1]}", "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            written = 0
            while first is not None and written < shard_mb * MB:
                index, content = first
                suffix = split.files[index].suffix.lower()
                suffix = suffix if suffix in ENDINGS else ".jpg"  # readers go by content, but want some ending
                _add(tar, f"{index:08}{suffix}", content)
                _add(tar, f"{index:08}.cls", str(labels.index(split.labels[split.targets[index]])).encode())
                files.append(os.path.relpath(split.files[index], split.folder))
                written += len(content)
                first = next(waiting, None)
    return shards, files


def _contents(split: Split) -> Iterator[tuple[int, bytes]]:
    """(index, the file as it is) of every image; those that cannot be read are told at the end."""
    left_out = []
    for index in track(range(len(split)), total=len(split), label=f"pack {split.name}", unit="images"):
        try:
            content = split.content(index)
        except ImageRejected as error:
            left_out.append(str(error))
            continue
        yield index, content
    if left_out:
        say(f"note: {len(left_out)} files of {split.name} are left out: {left_out[0]}")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_index(data: str | Path) -> dict[str, int]:
    """Index the shards in WebDataset's layout that lie at `data`: images, each with a class number in a `.cls`.

    The split is told by the names of the shards (train, val, validation, test), the names of the classes by
    `labels.txt` beside them, a line each; without it they are their numbers. Returns the images of each split.
    """
    with _reaching(data, "give a folder of .tar files, or a URL that fsspec can list and write to"):
        system, root = file_system(str(data))
        shards = sorted(path.rpartition("/")[2] for path in system.glob(f"{root}/*.tar"))
        if not shards:
            raise UserError(f"{data} has no .tar files.")
        by_split: dict[str, list[str]] = {}
        for shard in shards:
            by_split.setdefault(_split_of(shard), []).append(shard)
        parts = {name: _places(data, own) for name, own in by_split.items()}
        labels = _labels(data, system, root, parts)
        for part in parts.values():
            named = zip(part["targets"], part["files"], strict=True)
            part["files"] = [f"{labels[target]}/{name}" for target, name in named]
            part["classes"] = list(range(len(labels)))
        _write_index(data, labels, parts)
    return {name: len(part["files"]) for name, part in parts.items()}


def _split_of(shard: str) -> str:
    words = set(re.split(r"[^a-z]+", shard.lower()))
    told = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
    if len(told) != 1 or not _is_shard(shard):
        raise UserError(f"{printable(shard)} does not say which split it is; have train, val or test in its name.")
    return told[0]


def _labels(data: str | Path, system: Any, root: str, parts: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the classes, by number."""
    classes = 1 + max(max(part["targets"]) for part in parts.values())
    if system.exists(f"{root}/{LABELS}"):
        try:
            labels = system.cat_file(f"{root}/{LABELS}").decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{data}/{LABELS} is not UTF-8 text; save it as that.") from error
        if len(labels) < classes:
            raise UserError(f"{data}/{LABELS} has {len(labels)} lines and the shards {classes} classes.")
        for number, label in enumerate(labels, 1):
            if not _is_name(label) or ".." in Path(label).parts or label in labels[: number - 1]:
                raise UserError(f"{data}/{LABELS}, line {number}: {label!r} is no name of a class, or is there twice.")
        return labels
    images = sum(len(part["targets"]) for part in parts.values())
    if classes > max(images, 1000):
        raise UserError(f"class numbers go up to {classes - 1} in {images} images; put the names into {data}/{LABELS}.")
    return [str(number) for number in range(classes)]


def _places(data: str | Path, shards: Sequence[str]) -> dict[str, Any]:
    """What the shards hold, read from their headers: names of images, classes, places."""
    found: dict[str, Any] = {key: [] for key in ("files", *COLUMNS)}
    others = 0
    for number, shard in enumerate(track(shards, total=len(shards), label="index", unit="shards")):
        url = _join(data, shard)
        if not are_urls(data):
            _insist_on_regular(Path(url))
        system, path = file_system(url)
        try:
            with system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for key, members in groupby(_files(tar, url), lambda m: _key(m.name)):
                    sample = {_ending(m.name): m for m in members}
                    image = next((m for ending, m in sample.items() if ending in ENDINGS), None)
                    if image is None and ".cls" not in sample:
                        others += 1
                        continue
                    told = tar.extractfile(sample[".cls"]) if ".cls" in sample and sample[".cls"].size < 20 else None
                    if image is None or told is None:
                        raise UserError(
                            f"{printable(url)} has no {'.cls' if image else 'image'} for {printable(key)}; a sample is "
                            "an image and a .cls with the number of its class."
                        )
                    name = f"{shard}-{printable(image.name)}".replace("/", "-")
                    values = (name, int(told.read()), number, image.offset_data, image.size)
                    for column, value in zip(found, values, strict=True):
                        found[column].append(value)
        except (tarfile.TarError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{printable(url)} is no shard that can be read ({_why(error)}).") from error
    if others:
        say(f"note: {others} other files in the shards of {data} are left alone: they belong to no image.")
    if not found["targets"] or min(found["targets"]) < 0:
        raise UserError(f"{data} holds no images, or classes below 0.")
    return {**found, "shards": list(shards)}


def _files(tar: tarfile.TarFile, url: str) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.isreg() and not member.issparse():
            yield member
        elif not member.isdir():
            raise UserError(f"{printable(url)} has {printable(member.name)}, a link or no plain file; write it anew.")


def _key(member: str) -> str:
    """WebDataset's: the name up to the first dot after the last slash."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _ending(member: str) -> str:
    return "." + member.rpartition("/")[2].partition(".")[2].lower()


def _write_index(data: str | Path, labels: Sequence[str], parts: dict[str, dict[str, Any]]) -> None:
    index = {"labels": list(labels), "splits": parts}
    _insist_on_index(index)
    system, path = file_system(_join(data, INDEX))
    with system.transaction, system.open(path, "wb") as file:  # in its place when it is whole
        file.write(json.dumps(index).encode())


# ---- addresses -------------------------------------------------------------------------------------------------------


def are_urls(data: str | Path) -> bool:
    """Whether it is a URL, or a chain of them, and not a folder."""
    return "://" in str(data) or "::" in str(data)


def _join(data: str | Path, name: str) -> str:
    """Of a folder or a URL; in a chain such as filecache::s3://bucket/set the last address is that of the set."""
    return f"{str(data).rstrip('/')}/{name}"


@contextmanager
def _reaching(place: str | Path, hint: str) -> Iterator[None]:
    """Errors of file systems, each of which has its own, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"{printable(str(place))} cannot be reached ({_why(error)}); {hint}.") from error


def _why(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__)
