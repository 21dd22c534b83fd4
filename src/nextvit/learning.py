"""What differs between tasks in training: a row a task, and one loop for all of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nextvit.augmentation import Normalise, sample_transform
from nextvit.data.loader import Transform, batches, eval_transform
from nextvit.data.masks import MaskSplit
from nextvit.data.objects import ObjectSplit
from nextvit.data.split import Split
from nextvit.dense_augmentation import PADDED, crop_transform
from nextvit.errors import UserError
from nextvit.evaluate import (
    AnyEvaluation,
    Evaluation,
    MaskEvaluation,
    ObjectEvaluation,
    evaluate,
    evaluate_masks,
    evaluate_objects,
)
from nextvit.metadata import Metadata, Preprocess
from nextvit.objective import LabelObjective, Objective, ObjectObjective, PixelObjective, label_loss
from nextvit.processes import Processes
from nextvit.recipe import Recipe
from nextvit.scene_augmentation import blank, scene_transform

Forward = Callable[[np.ndarray], Any]
LEAST_IMAGE = 32  # pixels a side, of detection


@dataclass(frozen=True)
class Loading:
    """How images are read while a run validates."""

    batch_size: int  # on this process
    workers: int
    processes: Processes


@dataclass(frozen=True)
class Learning:
    """A task, to the loop."""

    prepared: Callable[[Recipe, Preprocess], Preprocess]  # as the network that comes out is evaluated
    transform: Callable[[Recipe, Preprocess], Transform]  # of a training sample, to uint8
    blank: Callable[[Recipe], Any]  # a sample that teaches nothing
    objective: Callable[[Recipe, Split, Normalise, int], Objective]
    validate: Callable[[Forward, Any, Metadata, Loading], AnyEvaluation]
    chosen: Callable[[Recipe, Any], Split] = lambda recipe, training: training  # the images that a run learns from


# ---- classification --------------------------------------------------------------------------------------------------


def _classifier_prepared(recipe: Recipe, p: Preprocess) -> Preprocess:
    r = recipe.images
    return replace(p, image_size=r.size, crop=r.crop, interpolation=r.interpolation)


def _label_objective(recipe: Recipe, training: Split, normalise: Normalise, processes: int) -> Objective:
    loss = label_loss(recipe, training, normalise.device)
    return LabelObjective(recipe.images, recipe.mixing, loss, normalise, processes)


def _validate_labels(forward: Forward, split: Split, metadata: Metadata, how: Loading) -> Evaluation:
    mine = np.arange(how.processes.rank, len(split), how.processes.count)
    source = batches(split, eval_transform(metadata), batch_size=how.batch_size, order=mine, workers=how.workers)
    total = -(-len(mine) // how.batch_size)
    return evaluate(forward, source, split, total=total, label="validate", processes=how.processes)


# ---- segmentation ----------------------------------------------------------------------------------------------------


def _segmenter_prepared(recipe: Recipe, p: Preprocess) -> Preprocess:
    r = recipe.crops
    return replace(p, image_size=r.short_side, long_side=r.long_side)


def _validate_masks(forward: Forward, split: MaskSplit, metadata: Metadata, how: Loading) -> MaskEvaluation:
    return evaluate_masks(forward, split, metadata, label="validate", processes=how.processes)


# ---- detection -------------------------------------------------------------------------------------------------------


def _detector_prepared(recipe: Recipe, p: Preprocess) -> Preprocess:
    return replace(p, image_size=max(recipe.scenes.short_sides), long_side=recipe.scenes.long_side)


def _with_objects(recipe: Recipe, training: ObjectSplit) -> ObjectSplit:
    """As the authors chose: images with an object, both sides at least LEAST_IMAGE pixels."""
    fit = np.array([min(size) >= LEAST_IMAGE for size in training.sizes])
    if not recipe.scenes.negatives:
        fit &= training.objects_of > 0
    if not fit.any():
        raise UserError(f"no image of {training.folder} has an object and {LEAST_IMAGE} pixels a side to learn from.")
    return training if fit.all() else training.only(np.flatnonzero(fit).tolist())


def _validate_objects(forward: Forward, split: ObjectSplit, metadata: Metadata, how: Loading) -> ObjectEvaluation:
    return evaluate_objects(forward, split, metadata, label="validate", processes=how.processes)


LEARNING = {
    "classify": Learning(
        prepared=_classifier_prepared,
        transform=lambda recipe, p: sample_transform(recipe.images, p),
        blank=lambda recipe: torch.zeros(recipe.side, recipe.side, 3, dtype=torch.uint8),
        objective=_label_objective,
        validate=_validate_labels,
    ),
    "segment": Learning(
        prepared=_segmenter_prepared,
        transform=lambda recipe, p: crop_transform(recipe.crops),
        blank=lambda recipe: torch.full((recipe.side, recipe.side, 4), PADDED, dtype=torch.uint8),
        objective=lambda recipe, training, normalise, processes: PixelObjective(normalise),
        validate=_validate_masks,
    ),
    "detect": Learning(
        prepared=_detector_prepared,
        transform=lambda recipe, p: scene_transform(recipe.scenes),
        blank=lambda recipe: blank(recipe.scenes),
        objective=lambda recipe, training, normalise, processes: ObjectObjective(normalise),
        validate=_validate_objects,
        chosen=_with_objects,
    ),
}
