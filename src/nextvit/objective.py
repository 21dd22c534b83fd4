"""What a batch of a classifier is measured against: labels, smoothed and mixed, and a teacher's answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvit.augmentation import smoothed
from nextvit.data.split import UNLABELLED, Split
from nextvit.recipe import Distillation, Recipe
from nextvit.teachers import open_teacher


class Targets(NamedTuple):
    """Of the images of a batch; both can be mixed as the images are."""

    labels: Tensor  # (B, classes): probabilities, times the weight that the labels have in the image's loss
    teacher: Tensor  # (B,): the weight that the teacher has


@dataclass(frozen=True)
class Objective:
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


def objective(recipe: Recipe, training: Split, device: torch.device) -> Objective:
    """That of a recipe on these images; UserError for a teacher of other classes."""
    d = recipe.distillation
    weights = class_weights(training).to(device) if recipe.class_weights else None
    teacher = None if d.teacher is None else open_teacher(d.teacher, training.labels, device)
    return Objective(len(training.labels), recipe.label_smoothing, weights, d, teacher)


def class_weights(training: Split) -> Tensor:
    """The inverse of each class's share, such that the mean over the images is 1; 0 for a class without images."""
    targets = torch.tensor(training.targets)
    counts = torch.bincount(targets[targets != UNLABELLED], minlength=len(training.labels)).float()
    inverse = torch.where(counts > 0, 1 / counts, 0.0)
    return inverse * counts.sum() / (counts > 0).sum()
