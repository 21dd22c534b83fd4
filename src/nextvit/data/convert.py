"""Pascal VOC's and YOLO's folders of images with boxes, laid out anew as COCO's."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nextvit.data.folders import HELD_OUT, SPLITS
from nextvit.data.images import image_files, printable, read_image
from nextvit.errors import UserError, first_few
from nextvit.extras import need
from nextvit.files import replacing
from nextvit.progress import track

ANNOTATIONS, IMAGES = "Annotations", "JPEGImages"  # Pascal VOC's folders
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
LARGEST = 10_000_000  # bytes of a text


@dataclass(frozen=True)
class _Labelled:
    """An image, and where its objects are told."""

    image: Path
    labels: Path  # may be missing: nothing is on it


def convert(source: str | Path, folder: Path) -> dict[str, int]:
    """Write the images and objects of `source` into the new folder `folder` in COCO's layout; returns the number of
    images of each split.

    source: Pascal VOC (JPEGImages/, Annotations/, and the splits of ImageSets/Main/) or YOLO (data.yaml, and labels/
    beside images/), its boxes and polygons. A set without splits is divided: every fifth image is `val`. Raises
    UserError for another folder, where something lies at `folder`, and for labels that cannot be read, of which the
    first are named.
    """
    root = Path(source)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --output.")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}.")
    if (root / ANNOTATIONS).is_dir():
        names, splits, read = _voc_classes(root), _voc_splits(root), _voc_objects
    elif description := _description(root):
        names, splits = _yolo_description(description)
        read = _yolo_objects
    else:
        raise UserError(
            f"{root} is neither Pascal VOC ({ANNOTATIONS}/ and {IMAGES}/) nor YOLO (a data.yaml, images/ and labels/); "
            "COCO's layout needs no conversion."
        )
    wrong: list[str] = []
    number = {name: index for index, name in enumerate(names, 1)}
    categories = [{"id": index, "name": name} for name, index in number.items()]
    image_ids, object_ids = count(1), count(1)
    with replacing(folder) as unfinished:
        (unfinished / "annotations").mkdir(parents=True)
        for split, found in splits.items():
            images: list[dict[str, Any]] = []
            objects: list[dict[str, Any]] = []
            for one in track(found, total=len(found), label=f"convert {split}", unit="images"):
                try:
                    image = read_image(one.image)
                    own = list(read(one, number, image.size))
                except (UserError, ValueError) as error:
                    wrong.append(str(error) if isinstance(error, UserError) else f"{one.labels}: {error}")
                    continue
                identity = next(image_ids)
                name = f"{identity:012}{one.image.suffix.lower()}"
                (unfinished / split).mkdir(exist_ok=True)
                shutil.copyfile(one.image, unfinished / split / name)
                images.append({"id": identity, "file_name": name, "width": image.width, "height": image.height})
                images[-1]["source"] = printable(one.image.name)
                objects += [{"id": next(object_ids), "image_id": identity, "iscrowd": 0} | entry for entry in own]
            whole = {"info": {}, "licenses": [], "images": images, "annotations": objects, "categories": categories}
            path = unfinished / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(whole), encoding="utf-8")
        if wrong:
            raise UserError(
                f"{root} was not converted, {len(wrong)} images or labels cannot be read: {first_few(wrong)}."
            )
    return {split: len(found) for split, found in splits.items()}


def _box(x1: float, y1: float, x2: float, y2: float) -> dict[str, Any]:
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"a box has sides of {x2 - x1:g} x {y2 - y1:g} pixels; they must be above 0")
    return {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}


def _divided(found: list[_Labelled]) -> dict[str, list[_Labelled]]:
    parts: dict[str, list[_Labelled]] = {"train": [], "val": []}
    for index, one in enumerate(found):
        parts["val" if index % HELD_OUT == HELD_OUT - 1 else "train"].append(one)
    return {name: part for name, part in parts.items() if part}


# ---- Pascal VOC ------------------------------------------------------------------------------------------------------


def _voc_splits(root: Path) -> dict[str, list[_Labelled]]:
    """By ImageSets/Main/train.txt, val.txt and test.txt, where they are; with trainval.txt alone, that divided."""
    images = {file.stem: file for file in image_files(root / IMAGES)} if (root / IMAGES).is_dir() else {}

    def found(stems: Sequence[str]) -> list[_Labelled]:
        missing = [stem for stem in stems if stem not in images]
        if missing:
            raise UserError(f"{root / IMAGES} has no image {missing[0]}, which has labels or a split; put it there.")
        return [_Labelled(images[stem], root / ANNOTATIONS / f"{stem}.xml") for stem in stems]

    def listed(name: str) -> list[_Labelled]:
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        lines = [line.strip() for line in _text(file).splitlines() if line.strip()] if file.is_file() else []
        return found([line if line in images else line.split()[0] for line in lines])

    there = {name: part for name in SPLITS if (part := listed(name))}
    if "train" not in there and "val" not in there and (both := listed("trainval")):
        return _divided(both) | there
    if there:
        return there
    if any((root / "ImageSets" / "Main" / f"{name}.txt").is_file() for name in SPLITS):
        raise UserError(f"the lists in {root / 'ImageSets' / 'Main'} name no images; mend them, or take them away.")
    return _divided(found(sorted(file.stem for file in (root / ANNOTATIONS).glob("*.xml"))))


def _voc_classes(root: Path) -> list[str]:
    """All names that objects have, in order."""
    names = set()
    for file in sorted((root / ANNOTATIONS).glob("*.xml")):
        names |= {entry.findtext("name") or "" for entry in _tree(file).iter("object")}
    if not names - {""}:
        raise UserError(f"{root / ANNOTATIONS} has no object with a name.")
    return sorted(names - {""})


def _tree(path: Path) -> ElementTree.Element:
    """Of an XML file that declares no entities, which could name other files or grow without end."""
    text = _text(path)
    if "<!DOCTYPE" in text.upper() or "<!ENTITY" in text.upper():
        raise UserError(f"{path} declares a document type, which labels do not need; take that out.")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is no XML: {error}.") from error


def _voc_objects(one: _Labelled, number: dict[str, int], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """VOC counts pixels from 1, both ends within the box."""
    if not one.labels.is_file():
        return
    tree = _tree(one.labels)
    told = tuple(int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    if told != (0, 0) and told != size:
        raise UserError(f"{one.labels} is of an image of {told[0]} x {told[1]} pixels, and {one.image} has {size}")
    for entry in tree.iter("object"):
        name = entry.findtext("name") or ""
        places = [float(entry.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")]
        if name not in number or not all(map(math.isfinite, places)):
            raise UserError(f"{one.labels} has an object without a name, or without four numbers in bndbox")
        x1, y1, x2, y2 = places
        yield {"category_id": number[name], **_box(x1 - 1, y1 - 1, x2, y2)}


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def _description(root: Path) -> Path | None:
    """The YAML file that names classes and images, data.yaml first."""
    files = sorted((f for f in root.glob("*.y*ml") if f.suffix in (".yaml", ".yml")), key=lambda f: f.stem != "data")
    return next((file for file in files if "names" in _text(file)), files[0] if files else None)


def _yolo_description(path: Path) -> tuple[list[str], dict[str, list[_Labelled]]]:
    """Names of the classes, and the images of each split, of a data.yaml."""
    yaml = need("yaml", extra="train")
    try:
        found = yaml.load(_text(path), Loader=yaml.BaseLoader)  # text alone: a class may be named `no` or `1`
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not plain YAML: {' '.join(str(error).split())}.") from error
    if isinstance(found, dict) and "kpt_shape" in found:
        raise UserError(f"{path} is of poses (kpt_shape), which are neither boxes nor polygons; take a set of these.")
    names = found.get("names") if isinstance(found, dict) else None
    if isinstance(names, dict):
        numbers = [str(index) for index in range(len(names))]
        names = [names[number] for number in numbers] if names.keys() == set(numbers) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path} has no names of the classes, by their numbers from 0.")
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two classes of one name.")
    splits = {}
    for name in SPLITS:
        given = found.get(name) or []
        places = [given] if isinstance(given, str) else given
        if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
            raise UserError(f"{path}: {name} is neither a folder nor a list of folders.")
        if images := [image for place in places for image in _yolo_images(path, found, place)]:
            splits[name] = images
    if not splits:
        raise UserError(f"{path} names no images: it needs train and val, the folders that they lie in.")
    if not any(one.labels.is_file() for part in splits.values() for one in part):
        expected = next(iter(splits.values()))[0].labels
        raise UserError(f"no image of {path} has labels; they would be such as {expected}.")
    return names, splits if len(splits) > 1 or "train" not in splits else _divided(splits["train"])


def _yolo_images(path: Path, found: dict[str, Any], given: str) -> list[_Labelled]:
    """Images of a folder, or of a list in a text file, each with its text below labels/ instead of images/."""
    tops = [path.parent / str(found.get("path") or ""), path.parent]
    place = next((top / given for top in tops if (top / given).exists()), None)
    if place is None:  # Roboflow writes ../train/images beside train/
        place = path.parent / given.removeprefix("../")
    if place.is_file():
        images = [place.parent / line.strip() for line in _text(place).splitlines() if line.strip()]
    elif place.is_dir():
        images = [file for file in image_files(place) if file.suffix.lower() in ENDINGS]
    else:
        raise UserError(f"{path} names {given}, which is not there; mend the path.")
    return [_Labelled(image, _yolo_text(image)) for image in images]


def _yolo_text(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _yolo_objects(one: _Labelled, number: dict[str, int], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Lines of a class and a box (centre and sides) or a polygon, all in shares of the image's sides."""
    if not one.labels.is_file():
        return
    width, height = size
    for line, text in enumerate(_text(one.labels).splitlines(), 1):
        cells = text.split()
        if not cells:
            continue
        try:
            number_of, *values = map(float, cells)
            kind = int(number_of) if number_of.is_integer() else -1
        except ValueError as error:
            raise UserError(f"{one.labels}, line {line} is no list of numbers") from error
        if not 0 <= kind < len(number) or not all(-1 <= value <= 2 for value in values):
            raise UserError(f"{one.labels}, line {line} has a class or a place that is none: {text[:60]}")
        if len(values) == 4:
            x, y, w, h = values
            box = _box((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            yield {"category_id": kind + 1, **box}
        elif len(values) >= 6 and len(values) % 2 == 0:
            across, down = [x * width for x in values[::2]], [y * height for y in values[1::2]]
            ring = [place for point in zip(across, down, strict=True) for place in point]
            box = _box(min(across), min(down), max(across), max(down))
            yield {"category_id": kind + 1, **box, "segmentation": [ring]}
        else:
            raise UserError(f"{one.labels}, line {line} has {len(values)} numbers behind the class; a box has 4")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has more than {LARGEST // 10**6} MB, which labels do not.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text; save it as UTF-8.") from error
