"""One part of a data set: its images, wherever they lie, each with its class."""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from nextvit import class_names
from nextvit.data.images import Draft, ImageRejected, image_files, printable, read_image
from nextvit.data.seeds import generator
from nextvit.errors import UserError
from nextvit.files import cache_folder

UNLABELLED = -1  # the target of an image without a label
ReadImage = Callable[[Draft | None], Image.Image]
CACHING = ("filecache", "simplecache", "blockcache")  # fsspec's, before the URL that they keep


@dataclass(frozen=True, eq=False)
class Places:
    """Where images lie in shards: image i is `size[i]` bytes from `offset[i]` of `urls[shard[i]]`."""

    urls: tuple[str, ...]
    shard: np.ndarray  # int64 (N,), and so are the others
    offset: np.ndarray
    size: np.ndarray

    def content(self, index: int) -> bytes:
        """The bytes of one image; ImageRejected where they cannot be had."""
        url, start, size = self.urls[self.shard[index]], int(self.offset[index]), int(self.size[index])
        try:
            system, path = file_system(url)
            found: bytes = system.cat_file(path, start=start, end=start + size)
        except Exception as error:  # every file system has errors of its own
            raise ImageRejected(f"{printable(url)} cannot be read at {start} ({type(error).__name__}).") from error
        if len(found) != size:
            raise ImageRejected(f"{printable(url)} is cut short: {size} bytes at {start} are {len(found)}.")
        return found


@dataclass(frozen=True)
class Split:
    """Images, each with the index of its class in `labels`."""

    name: str
    folder: Path  # that the class folders lie in
    labels: tuple[str, ...]
    files: tuple[Path, ...]  # below `folder`; of images in shards, where they would lie
    targets: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())  # what the user should know: empty classes, files outside a class
    places: Places | None = None  # None: each image is a file of its own
    faults: tuple[str, ...] = field(default=())  # what is left out because it fits nothing else; training refuses such

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, draft: Draft | None = None) -> Image.Image:
        """The image, upright, RGB; ImageRejected where it cannot be read. draft: see `read_image`."""
        if self.places is None:
            return read_image(self.files[index], draft=draft)
        return read_image(self.places.content(index), name=self.files[index], draft=draft)

    def labelled(self, index: int) -> tuple[Image.Image, Any]:
        """The image and the truth of dense tasks; ImageRejected where either cannot be used."""
        return self.read(index), None

    def sample(self, index: int) -> Any:
        """What a transform of the loader is given: here ReadImage, so that it can ask for less than the whole image."""
        read: ReadImage = partial(self.read, index)
        return read

    def content(self, index: int) -> bytes:
        """The image as it is stored; ImageRejected where there is none."""
        if self.places is not None:
            return self.places.content(index)
        self.size(index)
        return self.files[index].read_bytes()

    def size(self, index: int) -> int:
        """In bytes; ImageRejected where there is no regular file."""
        if self.places is not None:
            return int(self.places.size[index])
        try:
            found = os.stat(self.files[index])
        except OSError as error:
            raise ImageRejected(f"{printable(self.files[index])} cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(found.st_mode):
            raise ImageRejected(f"{printable(self.files[index])} is not a regular file.")
        return found.st_size

    def order(self, *numbers: int) -> np.ndarray:
        """All indices, shuffled: a function of the numbers alone, such as seed and epoch."""
        return generator(*numbers).permutation(len(self))

    def batches(self, size: int, *numbers: int) -> np.ndarray:
        """int64 (steps, size): the batches of one pass, shuffled; what does not fill one is left out."""
        steps = len(self) // size
        return self.order(*numbers)[: steps * size].reshape(steps, size)

    def steps(self, size: int) -> int:
        """How many batches a pass has."""
        return len(self) // size

    @property
    def sha256(self) -> str:
        """Of the names of the files, as they lie in the folder, and their classes: tells whether data is the same."""
        names = (os.fsencode(os.path.relpath(file, self.folder)) for file in self.files)
        lines = (b"%d %s\0" % (target, name) for target, name in zip(self.targets, names, strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there; kept for the process, and made anew in a forked one.

    What `filecache::` and the like keep lies in our own cache, for all processes and for later runs.
    """
    first = url.partition("::")[0]
    kept = {first: {"cache_storage": str(cache_folder() / "shards")}} if first in CACHING else {}
    system, path = fsspec.core.url_to_fs(url, **kept)
    return system, path


def numbered(
    found: Sequence[str], labels: Sequence[str] | None, where: object
) -> tuple[tuple[str, ...], dict[str, int]]:
    """All classes, and the number of each that was found.

    labels: the classes of a model. Those that were found are matched by name, those of ImageNet by WordNet id too; one
    that is none of them raises UserError. None: the classes are those that were found.
    """
    classes = tuple(labels) if labels is not None else tuple(found)
    number = {label: index for index, label in enumerate(classes)}
    if classes == class_names.imagenet():
        number |= {wordnet_id: index for index, wordnet_id in enumerate(class_names.imagenet_wordnet_ids())}
    if strange := [label for label in found if label not in number]:
        raise UserError(
            f"{where} has a class {strange[0]!r} that the model does not know; it knows {', '.join(classes[:20])}."
        )
    return classes, number


def with_unlabelled(split: Split, folder: str | Path) -> Split:
    """The split, and after it all images below a folder, without labels."""
    found = image_files(Path(folder)) if Path(folder).is_dir() else []
    if not found:
        raise UserError(f"{folder} has no images without labels; give a folder that has.")
    if split.places is not None:
        raise UserError("images without labels stand beside folders of images, not beside shards; unpack the shards.")
    return replace(split, files=split.files + tuple(found), targets=split.targets + (UNLABELLED,) * len(found))
