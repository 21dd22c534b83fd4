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
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from nextvit.data.folders import SPLITS
from nextvit.data.images import printable
from nextvit.data.split import Places, Split, numbered
from nextvit.errors import UserError
from nextvit.progress import track

INDEX = "index.json"
LABELS = "labels.txt"  # beside shards that others made: a class a line
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SHARD_MB, MB = 256, 10**6
NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}  # in the names of shards -> split
HELP = "`nextvit data index` writes it for shards that others made"


# ---- reading ---------------------------------------------------------------------------------------------------------


def are_shards(data: str | Path) -> bool:
    """Whether DATA names shards: a URL, or a folder with an index or with tar files."""
    if _is_url(data):
        return True
    folder = Path(data)
    return folder.is_dir() and ((folder / INDEX).is_file() or any(folder.glob("*.tar")))


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
    classes, number = numbered(index["labels"], labels, data)
    own = [number[label] for label in index["labels"]]
    folder = Path(str(data), name)
    return Split(
        name,
        folder,
        classes,
        tuple(folder / file for file in part["files"]),
        tuple(own[target] for target in part["targets"]),
        places=Places(
            tuple(_join(data, shard) for shard in part["shards"]),
            *(np.array(part[column], np.int64) for column in ("shard", "offset", "size")),
        ),
    )


def _read_index(data: str | Path) -> dict[str, Any]:
    """The index beside the shards, looked through: it may come from anywhere."""
    url = _join(data, INDEX)
    try:
        with fsspec.open(url, "rt", encoding="utf-8") as file:
            index = json.load(file)
        labels = [_plain(label) for label in index["labels"]]
        for name, part in index["splits"].items():
            columns = [part[key] for key in ("files", "targets", "shard", "offset", "size")]
            numbers = np.array(columns[1:], np.int64)
            limits = np.array([len(labels), len(part["shards"])])
            right = (
                name in SPLITS
                and len(part["files"]) == numbers.shape[1] > 0
                and (numbers >= 0).all()
                and (numbers[:2] < limits[:, None]).all()
                and all(re.fullmatch(r"[\w.-]+\.tar", shard) for shard in part["shards"])
                and all(".." not in Path(_plain(file)).parts and not file.startswith("/") for file in part["files"])
            )
            if not right:
                raise ValueError(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{printable(url)} is no index of shards that nextvit wrote; {HELP}.") from error
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"{printable(url)} cannot be read ({_why(error)}); {HELP}.") from error
    return dict(index)


def _plain(text: object) -> str:
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(text)
    return text


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack(splits: Sequence[Split], output: str | Path, *, shard_mb: int = SHARD_MB) -> dict[str, int]:
    """Write the images of the splits as they are into shards below `output`, and the index last.

    Returns the number of images of each split. Raises UserError where something lies at `output` already.
    """
    system, root = _new(output)
    parts = {}
    for split in splits:
        shards: list[str] = []
        indices: Iterator[int] = iter(
            track(range(len(split)), total=len(split), label=f"pack {split.name}", unit="images")
        )
        waiting = next(indices, None)
        while waiting is not None:
            name = f"{split.name}-{len(shards):06}.tar"
            with system.open(f"{root}/{name}", "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
                written = 0
                while waiting is not None and written < shard_mb * MB:
                    content, suffix = split.content(waiting), split.files[waiting].suffix.lower()
                    suffix = suffix if suffix in ENDINGS else ".jpg"  # readers go by content, but want some ending
                    _add(tar, f"{waiting:08}{suffix}", content)
                    _add(tar, f"{waiting:08}.cls", str(split.targets[waiting]).encode())
                    written += len(content)
                    waiting = next(indices, None)
            shards.append(name)
        names = [os.path.relpath(file, split.folder) for file in split.files]
        parts[split.name] = {**_places(_join(output, ""), shards), "files": names}
    _write_index(output, splits[0].labels, parts)
    return {split.name: len(split) for split in splits}


def write_index(data: str | Path) -> dict[str, int]:
    """Index the shards in WebDataset's layout that lie at `data`: images, each with a class number in a `.cls`.

    The split is told by the names of the shards (train, val, validation, test), the names of the classes by
    `labels.txt` beside them, a line each; without it they are their numbers. Returns the images of each split.
    """
    system, root = fsspec.core.url_to_fs(str(data))
    by_split: dict[str, list[str]] = {}
    for path in sorted(system.glob(f"{root}/*.tar")):
        shard = path.rpartition("/")[2]
        told = [split for word, split in NAMES.items() if word in re.split(r"[^a-z]+", shard.lower())]
        if not told:
            raise UserError(f"{printable(shard)} does not say which split it is; have train, val or test in its name.")
        by_split.setdefault(told[0], []).append(shard)
    if not by_split:
        raise UserError(f"{data} has no .tar files.")
    parts = {name: _places(data, shards) for name, shards in by_split.items()}
    classes = 1 + max(max(part["targets"]) for part in parts.values())
    labels = [str(number) for number in range(classes)]
    if system.exists(f"{root}/{LABELS}"):
        labels = system.cat_file(f"{root}/{LABELS}").decode().splitlines()
        if len(labels) < classes:
            raise UserError(f"{data}/{LABELS} has {len(labels)} lines and the shards {classes} classes.")
    for part in parts.values():
        named = zip(part["targets"], part["files"], strict=True)
        part["files"] = [f"{labels[target]}/{name}" for target, name in named]
    _write_index(data, labels, parts)
    return {name: len(part["files"]) for name, part in parts.items()}


def _new(output: str | Path) -> tuple[Any, str]:
    """The file system and the path of a place that has no shards yet."""
    system, root = fsspec.core.url_to_fs(str(output))
    try:
        if system.exists(root) and system.ls(root):
            raise UserError(f"{output} is not empty; choose another --output.")
        system.makedirs(root, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another --output.") from error
    return system, root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _places(data: str | Path, shards: Sequence[str]) -> dict[str, Any]:
    """What the shards hold, read from their headers: names of images, classes, places."""
    found: dict[str, Any] = {key: [] for key in ("files", "targets", "shard", "offset", "size")}
    for number, shard in enumerate(track(shards, total=len(shards), label="index", unit="shards")):
        url = _join(data, shard)
        try:
            with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for key, members in groupby((m for m in tar if m.isfile()), lambda m: _key(m.name)):
                    sample = {_ending(m.name): m for m in members}
                    image = next((m for ending, m in sample.items() if ending in ENDINGS), None)
                    told = tar.extractfile(sample[".cls"]) if ".cls" in sample and sample[".cls"].size < 20 else None
                    if image is None or told is None:
                        raise UserError(
                            f"{printable(url)} has no {'.cls' if image else 'image'} for {printable(key)}; a sample is "
                            "an image and a .cls with the number of its class."
                        )
                    for column, value in zip(
                        found,
                        (f"{shard}-{printable(image.name)}", int(told.read()), number, image.offset_data, image.size),
                        strict=True,
                    ):
                        found[column].append(value)
        except (tarfile.TarError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{printable(url)} is no shard that can be read ({_why(error)}).") from error
    if not found["targets"] or min(found["targets"]) < 0:
        raise UserError(f"{data} holds no images, or classes below 0.")
    return {**found, "shards": list(shards)}


def _key(member: str) -> str:
    """WebDataset's: the name up to the first dot after the last slash."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _ending(member: str) -> str:
    return "." + member.rpartition("/")[2].partition(".")[2].lower()


def _write_index(data: str | Path, labels: Sequence[str], parts: dict[str, dict[str, Any]]) -> None:
    system, root = fsspec.core.url_to_fs(str(data))
    with system.transaction, system.open(f"{root}/{INDEX}", "wb") as file:  # in its place when it is whole
        file.write(json.dumps({"labels": list(labels), "splits": parts}).encode())


# ---- addresses -------------------------------------------------------------------------------------------------------


def _is_url(data: str | Path) -> bool:
    return "://" in str(data) or "::" in str(data)


def _join(data: str | Path, name: str) -> str:
    """Of a folder or a URL; in a chain such as filecache::s3://bucket/set the last address is that of the set."""
    return f"{str(data).rstrip('/')}/{name}"


def _why(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__)
