"""Folders of class folders, read as they are: classes by name, every file accounted for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nextvit.data.demo_images import demo_folder
from nextvit.data.images import image_files
from nextvit.data.split import Split, numbered
from nextvit.errors import UserError

SPLITS = ("train", "val", "test")
HELD_OUT = 5  # without a val/ folder every fifth image of a class is held out


def data_root(data: str | Path) -> Path:
    """The folder that DATA names; `demo` is the images that ship with the package."""
    root = demo_folder() if str(data) == "demo" else Path(data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give a folder of class folders, or `demo`.")
    return root


def folder_split(data: str | Path, name: str, labels: Sequence[str] | None = None) -> Split:
    """Read a split of `data`: a folder with `train/`, `val/` and perhaps `test/`, or a single folder of class folders.

    A single folder is split the same way each time: every fifth image of each class is `val` (of fewer, the
    last one), and there is no `test`.
    labels: see `numbered`.
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
    classes, number = numbered(found, labels, folder)
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


def folder_splits(data: str | Path) -> tuple[str, ...]:
    """Names of the splits that `data` has; a single folder has the train and val that `folder_split` makes of it."""
    root = data_root(data)
    return tuple(name for name in SPLITS if (root / name).is_dir()) or ("train", "val")
