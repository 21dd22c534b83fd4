"""Folders of images and masks, ADE20K's and one's own, read as they are: every image with the label of each pixel."""

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from nextvit import class_names
from nextvit.data.folders import HELD_OUT, SPLITS
from nextvit.data.images import FORMATS, MAX_PIXELS, ImageRejected, image_files, printable
from nextvit.data.scenes import scenes_folder
from nextvit.data.split import UNLABELLED, Split
from nextvit.errors import UserError

IGNORED = 255  # the label of a pixel that no loss and no metric counts
MOST_CLASSES = 254  # the last label stands for padding in training
ADE20K = "ADEChallengeData2016"  # the folder that ADE20K's archive holds
ANNOTATIONS = "annotations"  # what ADE20K calls its folder of masks
PARTS = {"train": "training", "val": "validation"}  # as ADE20K names them
LABELS, COLOURS = "labels.txt", "colours.csv"
MASKS_WANTED = (
    f"put them as images/ and masks/, or with train/ and val/ above or below these, beside {LABELS} (a name a line, "
    f"masks hold its line number from 0) or {COLOURS} (name,red,green,blue); or give a folder in ADE20K's layout"
)


class MaskRejected(ImageRejected):
    """The mask of one image cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class MaskSplit(Split):
    """Images, each with a mask and without a target. Labels are 0 to classes - 1, and IGNORED. `faults` are images
    without a mask and masks without an image.
    """

    masks: tuple[Path, ...] = field(default=())
    zero_is_ignored: bool = False  # ADE20K's: 0 is no class, class 0 has the value 1
    colours: tuple[tuple[int, int, int], ...] = ()  # of the classes, then of what is ignored; empty: masks hold indices

    def sample(self, index: int) -> Callable[[], tuple[Image.Image, np.ndarray]]:
        return partial(self.labelled, index)

    def labelled(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image and labels; ImageRejected where either cannot be used."""
        image = self.read(index)
        return image, self.labels_of(index, image.size)

    def labels_of(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W) of an image of `size` = (W, H); MaskRejected for a mask that fits neither it nor the classes."""
        path = self.masks[index]
        name = printable(path)
        values = _pixels(path, name, size)
        if self.colours:
            return self._by_colour(values, name)
        if values.ndim == 3:
            raise MaskRejected(f"{name} has colours; a mask holds class numbers, or {COLOURS} names its colours.")
        labels = values - 1 if self.zero_is_ignored else values  # uint8: 0 becomes 255, and 255 becomes 254
        if self.zero_is_ignored:
            labels[values == IGNORED] = IGNORED
        strange = labels[(labels >= len(self.labels)) & (labels != IGNORED)]
        if strange.size:
            value = int(strange[0]) + self.zero_is_ignored
            hint = "" if self.zero_is_ignored else "; numbers from 1, and 0 for nothing, are ADE20K's layout"
            raise MaskRejected(
                f"{name} has {strange.size} pixels of values that are no class, the first is {value}; there are "
                f"{len(self.labels)} classes and {IGNORED} for what is ignored{hint}."
            )
        return labels

    def _by_colour(self, values: np.ndarray, name: str) -> np.ndarray:
        if values.ndim != 3:
            raise MaskRejected(f"{name} holds numbers and no colours, and {COLOURS} names colours.")
        codes = values.astype(np.int32) @ (65536, 256, 1)
        known = np.array(self.colours, np.int32) @ (65536, 256, 1)
        order = known.argsort()
        place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
        found = order[place]
        strange = known[found] != codes
        if strange.any():
            colour = tuple(values[strange][0].tolist())
            count = int(strange.sum())
            raise MaskRejected(f"{name} has {count} pixels of colours that {COLOURS} has not, such as {colour}.")
        return np.where(found < len(self.labels), found, IGNORED).astype(np.uint8)

    @property
    def sha256(self) -> str:
        """Of the names of images and masks, as they lie in the folder: tells whether data is the same."""
        pairs = zip(self.files, self.masks, strict=True)
        names = [os.fsencode(os.path.relpath(path, self.folder)) for pair in pairs for path in pair]
        return hashlib.sha256(b"\0".join(names)).hexdigest()


def _pixels(path: Path, name: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) of grey or palette indices, or (H, W, 3)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MaskRejected(f"{name} has {image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}.")
            if image.size != size:
                found, wanted = (" x ".join(map(str, sides)) for sides in (image.size, size))
                raise MaskRejected(f"{name} has {found} pixels and its image, upright, {wanted}; make them equal.")
            if image.format == "JPEG":
                raise MaskRejected(f"{name} is a JPEG, which changes labels; save masks as PNG.")
            if image.mode in ("L", "P", "1"):
                return np.array(image if image.mode != "1" else image.convert("L").point(lambda v: v > 0), np.uint8)
            if image.mode in ("RGB", "RGBA"):
                return np.array(image.convert("RGB"))
            raise MaskRejected(f"{name} has more than 8 bits a pixel ({image.mode}); save it with 8.")
    except MaskRejected:
        raise
    except OSError as error:
        reason = error.strerror or "it is damaged, or no image"
        raise MaskRejected(f"{name} cannot be read: {reason}.") from error
    except Exception as error:  # decoders raise many kinds on crafted files
        raise MaskRejected(f"{name} cannot be read: it is damaged.") from error


# ---- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the images and the masks of a split lie. shared: with train or val, which have every fifth of them."""

    images: Path
    masks: Path
    shared: bool = False


def mask_split(data: str | Path, name: str, labels: Sequence[str] | None = None) -> MaskSplit:
    """Read a split of `data`: a folder in ADE20K's layout, or images/ and masks/ with the names of the classes.

    A folder without train/ and val/ is split the same way each time: every fifth image is `val`.
    labels: the classes of a model, which must be those of the folder. Images without a mask and masks without an image
    are left out and named in `faults`. Raises UserError for a folder of another kind.
    """
    root = _root(data)
    place = _place(root, name)
    if place is None:
        raise UserError(f"{root} has no images and masks for {name}; {MASKS_WANTED}.")
    ade20k = place.masks.parent.name == ANNOTATIONS
    classes, colours = (_ade20k_classes(root), ()) if ade20k else _own_classes(root)
    if labels is not None and tuple(labels) != classes:
        pairs = zip(labels, classes, strict=False)
        theirs, ours = next((p for p in pairs if p[0] != p[1]), (f"{len(labels)} classes", f"{len(classes)} classes"))
        raise UserError(f"{root} has other classes than the model: {ours!r} where the model has {theirs!r}.")
    files, masks, unpaired = _pairs(place.images, place.masks)
    if place.shared:
        chosen = [i for i in range(len(files)) if (i % HELD_OUT == HELD_OUT - 1) == (name == "val")]
        files, masks = [files[i] for i in chosen], [masks[i] for i in chosen]
    if not files:
        none = f": {unpaired[0]}" if unpaired else "."
        raise UserError(f"{place.images} has no images with masks for {name}{none}")
    return MaskSplit(
        name=name,
        folder=root,
        labels=classes,
        files=tuple(files),
        targets=(UNLABELLED,) * len(files),
        masks=tuple(masks),
        zero_is_ignored=ade20k,
        colours=colours,
        faults=tuple(unpaired),
    )


def mask_splits(data: str | Path) -> tuple[str, ...]:
    """Of train, val and test, those that `data` has."""
    root = _root(data)
    return tuple(name for name in SPLITS if _place(root, name) is not None)


def _root(data: str | Path) -> Path:
    root = scenes_folder() / "ade20k" if str(data) == "demo" else Path(data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give a folder of images and masks, or `demo`.")
    return root / ADE20K if (root / ADE20K).is_dir() else root


def _place(root: Path, name: str) -> _Place | None:
    part = PARTS.get(name, name)
    for place in (
        _Place(root / "images" / part, root / ANNOTATIONS / part),
        _Place(root / name / "images", root / name / "masks"),
        _Place(root / "images" / name, root / "masks" / name),
    ):
        if place.images.is_dir() and place.masks.is_dir():
            return place
    alone = _Place(root / "images", root / "masks", shared=True)
    parted = any((alone.masks / part).is_dir() for part in SPLITS)
    return alone if name != "test" and alone.images.is_dir() and alone.masks.is_dir() and not parted else None


def _pairs(images: Path, masks: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Images and masks of the same name but for its ending, in order; and what has no partner."""
    by_stem: dict[Path, Path] = {}
    for mask in image_files(masks):
        stem = mask.relative_to(masks).with_suffix("")
        if stem in by_stem:
            raise UserError(f"{masks} has two masks of one name: {by_stem[stem].name} and {mask.name}.")
        by_stem[stem] = mask
    files = image_files(images)
    stems = [file.relative_to(images).with_suffix("") for file in files]
    if twice := [file for file, stem, after in zip(files, stems, stems[1:], strict=False) if stem == after]:
        raise UserError(f"{images} has two images of one name, and one mask is for one of them: {twice[0].stem}.")
    paired = [(file, by_stem[stem]) for file, stem in zip(files, stems, strict=True) if stem in by_stem]
    missing = [file for file, stem in zip(files, stems, strict=True) if stem not in by_stem]
    alone = sorted(by_stem[stem] for stem in by_stem.keys() - set(stems))
    unpaired = [f"{printable(file)} has no mask of the same name in {masks}." for file in missing]
    unpaired += [f"{printable(mask)} has no image of the same name in {images}." for mask in alone]
    return [file for file, _ in paired], [mask for _, mask in paired], unpaired


# ---- classes ---------------------------------------------------------------------------------------------------------


def _ade20k_classes(root: Path) -> tuple[str, ...]:
    """Of objectInfo*.txt, whose last column has their names; ADE20K's 150 by the names of its benchmark."""
    tables = sorted(root.glob("objectInfo*.txt"))
    if not tables:
        return class_names.ade20k()
    rows = [line.split("\t") for line in _lines(tables[0])[1:]]
    if len(rows) == len(class_names.ade20k()):
        return class_names.ade20k()
    return _distinct([row[-1] for row in rows], tables[0])


def _own_classes(root: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names of the classes, and their colours where masks have colours."""
    if (root / LABELS).is_file():
        return _distinct(_lines(root / LABELS), root / LABELS), ()
    if not (root / COLOURS).is_file():
        raise UserError(f"{root} has neither {LABELS} nor {COLOURS}, so the classes have no names; {MASKS_WANTED}.")
    try:
        table = csv.DictReader(_lines(root / COLOURS))
        rows = [(row["name"], tuple(int(row[c]) for c in ("red", "green", "blue"))) for row in table]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{root / COLOURS} must have the columns name,red,green,blue, numbers from 0 to 255."
        ) from error
    if any(not 0 <= level <= 255 for _, colour in rows for level in colour) or len({c for _, c in rows}) < len(rows):
        raise UserError(f"{root / COLOURS} must have a colour of its own a row, numbers from 0 to 255.")
    rows.sort(key=lambda row: row[0] == "ignored")  # stable: last
    names = _distinct([name for name, _ in rows if name != "ignored"], root / COLOURS)
    return names, tuple((r, g, b) for _, (r, g, b) in rows)


def _distinct(names: Sequence[str], source: Path) -> tuple[str, ...]:
    if not 1 < len(set(names)) == len(names) <= MOST_CLASSES or not all(names):
        raise UserError(f"{source} must name two to {MOST_CLASSES} classes, each once.")
    return tuple(names)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text; save it as UTF-8.") from error
