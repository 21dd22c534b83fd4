"""Images to quantise with: which to calibrate on, which to measure on, and whether they are what the model knows."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit.backbone import NextViT
from nextvit.data.folders import data_root
from nextvit.data.images import (
    ImageRejected,
    ImageSource,
    as_taken,
    centre,
    fitted,
    image_files,
    nearest,
    read_image,
)
from nextvit.data.masks import IGNORED, MaskSplit
from nextvit.data.objects import ObjectSplit
from nextvit.data.sets import default_eval_split, read_split
from nextvit.data.shards import are_shards
from nextvit.data.split import Split
from nextvit.errors import UserError, first_few
from nextvit.exporters.parity import with_channels
from nextvit.metadata import Metadata
from nextvit.networks import Network, backbone_of
from nextvit.progress import track
from nextvit.tasks.detect import prepared

MASKS = {"masks", "annotations"}  # folders of masks
TEXTS = (".json", ".txt", ".xml", ".csv", ".yaml")
FEWEST = 32  # images that ranges of activations can be taken from
CALIBRATED = 300  # images at most; more hardly change the ranges
TUNED = 3000  # at most, to fine-tune on
MEASURED = 1000  # at most
CALIBRATED_DENSE, MEASURED_DENSE = 100, 200  # the same of dense tasks, where each has many answers
STRANGE = (
    0.35  # standard deviations off: images of one class come to 0.1, other photographs to 0.4, inverted ones to 0.8
)


@dataclass(frozen=True)
class Images:
    """Images that can be read, with their truth where it is known: the index of the class, or of dense tasks the place
    in a split with masks or objects. Decoded anew each time.
    """

    sources: tuple[ImageSource | bytes, ...]
    targets: tuple[int, ...] | None
    metadata: Metadata
    truths: MaskSplit | ObjectSplit | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> np.ndarray:
        """float32 (1, channels, image_size, image_size), or what else a file of this metadata takes.

        For segmentation the centre of the image, which is resized as for evaluation; for detection all of it, of any
        size.
        """
        if self.metadata.task == "detect":
            return with_channels(prepared(read_image(self.sources[index]), self.metadata)[0], self.metadata.in_channels)
        batch = as_taken(read_image(self.sources[index]), self.metadata)[None]
        if self.metadata.task == "segment":
            batch = centre(batch, self.metadata.preprocess.image_size, 0.0)
        return batch if self.metadata.takes_pixels else with_channels(batch, self.metadata.in_channels)

    @property
    def truth(self) -> Any:
        """int (N,), of segmentation uint8 (N, image_size, image_size), of detection Objects; None: it is not known."""
        if self.targets is None:
            return None
        if self.truths is None:
            return np.asarray(self.targets)
        if isinstance(self.truths, ObjectSplit):
            return [self.truths.objects(index) for index in self.targets]
        p, found = self.metadata.preprocess, []
        for index in self.targets:
            image, labels = self.truths.labelled(index)
            size = fitted(np.asarray(image), p.image_size, p.long_side or p.image_size).shape[:2]
            found.append(centre(nearest(labels, size), p.image_size, IGNORED))
        return np.stack(found)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True)
class Calibration:
    """Images to fine-tune on, some of them to take ranges of activations from, others to measure the accuracy on."""

    train: Images
    calibrate: Images
    measure: Images
    notes: tuple[str, ...] = ()  # what is odd about them


def read_calibration(
    source: str | os.PathLike[str] | Sequence[ImageSource], model: Network, metadata: Metadata, *, tune: bool = False
) -> Calibration:
    """Choose the images of a folder, of `demo`, or of a list, evenly spread over them; more of them to fine-tune on.

    A folder with `train/` and `val/` or `test/` is calibrated on the first and measured on the other; of one folder of
    classes every fifth image is measured on; images without known classes are split the same way. Raises UserError
    where fewer than FEWEST can be read, or where all are alike.
    """
    if isinstance(source, str | os.PathLike):
        first, second, notes = _of_folder(os.fspath(source), metadata)
    elif isinstance(source, Sequence):
        first, second = _every_fifth(Images(tuple(source), None, metadata))
        notes = []
    else:
        raise UserError("calibration takes a folder of images, or a list of images.")
    calibrated, measured = (CALIBRATED, MEASURED) if metadata.task == "classify" else (CALIBRATED_DENSE, MEASURED_DENSE)
    train, bad = _readable(_spread(first, TUNED if tune else calibrated), "read calibration images")
    first = _spread(train, calibrated)
    second, more = _readable(_spread(second, measured), "read images to measure on")
    if bad + more:
        notes.append(f"{len(bad) + len(more)} images could not be read and are left out: {(bad + more)[0]}")
    if len(first) < FEWEST or not len(second):
        where = source if isinstance(source, str | os.PathLike) else "the list"
        raise UserError(
            f"{where} has {len(first)} images to calibrate on and {len(second)} to measure on; int8 needs {FEWEST} or "
            f"more to calibrate on, and is better with {calibrated}."
        )
    return Calibration(train, first, second, (*notes, *_oddities(first, model)))


def _of_folder(source: str, metadata: Metadata) -> tuple[Images, Images, list[str]]:
    labels = metadata.labels
    try:
        if not labels:
            raise UserError("the model names no classes")
        task = metadata.task
        pair = [read_split(source, name, labels, task) for name in ("train", default_eval_split(source, task))]
    except UserError as error:
        if are_shards(source):
            raise
        files = Images(tuple(_images_alone(source, metadata)), None, metadata)
        truth = {"classify": "classes", "segment": "masks", "detect": "objects"}[metadata.task]
        note = (
            f"accuracy is taken as agreement with the float model, because the images have no known {truth} ({error})"
        )
        return *_every_fifth(files), [note.rstrip(".")]
    first, second = (_images(split, metadata) for split in pair)
    return first, second, [note for split in pair for note in (*split.notes, *_left_out(split))]


def _left_out(split: Split) -> list[str]:
    wrong = (*split.faults, *(split.misshapen if isinstance(split, ObjectSplit) else ()))
    return [f"{len(wrong)} entries of {split.name} are left out: {first_few(wrong)}"] if wrong else []


def _images_alone(source: str, metadata: Metadata) -> list[Path]:
    """All images of a folder whose truth does not fit: not the masks, nor what tells of objects."""
    root = data_root(source)
    if metadata.task == "segment":
        return [path for path in image_files(root) if not MASKS & set(path.relative_to(root).parts[:-1])]
    return [path for path in image_files(root) if path.suffix.lower() not in TEXTS]


def _images(split: Split, metadata: Metadata) -> Images:
    if isinstance(split, MaskSplit | ObjectSplit):
        return Images(split.files, tuple(range(len(split))), metadata, split)
    if split.places is None:
        return Images(split.files, split.targets, metadata)
    chosen = np.linspace(0, len(split) - 1, min(TUNED, len(split))).astype(int).tolist()
    return Images(tuple(map(split.content, chosen)), tuple(split.targets[i] for i in chosen), metadata)


def _every_fifth(images: Images) -> tuple[Images, Images]:
    indices = range(len(images))
    return _chosen(images, [i for i in indices if i % 5 != 4]), _chosen(images, [i for i in indices if i % 5 == 4])


def _spread(images: Images, most: int) -> Images:
    if len(images) <= most:
        return images
    return _chosen(images, np.linspace(0, len(images) - 1, most).astype(int).tolist())


def _chosen(images: Images, indices: Sequence[int]) -> Images:
    targets = images.targets
    return replace(
        images,
        sources=tuple(images.sources[i] for i in indices),
        targets=None if targets is None else tuple(targets[i] for i in indices),
    )


def _readable(images: Images, label: str) -> tuple[Images, list[str]]:
    good, bad = [], []
    for index, source in enumerate(track(images.sources, total=len(images), label=label)):
        try:
            if images.truths is not None and images.targets is not None:
                images.truths.labelled(images.targets[index])
            else:
                read_image(source)
            good.append(index)
        except ImageRejected as error:
            bad.append(str(error))
    return _chosen(images, good), bad


def _oddities(images: Images, model: Network) -> list[str]:
    """What the images are not: different from each other, or like those that the network was trained on."""
    dense, side = images.metadata.task != "classify", images.metadata.preprocess.image_size
    some = list(_spread(images, 16 if dense else 64))
    sample = np.concatenate([centre(image, side, 0.0) for image in some] if dense else some)
    if sample.std(axis=0).max() < 1e-3:
        raise UserError("all calibration images are the same; give such images as the model will see.")
    backbone = backbone_of(model)
    distance = _distance_from_training(backbone, torch.from_numpy(sample)) if isinstance(backbone, NextViT) else 0.0
    if distance > STRANGE:
        return [
            f"the calibration images are unlike those that the model was trained on (channel means {distance:.2f} "
            "standard deviations off); int8 may be poor on the images that it is meant for"
        ]
    return []


def _distance_from_training(model: NextViT, images: Tensor) -> float:
    """How far the means of channels lie from those that the stem's BatchNorms kept of training, in their deviations."""
    found: list[float] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        off = (inputs[0].mean((0, 2, 3)) - norm.running_mean).abs() / (norm.running_var + norm.eps).sqrt()
        found.append(float(off.mean()))

    norms = [module for module in model.stem.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    training = model.training
    try:
        first = next(model.parameters())
        with torch.inference_mode():
            model.eval().stem(images.to(first))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return max(found, default=0.0)
