"""Images with objects as COCO writes them: boxes, classes, masks as polygons or runs; what is wrong with them, named.

Nothing is given to the library that decodes masks before it was looked at: odd polygons end it, short runs are read on.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextvit.data.folders import HELD_OUT, SPLITS
from nextvit.data.images import MAX_SIDE, ImageRejected, printable
from nextvit.data.rle import from_text
from nextvit.data.scenes import scenes_folder
from nextvit.data.seeds import generator
from nextvit.data.split import UNLABELLED, Split, numbered
from nextvit.errors import UserError, first_few
from nextvit.extras import need
from nextvit.progress import track

INSTANCES = "instances_"  # COCO's files are named instances_train2017.json
BESIDE = "_annotations.coco.json"  # others keep the file beside the images
NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # of splits, in names of files
WHOLE = ("default", "all")  # of a set that is not divided
COCO_WANTED = (
    f"lay it out as COCO: annotations/{INSTANCES}train.json and {INSTANCES}val.json beside folders train/ and val/ "
    f"with the images, or {BESIDE} in each of these; `nextvit data convert` makes that of Pascal VOC and YOLO"
)
MANY = 20_000  # annotations whose reading is shown
LARGEST = 2**63  # above every number of an image, an annotation or a category
FAR = 1.0  # sides of the image that a polygon may reach beyond it


@dataclass(frozen=True, eq=False)
class Objects:
    """What one image holds: N objects, in its pixels."""

    boxes: np.ndarray  # float32 (N, 4): x1, y1, x2, y2, within the image
    labels: np.ndarray  # int64 (N,)
    crowd: np.ndarray  # bool (N,): a region of many, which no detection has to find
    runs: tuple[dict[str, Any], ...]  # N masks, as COCO's compressed runs

    def __len__(self) -> int:
        return len(self.labels)

    def masks(self) -> np.ndarray:
        """uint8 (N, H, W) of 0 and 1."""
        decode = need("faster_coco_eval.core.mask", extra="detect").decode
        return np.ascontiguousarray(decode(list(self.runs)).transpose(2, 0, 1))

    def chosen(self, which: np.ndarray) -> "Objects":
        """Those of a bool (N,)."""
        runs = tuple(run for run, there in zip(self.runs, which, strict=True) if there)
        return Objects(self.boxes[which], self.labels[which], self.crowd[which], runs)


@dataclass(frozen=True, eq=False)
class Annotations:
    """All objects of a split, image by image."""

    first: np.ndarray  # int64 (images + 1,): where those of an image begin
    boxes: np.ndarray  # float32 (A, 4): x1, y1, x2, y2
    labels: np.ndarray  # int64 (A,)
    crowd: np.ndarray  # bool (A,)
    areas: np.ndarray  # float64 (A,): as the file has them, by which COCO tells small from large
    ids: np.ndarray  # int64 (A,)
    shapes: tuple[Any, ...]  # A: polygons as float64 arrays, compressed runs as bytes, None where there is a box alone

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ObjectSplit(Split):
    """Images with objects and without targets. `faults` are entries that fit nothing else and are left out."""

    sizes: tuple[tuple[int, int], ...] = ()  # height and width of each image, by its entry
    image_ids: tuple[int, ...] = ()
    category_ids: tuple[int, ...] = ()  # of the classes
    annotations: Annotations = field(default_factory=lambda: _packed((), 0))
    misshapen: tuple[str, ...] = ()  # objects left out because their box or mask is none

    def labelled(self, index: int) -> tuple[Image.Image, Objects]:
        """ImageRejected where the image cannot be read, or has another size than its entry says."""
        image, size = self.read(index), self.sizes[index]
        if (image.height, image.width) != size:
            name = printable(self.files[index])
            raise ImageRejected(
                f"{name} has {image.width} x {image.height} pixels, upright, and its entry says {size[1]} x {size[0]}; "
                "boxes and masks would lie elsewhere."
            )
        return image, self.objects(index)

    def objects(self, index: int) -> Objects:
        """What the image holds."""
        a, size = self.annotations, self.sizes[index]
        own = slice(*a.first[index : index + 2].tolist())
        runs = [_runs(shape, box, size) for shape, box in zip(a.shapes[own], a.boxes[own], strict=True)]
        return Objects(a.boxes[own], a.labels[own], a.crowd[own], tuple(runs))

    def sample(self, index: int) -> Callable[..., tuple[Image.Image, Objects]]:
        return partial(self._drawn, index)

    def _drawn(self, index: int, other: int = 0) -> tuple[Image.Image, Objects]:
        """The image and its objects; `other` further on, those of another image."""
        return self.labelled((index + other) % len(self))

    @property
    def masked(self) -> bool:
        """Whether any object has a mask; without one its box is its mask."""
        return any(shape is not None for shape in self.annotations.shapes)

    @property
    def objects_of(self) -> np.ndarray:
        """int64 (images,): how many each has that are no crowd."""
        starts = self.annotations.first
        whole = np.concatenate([[0], np.cumsum(~self.annotations.crowd)])
        found: np.ndarray = whole[starts[1:]] - whole[starts[:-1]]
        return found

    def only(self, indices: Sequence[int]) -> "ObjectSplit":
        """Some of its images."""
        a = self.annotations
        rows = [np.arange(a.first[i], a.first[i + 1]) for i in indices]
        some = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        first = np.cumsum([0, *map(len, rows)])
        kept = Annotations(
            first=first,
            boxes=a.boxes[some],
            labels=a.labels[some],
            crowd=a.crowd[some],
            areas=a.areas[some],
            ids=a.ids[some],
            shapes=tuple(a.shapes[i] for i in some.tolist()),
        )
        return replace(
            self,
            files=tuple(self.files[i] for i in indices),
            targets=tuple(self.targets[i] for i in indices),
            sizes=tuple(self.sizes[i] for i in indices),
            image_ids=tuple(self.image_ids[i] for i in indices),
            annotations=kept,
        )

    def steps(self, size: int) -> int:
        lying = sum(height <= width for height, width in self.sizes)
        return -(-lying // size) + -(-(len(self) - lying) // size)

    def batches(self, size: int, *numbers: int) -> np.ndarray:
        """int64 (steps, size) of one pass, none with upright and lying images both; a part that is not full is filled
        with images of its kind again, as the authors' sampler does.
        """
        order = self.order(*numbers)
        upright = np.array([height > width for height, width in self.sizes])[order]
        kinds = (order[~upright], order[upright])
        whole = np.concatenate([np.resize(kind, (-(-len(kind) // size), size)) for kind in kinds if len(kind)])
        return whole[generator(*numbers, 1).permutation(len(whole))]

    @property
    def sha256(self) -> str:
        """Of names, boxes and classes: tells whether data is the same."""
        names = b"\0".join(os.fsencode(os.path.relpath(file, self.folder)) for file in self.files)
        a = self.annotations
        parts = (names, a.first.tobytes(), a.boxes.tobytes(), a.labels.tobytes(), a.crowd.tobytes())
        return hashlib.sha256(b"\1".join(parts)).hexdigest()


def _runs(shape: Any, box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed runs of an object's mask in an image of `size` = (H, W)."""
    mask = need("faster_coco_eval.core.mask", extra="detect")
    if isinstance(shape, bytes):
        return {"size": list(size), "counts": shape}
    if shape is None:
        x1, y1, x2, y2 = box.tolist()
        shape = (np.array([x1, y1, x2, y1, x2, y2, x1, y2]),)
    found: dict[str, Any] = mask.merge(mask.frPyObjects([ring.tolist() for ring in shape], *size))
    return found


# ---- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the entries of a split lie, and its images. shared: with train or val, which have every fifth of them."""

    entries: Path
    images: Path
    shared: bool = False


def object_split(data: str | Path, name: str, labels: Sequence[str] | None = None) -> ObjectSplit:
    """Read a split of `data`: a folder in COCO's layout, or with a COCO file beside the images of each split.

    A set that is not divided is split the same way each time: every fifth image is `val`.
    labels: the classes of a model, by which those of the folder are numbered. Entries that fit nothing else are left
    out and named in `faults`, objects whose box or mask is none in `misshapen`. Raises UserError where there is no such
    folder, or a file is no COCO file.
    """
    root = _root(data)
    place = _place(root, name)
    if place is None:
        raise UserError(f"{root} has no images with objects for {name}; {COCO_WANTED}.")
    split = _read(root, place, name, labels)
    if place.shared:
        held_out = [i for i in range(len(split)) if (i % HELD_OUT == HELD_OUT - 1) == (name == "val")]
        split = split.only(held_out)
    if not len(split):
        none = f": {split.faults[0]}" if split.faults else "."
        raise UserError(f"{place.entries} has no images for {name} that are there{none}")
    return split


def object_splits(data: str | Path) -> tuple[str, ...]:
    """Of train, val and test, those that `data` has."""
    root = _root(data)
    return tuple(name for name in SPLITS if _place(root, name) is not None)


def _root(data: str | Path) -> Path:
    root = scenes_folder() / "coco" if str(data) == "demo" else Path(data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give a folder in COCO's layout, or `demo`.")
    return root


def _place(root: Path, name: str) -> _Place | None:
    for own in NAMES[name]:
        if (root / own / BESIDE).is_file():
            return _Place(root / own / BESIDE, root / own)
    files = sorted((root / "annotations").glob("*.json")) if (root / "annotations").is_dir() else []
    stems = {file: file.stem.removeprefix(INSTANCES) for file in files if not _of_something_else(file)}
    found = [file for file, stem in stems.items() if stem.rstrip("0123456789_-") in NAMES[name]]
    if len(found) > 1:
        raise UserError(f"{root} has {found[0].name} and {found[1].name} for {name}; leave one of them there.")
    if found:
        return _Place(found[0], _images(root, stems[found[0]], name))
    whole = [file for file, stem in stems.items() if stem in WHOLE] + [root / BESIDE] * (root / BESIDE).is_file()
    parted = any(stem.rstrip("0123456789_-") in names for stem in stems.values() for names in NAMES.values())
    if name != "test" and len(whole) == 1 and not parted:
        return _Place(whole[0], root if whole[0].parent == root else _images(root, "images", name), shared=True)
    return None


def _of_something_else(file: Path) -> bool:
    return file.name.startswith(("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_"))


def _images(root: Path, stem: str, name: str) -> Path:
    """The folder of a split's images."""
    wanted = [root / stem, root / "images" / stem, *(root / n for n in NAMES[name])]
    wanted += [*(root / "images" / n for n in NAMES[name]), root / "images"]
    return next((folder for folder in wanted if folder.is_dir()), root)


# ---- COCO's files ----------------------------------------------------------------------------------------------------


def _read(root: Path, place: _Place, name: str, labels: Sequence[str] | None) -> ObjectSplit:
    images, annotations, categories = _lists(place.entries)
    category_ids, classes = _classes(categories, place.entries)
    known, number = numbered(classes, labels, place.entries)
    label_of = {identity: number[label] for identity, label in zip(category_ids, classes, strict=True)}
    id_of = {number[label]: identity for identity, label in zip(category_ids, classes, strict=True)}
    spare = iter(range(max(category_ids) + 1, max(category_ids) + 1 + len(known)))  # of the model's other classes
    faults: list[str] = []
    entries = _entries(images, place, faults)
    order = {identity: index for index, identity in enumerate(entries)}
    misshapen: list[str] = []
    rows: list[_Row] = []
    seen: set[int] = set()
    for entry in _shown(annotations, name):
        identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or identity in seen:
            which = (
                f"{entry!r:.40} has no number of its own, or none of 64 bits"
                if identity is None
                else f"{identity} is there twice"
            )
            faults.append(f"annotation {which}")
            continue
        seen.add(identity)
        image, category = (_whole(entry.get(key)) for key in ("image_id", "category_id"))
        if image is None or image not in images:
            faults.append(f"annotation {identity} is of image {entry.get('image_id')!r:.40}, which is none")
            continue
        if category is None or category not in label_of:
            faults.append(f"annotation {identity} is of category {entry.get('category_id')!r:.40}, which is none")
            continue
        if image not in entries:  # its file is missing, which is told already
            continue
        file, size = entries[image]
        found = _object(entry, size)
        if isinstance(found, str):
            misshapen.append(f"annotation {identity} of {printable(file)}: {found}")
        else:
            rows.append(_Row(order[image], identity, label_of[category], *found))
    return ObjectSplit(
        name=name,
        folder=root,
        labels=known,
        files=tuple(place.images / file for file, _ in entries.values()),
        targets=(UNLABELLED,) * len(entries),
        sizes=tuple(size for _, size in entries.values()),
        image_ids=tuple(entries),
        category_ids=tuple(id_of[i] if i in id_of else next(spare) for i in range(len(known))),
        annotations=_packed(rows, len(entries)),
        notes=tuple(_notes(rows, place.entries)),
        faults=tuple(faults),
        misshapen=tuple(misshapen),
    )


def _shown(annotations: list[Any], name: str) -> Iterable[Any]:
    if len(annotations) <= MANY:
        return annotations
    return track(annotations, total=len(annotations), label=f"read {name}", unit="objects")


def _lists(path: Path) -> tuple[dict[Any, Any], list[Any], list[Any]]:
    """Images by their number, annotations and categories; UserError where the file has not all three."""
    try:
        whole = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        why = "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"{path} is no JSON: {why}; download or export it again.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
            raise UserError(f"{path} has no list {key!r}, which a COCO file for detection has; export it again.")
    found: dict[Any, Any] = {}
    wrong: list[str] = []
    for entry in whole["images"]:
        identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
        sides = [_whole(entry.get(key)) or 0 for key in ("height", "width")] if identity is not None else []
        if identity is None:
            wrong.append(f"image {entry!r:.40} has no number of its own, or none of 64 bits")
        elif identity in found:
            wrong.append(f"image {identity} is there twice")
        elif not isinstance(entry.get("file_name"), str) or not all(0 < side <= MAX_SIDE for side in sides):
            wrong.append(f"image {identity} has no file_name, height and width")
        else:
            found[identity] = entry
    if wrong:
        raise UserError(f"{path}: {first_few(wrong)}.")
    return found, whole["annotations"], whole["categories"]


def _classes(categories: list[Any], path: Path) -> tuple[list[int], list[str]]:
    """Numbers and names of the categories, by ascending number, which is the order of the classes."""
    rows = []
    for entry in categories:
        identity = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or not isinstance(entry.get("name"), str) or not entry["name"]:
            raise UserError(f"{path}: category {entry!r:.80} has no id, a whole number of 64 bits, and name.")
        rows.append((identity, entry["name"]))
    for column, what in ((0, "number"), (1, "name")):
        twice = [value for value, count in Counter(row[column] for row in rows).items() if count > 1]
        if twice:
            raise UserError(f"{path} has two categories of one {what}: {first_few(list(map(repr, twice)))}.")
    if not rows:
        raise UserError(f"{path} has no categories, so there is nothing to detect.")
    rows.sort()
    return [identity for identity, _ in rows], [name for _, name in rows]


def _entries(images: dict[int, Any], place: _Place, faults: list[str]) -> dict[int, tuple[str, tuple[int, int]]]:
    """File and (height, width) of each image that is there, by its number."""
    found: dict[int, tuple[str, tuple[int, int]]] = {}
    for identity, entry in sorted(images.items()):
        file = entry["file_name"]
        if os.path.isabs(file) or ".." in Path(file).parts or "\0" in file:
            faults.append(f"image {identity} lies outside {place.images}: {printable(file)}")
        elif not os.path.lexists(place.images / file):
            faults.append(f"image {identity}, {printable(file)}, is not in {place.images}")
        else:
            found[identity] = file, (entry["height"], entry["width"])
    return found


@dataclass(frozen=True, slots=True)
class _Row:
    """An annotation that can be used."""

    image: int  # its place in the split
    identity: int
    label: int
    box: tuple[float, float, float, float]
    cut: bool  # it reached out of the image by a pixel or more
    crowd: bool
    area: float
    shape: Any  # see Annotations


def _object(entry: dict[str, Any], size: tuple[int, int]) -> str | tuple[Any, ...]:
    """Of an annotation in an image of (H, W) what a _Row has from `box` on, or what is wrong with it."""
    height, width = size
    box, crowd = entry.get("bbox"), entry.get("iscrowd", 0) in (1, True)
    if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
        return "its bbox is no list of four numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"its box is {w:g} x {h:g} pixels"
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return "its box lies outside the image"
    shape = _shape(entry.get("segmentation"), size)
    if isinstance(shape, str):
        return shape
    cut = max(x1 - x, y1 - y, x + w - x2, y + h - y2) >= 1
    area: Any = entry.get("area")
    return (x1, y1, x2, y2), cut, crowd, area if _finite(area) and area >= 0 else w * h, shape


def _shape(found: Any, size: tuple[int, int]) -> Any:
    """Polygons as arrays, compressed runs as bytes, None where there is neither; a sentence on what is wrong."""
    if found is None or found == []:
        return None
    if isinstance(found, dict):
        return _checked_runs(found, size)
    if not isinstance(found, list):
        return "its segmentation is neither polygons nor runs"
    rings = []
    (height, width), far = size, FAR
    for ring in found:
        if not isinstance(ring, list) or len(ring) % 2 or not all(map(_finite, ring)):
            return "a polygon is no list of x and y in turn"
        if len(ring) < 6:
            return "a polygon has fewer than three points"
        points = np.array(ring, np.float64)
        across, down = points[::2], points[1::2]
        if min(across) < -far * width or max(across) > (1 + far) * width:
            return "a polygon lies far outside the image"
        if min(down) < -far * height or max(down) > (1 + far) * height:
            return "a polygon lies far outside the image"
        rings.append(points)
    if all(max(ring[::2]) <= 0 or min(ring[::2]) >= width or max(ring[1::2]) <= 0 or min(ring[1::2]) >= height
           for ring in rings):  # fmt: skip
        return "its polygons lie outside the image"
    return tuple(rings)


def _checked_runs(found: dict[str, Any], size: tuple[int, int]) -> bytes | str:
    height, width = size
    if found.get("size") != [height, width]:
        return (
            f"its runs are of an image of {found.get('size')!r}, height and width, and this one has {height}, {width}"
        )
    counts = found.get("counts")
    if isinstance(counts, str):
        counts = from_text(counts)
    if not isinstance(counts, list) or any(_whole(count) is None or count < 0 for count in counts):
        return "its runs are no lengths"
    if sum(counts) != height * width:
        return f"its runs come to {sum(counts)} pixels, and the image has {height * width}"
    mask = need("faster_coco_eval.core.mask", extra="detect")
    runs: bytes = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    return runs


def _notes(rows: Sequence[_Row], path: Path) -> Iterator[str]:
    cut, without = sum(row.cut for row in rows), sum(row.shape is None for row in rows)
    if cut:
        yield f"{cut} boxes of {path} reach out of their image by a pixel or more and are cut"
    if without:
        yield f"{without} of {len(rows)} objects of {path} have no mask, so their box stands for it"


def _packed(rows: Sequence[_Row], images: int) -> Annotations:
    rows = sorted(rows, key=lambda row: row.image)  # stable
    counts = np.bincount(np.array([row.image for row in rows], np.int64), minlength=images)
    return Annotations(
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([row.box for row in rows], np.float32).reshape(-1, 4),
        labels=np.array([row.label for row in rows], np.int64),
        crowd=np.array([row.crowd for row in rows], bool),
        areas=np.array([row.area for row in rows], np.float64),
        ids=np.array([row.identity for row in rows], np.int64),
        shapes=tuple(row.shape for row in rows),
    )


def _whole(value: Any) -> int | None:
    """A whole number that fits into 64 bits, as those of COCO do."""
    fits = isinstance(value, int) and not isinstance(value, bool) and -LARGEST <= value < LARGEST
    return value if fits else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)
