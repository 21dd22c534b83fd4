"""The loss of a batch as a task has it: augmented, seen by the network, and compared with labels or a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvit.augmentation import Normalise, draw_mixing, erase, mix, smoothed
from nextvit.data.loader import Batch
from nextvit.data.seeds import generator
from nextvit.data.split import UNLABELLED, Split
from nextvit.dense_augmentation import as_input
from nextvit.recipe import Distillation, Images, Mixing, Recipe
from nextvit.scene_augmentation import as_scenes
from nextvit.teachers import open_teacher

Forward = Callable[..., Any]  # the network, in the precision of the run


class Moment(NamedTuple):
    """Where in a run a batch stands: whatever is drawn for it is a function of these numbers."""

    seed: int
    epoch: int
    step: int
    part: int


Objective = Callable[[Forward, Batch, Moment], Tensor]  # the mean loss of a batch, or of a part of one


# ---- classification --------------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Of the images of a batch; both can be mixed as the images are."""

    labels: Tensor  # (B, classes): probabilities, times the weight that the labels have in the image's loss
    teacher: Tensor  # (B,): the weight that the teacher has


@dataclass(frozen=True)
class LabelLoss:
    """Cross entropy with the labels, and with a teacher's answers where there is one."""

    classes: int
    label_smoothing: float
    class_weights: Tensor | None  # (classes,)
    distillation: Distillation
    teacher: Callable[[Tensor], Tensor] | None  # (B, 3, H, W) -> (B, classes) logits

    def targets(self, indices: Tensor) -> Targets:
        """Of class indices (B,); UNLABELLED is an image that the teacher alone judges."""
        share = self.distillation.share if self.teacher is not None else 0.0
        labelled = (indices != UNLABELLED).float()
        labels = smoothed(indices.clamp(min=0), self.classes, self.label_smoothing)
        teacher = 1 - labelled if self.teacher is None else 1 - labelled * (1 - share)
        return Targets(labels * (labelled * (1 - share))[:, None], teacher)

    def loss(self, logits: Tensor, images: Tensor, targets: Targets) -> Tensor:
        """The mean over the batch."""
        per_image = F.cross_entropy(logits, targets.labels, weight=self.class_weights, reduction="none")
        if self.teacher is not None:
            d = self.distillation
            with torch.no_grad():
                answers = self.teacher(images).float()
            if d.hard:
                taught = F.cross_entropy(logits, answers.argmax(1), reduction="none")
            else:  # Hinton et al. 2015; the square keeps the gradient's size
                soft = F.softmax(answers / d.temperature, dim=1)
                taught = d.temperature**2 * F.cross_entropy(logits / d.temperature, soft, reduction="none")
            per_image = per_image + targets.teacher * taught
        return per_image.mean()


def label_loss(recipe: Recipe, training: Split, device: torch.device) -> LabelLoss:
    """That of a recipe on these images; UserError for a teacher of other classes."""
    d = recipe.distillation
    weights = class_weights(training).to(device) if recipe.class_weights else None
    teacher = None if d.teacher is None else open_teacher(d.teacher, training.labels, device)
    return LabelLoss(len(training.labels), recipe.label_smoothing, weights, d, teacher)


def class_weights(training: Split) -> Tensor:
    """The inverse of each class's share, such that the mean over the images is 1; 0 for a class without images."""
    targets = torch.tensor(training.targets)
    counts = torch.bincount(targets[targets != UNLABELLED], minlength=len(training.labels)).float()
    inverse = torch.where(counts > 0, 1 / counts, 0.0)
    return inverse * counts.sum() / (counts > 0).sum()


@dataclass(frozen=True)
class LabelObjective:
    """Of a classifier: images are normalised, erased and mixed, targets smoothed and mixed alike."""

    images: Images
    mixing: Mixing
    loss: LabelLoss
    normalise: Normalise
    processes: int  # that share a batch

    def __call__(self, forward: Forward, batch: Batch, moment: Moment) -> Tensor:
        images = self.normalise(batch.images)
        if self.images.erasing:
            erase(images, batch.indices, self.images.erasing, moment[:3])
        targets = self.loss.targets(batch.targets.to(self.normalise.device, non_blocking=True))
        if self.mixing.mixup or self.mixing.cutmix:
            targets = self._mixed(images, targets, moment)
        return self.loss.loss(forward(images).float(), images, targets)

    def _mixed(self, images: Tensor, targets: Targets, moment: Moment) -> Targets:
        """Images in place; a draw for every `mixing.images` of the whole batch, the same on every process."""
        size = self.mixing.images
        here = len(images) if size is None else max(2, size // self.processes)
        mixed = []
        for group, start in enumerate(range(0, len(images), here)):
            rows = slice(start, start + here)
            draw = draw_mixing(self.mixing, generator(*moment, group), *images.shape[2:])
            mixed.append(mix(images[rows], draw, *(t[rows] for t in targets)))
        return Targets(*(torch.cat(column) for column in zip(*mixed, strict=True)))


# ---- segmentation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelObjective:
    """Of a segmenter, which knows its losses itself."""

    normalise: Normalise

    def __call__(self, forward: Forward, batch: Batch, moment: Moment) -> Tensor:
        losses: dict[str, Tensor] = forward(*as_input(batch.images, self.normalise))
        return torch.stack([*losses.values()]).sum()


# ---- detection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectObjective:
    """Of a detector, which knows its losses itself."""

    normalise: Normalise

    def __call__(self, forward: Forward, batch: Batch, moment: Moment) -> Tensor:
        losses: dict[str, Tensor] = forward(*as_scenes(batch.images, self.normalise))
        return torch.stack([*losses.values()]).sum()
