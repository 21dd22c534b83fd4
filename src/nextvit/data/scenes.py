"""Scenes for segmentation and detection: shipped garments laid over shipped photographs, with exact masks and boxes.

They are written as ADE20K and COCO are, so that the readers of the real sets read these too.
"""

import json
import os
import shutil
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextvit import __version__
from nextvit.data.demo_images import garments, made_once
from nextvit.data.rle import rle
from nextvit.progress import track

SPLITS = ("train", "val")
GROUPS = {  # ten fine classes are more than minutes of training can tell apart
    "top": ("t-shirt", "pullover", "coat", "shirt"),
    "trousers": ("trouser",),
    "dress": ("dress",),
    "footwear": ("sandal", "sneaker", "ankle-boot"),
    "bag": ("bag",),
}
SEED = 2022
SIZE = 192  # pixels, height and width; leaves room for objects that COCO calls large (above 96 x 96)
MOST = 4  # garments in a scene
SCALE = (2.0, 5.5)  # of a garment's photograph, which has 28 x 28 pixels
GROUND = 10  # of 255: a garment's photograph is black around it, up to this
DARKEST = 40  # of 255: black garments are lightened to this, else they would not show on a dark photograph
OVERLAP = 0.12  # the share of a garment that others may cover
LEAST = 64  # pixels of a garment that stay visible
TRIES = 30  # places tried for a garment before it is left out
QUALITY = 95  # of the JPEG files; both real sets are JPEG


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and its N objects, in the order in which they were laid down."""

    image: np.ndarray  # uint8 (H, W, 3)
    masks: np.ndarray  # bool (N, H, W): what stays visible of each; no two share a pixel
    labels: tuple[int, ...]  # N places in GROUPS

    @property
    def boxes(self) -> np.ndarray:
        """int64 (N, 4): x, y, width and height in pixels of the smallest box around each mask."""
        boxes = np.zeros((len(self.masks), 4), np.int64)
        for box, mask in zip(boxes, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box[:] = columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
        return boxes


# ---- one scene -------------------------------------------------------------------------------------------------------


def compose(split: str, index: int) -> Scene:
    """Scene `index` of `split` ("train" or "val"), the same every time and everywhere."""
    rng = np.random.default_rng((SEED, SPLITS.index(split), index))
    canvas = _background(split, rng)
    masks: list[np.ndarray] = []
    areas: list[int] = []  # before anything was laid over it
    labels: list[int] = []
    for _ in range(rng.integers(1, MOST, endpoint=True)):
        label = int(rng.integers(len(GROUPS)))
        names = tuple(GROUPS.values())[label]
        name = names[rng.integers(len(names))]
        tile = int(rng.integers(len(garments(split)[name])))
        mirrored, tint = bool(rng.random() < 0.5), _tint(rng)
        for _ in range(TRIES):
            light, cover = _enlarged(split, name, tile, rng.uniform(*SCALE))
            if mirrored:
                light, cover = light[:, ::-1], cover[:, ::-1]
            height, width = cover.shape
            y, x = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
            mask = np.zeros((SIZE, SIZE), bool)
            mask[y : y + height, x : x + width] = cover >= 0.5
            if _fits(mask, masks, areas):
                place = canvas[y : y + height, x : x + width]
                place += cover[..., None] * (light[..., None] * tint - place)
                masks = [below & ~mask for below in masks] + [mask]
                areas.append(int(mask.sum()))
                labels.append(label)
                break
    image = canvas.round().clip(0, 255).astype(np.uint8)
    return Scene(image, np.array(masks, bool).reshape(-1, SIZE, SIZE), tuple(labels))


def _fits(mask: np.ndarray, masks: list[np.ndarray], areas: list[int]) -> bool:
    """Whether a garment may be laid here: it hides little of the others, and little of it lies on them."""
    kept = [int((below & ~mask).sum()) for below in masks]
    covers = sum(int(below.sum()) for below in masks) - sum(kept)
    area = int(mask.sum())
    return (
        area >= LEAST
        and covers <= OVERLAP * area
        and all(k >= max(LEAST, (1 - OVERLAP) * whole) for k, whole in zip(kept, areas, strict=True))
    )


def _background(split: str, rng: np.random.Generator) -> np.ndarray:
    """float32 (SIZE, SIZE, 3) in 0..255: a random crop of a photograph; those of train are few, so they are varied."""
    photographs = _photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    gain = np.ones(3)
    if split == "train":
        photograph = np.rot90(photograph, int(rng.integers(4)))[..., rng.permutation(3)]
        gain = rng.uniform(0.6, 1.4, 3)
    y, x = (rng.integers(side - SIZE + 1) for side in photograph.shape[:2])
    return (photograph[y : y + SIZE, x : x + SIZE] * gain).clip(0, 255).astype(np.float32)


def _tint(rng: np.random.Generator) -> np.ndarray:
    """float32 (3,): a colour, of which the strongest channel is 1."""
    tint = rng.uniform(0.3, 1, 3)
    return (tint / tint.max()).astype(np.float32)


def _enlarged(split: str, name: str, tile: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A garment's lightness in 0..255, and how far it covers what is below in 0..1, soft at edges; float32 (h, w)."""
    grey, mask = _cut_out(split, name, tile)
    size = round(mask.shape[1] * scale), round(mask.shape[0] * scale)
    weight, light = (
        np.asarray(Image.fromarray(values.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC), np.float32)
        for values in (mask * 255, mask * grey)
    )
    own = (255 * light / np.maximum(weight, 1)).clip(0, 255)  # else the black ground would show as a dark rim
    cover = ((weight / 255 - 0.5) * 2 + 0.5).clip(0, 1)  # enlarging alone leaves edges several pixels wide
    return DARKEST + own * ((255 - DARKEST) / 255), cover


@lru_cache(4096)
def _cut_out(split: str, name: str, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """A garment's grey values, uint8, and its mask, bool, both (h, w) with a pixel of ground around it."""
    grey = np.pad(np.asarray(garments(split)[name][tile]), 1)
    corner = np.zeros(grey.shape, bool)
    corner[0, 0] = True
    rest = ~_joined(corner, grey <= GROUND)  # what the outer ground does not reach: the garment, holes filled
    mask = np.zeros(grey.shape, bool)
    while rest.any():
        first = np.zeros(grey.size, bool)
        first[rest.argmax()] = True
        part = _joined(first.reshape(grey.shape), rest)
        mask = max(mask, part, key=np.sum)
        rest = rest & ~part
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    crop = np.s_[rows[0] - 1 : rows[-1] + 2, columns[0] - 1 : columns[-1] + 2]
    return grey[crop], mask[crop]


def _joined(seed: np.ndarray, within: np.ndarray) -> np.ndarray:
    """What of `within` can be reached from `seed` by steps up, down, left and right; all are bool (H, W)."""
    found = seed & within
    while True:
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        grown &= within
        if np.array_equal(grown, found):
            return found
        found = grown


@cache
def _photographs(split: str) -> list[np.ndarray]:
    """The background photographs of `split`, by name: uint8 (H, W, 3) each."""
    found = []
    folder = resources.files("nextvit.data") / "demo" / "backgrounds" / split
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        with path.open("rb") as file, Image.open(file) as image:
            found.append(np.asarray(image.convert("RGB")))
    return found


# ---- the set on disk -------------------------------------------------------------------------------------------------


def scenes_folder(train: int = 800, val: int = 200) -> Path:
    """The first `train` and `val` scenes, as `ade20k/` and `coco/`; written at first use."""
    return made_once(f"scenes-{train}-{val}", lambda folder: _write(folder, {"train": train, "val": val}))


def _write(folder: Path, counts: dict[str, int]) -> None:
    """ADE20K's folders with `objectInfo.txt`, and COCO's; the images are the same files in both.

    Image and annotation ids start at 1 and run on from train to val, as no two images of COCO share an id.
    """
    image_ids, annotation_ids = count(1), count(1)
    coco: dict[str, dict[str, list]] = {split: {"images": [], "annotations": []} for split in SPLITS}
    pixels = np.zeros((len(SPLITS), len(GROUPS) + 2), np.int64)  # of each label in all annotation maps of a split
    images_with = np.zeros_like(pixels)
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    for split, index in track(jobs, total=len(jobs), label="composing scenes", unit="scenes"):
        scene, image_id = compose(split, index), next(image_ids)
        part, name = "training" if split == "train" else "validation", f"ADE_{split}_{index + 1:08}"
        photograph = folder / "ade20k" / "images" / part / f"{name}.jpg"
        labels = annotation_map(scene)
        _save(scene.image, photograph)
        _save(labels, folder / "ade20k" / "annotations" / part / f"{name}.png")
        here = np.bincount(labels.ravel(), minlength=pixels.shape[1])
        pixels[SPLITS.index(split)] += here
        images_with[SPLITS.index(split)] += here > 0

        file_name = f"{image_id:012}.jpg"
        _link(photograph, folder / "coco" / f"{split}2017" / file_name)
        coco[split]["images"].append({"id": image_id, "file_name": file_name, "height": SIZE, "width": SIZE})
        coco[split]["annotations"] += [
            {"id": next(annotation_ids), "image_id": image_id} | annotation for annotation in coco_annotations(scene)
        ]

    rows = ["Idx\tRatio\tTrain\tVal\tName"]
    for i, name in enumerate(("background", *GROUPS), 1):
        rows.append(f"{i}\t{pixels[:, i].sum() / pixels.sum():.4f}\t{images_with[0, i]}\t{images_with[1, i]}\t{name}")
    (folder / "ade20k" / "objectInfo.txt").write_text("\n".join(rows) + "\n", "utf-8")
    info = {"description": "garments over photographs, as nextvit composes them", "version": __version__}
    categories = [{"id": i, "name": name, "supercategory": "garment"} for i, name in enumerate(GROUPS, 1)]
    (folder / "coco" / "annotations").mkdir()
    for split, lists in coco.items():
        whole = {"info": info, "licenses": [], **lists, "categories": categories}
        (folder / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(whole), "utf-8")


def annotation_map(scene: Scene) -> np.ndarray:
    """ADE20K's annotation, uint8 (H, W): 1 background, from 2 on the groups; 0, which means unlabelled, is not used."""
    labels = np.asarray(scene.labels, np.uint8)
    return 1 + ((labels + 1)[:, None, None] * scene.masks).sum(0).astype(np.uint8)  # the masks share no pixel


def coco_annotations(scene: Scene) -> list[dict[str, Any]]:
    """COCO's annotations, less the ids: category from 1, mask, area in pixels, box as x, y, width and height."""
    return [
        {"category_id": label + 1, "segmentation": rle(mask), "area": int(mask.sum()), "bbox": box, "iscrowd": 0}
        for label, mask, box in zip(scene.labels, scene.masks, scene.boxes.tolist(), strict=True)
    ]


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=QUALITY)  # PNG has no quality and ignores it


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)
