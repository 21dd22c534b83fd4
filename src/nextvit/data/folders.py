"""Folders of class folders, read as they are: classes by name, every file accounted for."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from nextvit import imagenet
from nextvit.data.demo_images import demo_folder
from nextvit.data.images import image_files, read_image
from nextvit.data.seeds import generator
from nextvit.errors import UserError

SPLITS = ("train", "val", "test")
UNLABELLED = -1  # the target of an image without a label
HELD_OUT = 5  # without a val/ folder every fifth image of a class is held out


@dataclass(frozen=True)
class Split:
    """One part of a data set: files, each with the index of its class in `labels`."""

    name: str
    folder: Path  # that the class folders lie in
    labels: tuple[str, ...]
    files: tuple[Path, ...]
    targets: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())  # what the user should know: empty classes, files outside a class

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        """The image, upright, RGB; ImageRejected where it cannot be read."""
        return read_image(self.files[index])

    def order(self, *numbers: int) -> np.ndarray:
        """All indices, shuffled: a function of the numbers alone, such as seed and epoch."""
        return generator(*numbers).permutation(len(self))

    @property
    def sha256(self) -> str:
        """Of the names of the files, as they lie in the folder, and their classes: tells whether data is the same."""
        names = (os.fsencode(os.path.relpath(file, self.folder)) for file in self.files)
        lines = (b"%d %s\0" % (target, name) for target, name in zip(self.targets, names, strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()


def data_root(data: str | Path) -> Path:
    """The folder that DATA names; `demo` is the images that ship with the package."""
    root = demo_folder() if str(data) == "demo" else Path(data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give a folder of class folders, or `demo`.")
    return root


def read_split(data: str | Path, name: str, labels: Sequence[str] | None = None) -> Split:
    """Read a split of `data`: a folder with `train/`, `val/` and perhaps `test/`, or a single folder of class folders.

    A single folder is split the same way each time: every fifth image of each class is `val` (of fewer, the
    last one), and there is no `test`.
    labels: the classes of a model. Images are matched to them by name, those of ImageNet by WordNet id too; a folder
    that is none of them is an error. None: the classes are the folders, sorted.
    """
    root = data_root(data)
    parts = [part for part in SPLITS if (root / part).is_dir()]
    if parts and name not in parts:
        raise UserError(f"{root} has no {name}/ folder, only {', '.join(parts)}.")
    if not parts and name not in ("train", "val"):
        raise UserError(f"{root} is a single folder of class folders, which gives train and val, not {name!r}.")
    folder = root / name if parts else root
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UserError(
            f"{folder} has no class folders; put the images of each class into a folder of its name (train, val "
            "and test are the names of splits)."
        )
    classes = tuple(labels) if labels is not None else tuple(found)
    number = {label: index for index, label in enumerate(classes)}
    if classes == imagenet.labels():
        number |= {wordnet_id: index for index, wordnet_id in enumerate(imagenet.wordnet_ids())}
    if strange := [label for label in found if label not in number]:
        raise UserError(
            f"{folder} has a class {strange[0]!r} that the model does not know; it knows {', '.join(classes[:20])}."
        )
    files: list[Path] = []
    targets: list[int] = []
    notes = [f"{folder} has files outside a class folder, which are left out" for p in folder.iterdir() if p.is_file()][
        :1
    ]
    for label in found:
        own = image_files(folder / label)
        if not parts:
            step = min(HELD_OUT, max(len(own), 2))  # of a class with few images, the last one
            held_out = np.arange(len(own)) % step == step - 1
            own = [path for path, out in zip(own, held_out, strict=True) if out == (name == "val")]
        if not own:
            notes.append(f"class {label!r} has no images in {name}")
        files += own
        targets += [number[label]] * len(own)
    if not files:
        raise UserError(f"{folder} has no images for {name}; put the images of each class into its folder.")
    return Split(name, folder, classes, tuple(files), tuple(targets), tuple(notes))


def with_unlabelled(split: Split, folder: str | Path) -> Split:
    """The split, and after it all images below a folder, without labels."""
    found = image_files(Path(folder)) if Path(folder).is_dir() else []
    if not found:
        raise UserError(f"{folder} has no images without labels; give a folder that has.")
    return replace(split, files=split.files + tuple(found), targets=split.targets + (UNLABELLED,) * len(found))


def read_splits(data: str | Path) -> list[Split]:
    """All splits that `data` has; those of a single folder are the train and val that training would make of it."""
    root = data_root(data)
    names = [name for name in SPLITS if (root / name).is_dir()] or ["train", "val"]
    return [read_split(data, name) for name in names]


def default_eval_split(data: str | Path) -> str:
    """`test` where there is one, else `val`: the images that training did not see."""
    return "test" if (data_root(data) / "test").is_dir() else "val"
