"""What differs between tasks in training: a row a task, and one loop for all of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextvit.augmentation import Normalise, sample_transform
from nextvit.data.loader import Transform, batches, eval_transform
from nextvit.data.masks import MaskSplit
from nextvit.data.split import Split
from nextvit.dense_augmentation import PADDED, crop_transform
from nextvit.evaluate import Evaluation, MaskEvaluation, evaluate, evaluate_masks
from nextvit.metadata import Metadata, Preprocess
from nextvit.objective import LabelObjective, Objective, PixelObjective, label_loss
from nextvit.processes import Processes
from nextvit.recipe import Recipe

Forward = Callable[[np.ndarray], np.ndarray]


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
    blank: Callable[[Recipe], Tensor]  # a sample that teaches nothing
    objective: Callable[[Recipe, Split, Normalise, int], Objective]
    validate: Callable[[Forward, Any, Metadata, Loading], Evaluation | MaskEvaluation]


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
}
