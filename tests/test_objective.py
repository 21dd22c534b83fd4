"""Labels, class weights and a teacher, against what they are written out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextvit.augmentation import smoothed
from nextvit.create import create_model
from nextvit.data.sets import read_split
from nextvit.data.split import UNLABELLED, with_unlabelled
from nextvit.errors import UserError
from nextvit.objective import LabelLoss, class_weights, label_loss
from nextvit.recipe import Distillation, parse_recipe, read_recipe
from nextvit.run import Machine
from nextvit.teachers import open_teacher
from nextvit.train import train
from nextvit.weights import read_weights, save_weights
from tests.conftest import fill

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
ANSWERS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
INDICES = torch.tensor([0, 3, 1, 1, 2, 0])


def loss(indices: Tensor, **how) -> Tensor:
    how = {"label_smoothing": 0.0, "class_weights": None, "distillation": Distillation(), "teacher": None} | how
    own = LabelLoss(4, **how)
    return own.loss(LOGITS, torch.zeros(6, 3, 8, 8), own.targets(indices))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_teacher_it_is_cross_entropy(smoothing):
    torch.testing.assert_close(
        loss(INDICES, label_smoothing=smoothing), F.cross_entropy(LOGITS, INDICES, label_smoothing=smoothing)
    )


def test_class_weights_count_an_image_by_its_class():
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0])
    each = F.cross_entropy(LOGITS, INDICES, reduction="none")
    torch.testing.assert_close(loss(INDICES, class_weights=weights), (each * weights[INDICES]).mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_s_probabilities_are_distilled(temperature):
    """Up to the teacher's own entropy it is the divergence of Hinton et al., times the square of the temperature."""
    how = Distillation(teacher="x", share=0.7, temperature=temperature)
    found = loss(INDICES, distillation=how, teacher=lambda images: ANSWERS)
    student = F.log_softmax(LOGITS / temperature, 1)
    teacher = F.log_softmax(ANSWERS / temperature, 1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    entropy = -(teacher.exp() * teacher).sum(1).mean()
    taught = temperature**2 * (divergence + entropy)
    torch.testing.assert_close(found, 0.3 * F.cross_entropy(LOGITS, INDICES) + 0.7 * taught)


def test_a_hard_teacher_gives_labels_and_images_without_labels_have_it_alone():
    unlabelled = INDICES.clone()
    unlabelled[2:] = UNLABELLED
    how = Distillation(teacher="x", share=0.5, hard=True)
    found = loss(unlabelled, distillation=how, teacher=lambda images: ANSWERS)
    taught = F.cross_entropy(LOGITS, ANSWERS.argmax(1), reduction="none")
    labelled = F.cross_entropy(LOGITS, INDICES, reduction="none")
    expected = torch.cat([0.5 * labelled[:2] + 0.5 * taught[:2], taught[2:]]).mean()
    torch.testing.assert_close(found, expected)


def test_smoothed_labels_are_probabilities():
    found = smoothed(INDICES, 4, 0.2)
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    assert float(found[0, 0]) == pytest.approx(0.85)


def test_rare_classes_weigh_more_and_the_mean_is_one(garment_folder):
    split = read_split(garment_folder, "train")
    split = with_unlabelled(split, garment_folder / "bag")
    weights = class_weights(split)
    targets = torch.tensor([t for t in split.targets if t != UNLABELLED])
    assert float(weights[targets].mean()) == pytest.approx(1)
    assert torch.allclose(weights, weights[0]), "the classes are of one size here"


def test_a_student_learns_from_a_teacher_without_any_label_of_its_own(garment_folder, tmp_path):
    """A teacher of other classes in another order; its answers alone move the student."""
    teacher = fill(create_model("nextvit_nano", num_classes=4))
    metadata = teacher.metadata.__class__(
        "nextvit_nano",
        num_classes=4,
        labels=("sandal", "trouser", "boat", "bag"),
        preprocess=teacher.metadata.preprocess,
    )
    save_weights(tmp_path / "teacher.safetensors", teacher.state_dict(), metadata)
    settings = [
        "images.size=32",
        "schedule.epochs=1",
        "batch_size=8",
        f"distillation.teacher={tmp_path}/teacher.safetensors",
    ]
    recipe = read_recipe("default", [*settings, f"distillation.unlabelled={garment_folder}", "distillation.share=1"])
    train(garment_folder, recipe, tmp_path / "run", machine=Machine(threads=1, workers=0))
    assert read_weights(tmp_path / "run" / "last.ckpt").state["images"] == 48 + 60 - (48 + 60) % 8
    made = label_loss(recipe, read_split(garment_folder, "train"), torch.device("cpu"))
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(made.teacher(image), teacher(image)[:, [3, 0, 1]])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation.unlabelled=x"], "need distillation.teacher"),
        (["distillation.share=2"], "distillation.share"),
        (["images.randaugment=autoaugment"], "images.randaugment"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        parse_recipe("", "test", overrides)


def test_a_teacher_that_does_not_know_a_class_is_refused(tmp_path):
    model = create_model("nextvit_nano", num_classes=1)
    metadata = replace(model.metadata, labels=("bag",))
    save_weights(tmp_path / "teacher.safetensors", model.state_dict(), metadata)
    with pytest.raises(UserError, match="does not know the class 'boat'"):
        open_teacher(str(tmp_path / "teacher.safetensors"), ["bag", "boat"], torch.device("cpu"))
    with pytest.raises(UserError, match="cannot be had from timm"):
        open_teacher("timm:no_such_network", ["bag"], torch.device("cpu"))
