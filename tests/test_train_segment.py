"""Training for segmentation: the authors' schedules and groups, the loop's promises, masks that do not fit."""

import csv
import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from nextvit import class_names
from nextvit.augmentation import Normalise
from nextvit.create import create_model
from nextvit.data.check import check
from nextvit.data.loader import Batch, batches
from nextvit.data.masks import IGNORED, mask_split
from nextvit.data.sets import read_splits, task_of
from nextvit.dense_augmentation import PADDED, as_input, crop_transform
from nextvit.errors import UserError
from nextvit.metadata import DENSE
from nextvit.objective import Moment, PixelObjective
from nextvit.optimization import insist_on_blocks, learning_rate, parameter_groups
from nextvit.recipe import Crops, parse_recipe, read_recipe, with_image_size
from nextvit.run import Machine
from nextvit.train import train
from nextvit.weights import read_weights, save_weights
from tests.conftest import fill, nextvit_here

SMALL = ["model=nextvit_nano", "weights=none", "batch_size=4", "crops.size=32", "crops.short_side=48",
         "crops.long_side=192", "schedule.epochs=2", "schedule.steps_per_epoch=3"]  # fmt: skip
MACHINE = Machine(threads=1, workers=0, deterministic=True)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "images"), [("fpn_80k", 40_000, 32), ("fpn_80k_paper", 80_000, 16), ("upernet_160k", 160_000, 16)]
)
def test_recipes_take_as_many_steps_of_as_many_images_as_the_authors(name, steps, images):
    recipe = read_recipe(name)
    assert recipe.schedule.epochs * recipe.schedule.steps_per_epoch == steps
    assert recipe.batch_size == images
    assert (recipe.sync_batchnorm, recipe.optimizer.clip_norm, recipe.drop_path) == (True, None, None)
    assert recipe.crops == Crops(512, 512, 2048, (0.5, 2.0), 0.75, 10, 0.5, True)
    rate = np.array(
        [learning_rate(i / recipe.schedule.steps_per_epoch, recipe.schedule.epochs, recipe) for i in range(steps)]
    )
    i = np.arange(steps)
    if name == "upernet_160k":  # reference: power 1, to 0, times 1 - (1 - i / 1500) (1 - 1e-6) at first
        expected = 6e-5 * (1 - i / steps) * np.where(i < 1500, 1 - (1 - i / 1500) * (1 - 1e-6), 1)
    else:
        expected = (1e-4 - 1e-6) * (1 - i / steps) ** 0.9 + 1e-6
    np.testing.assert_allclose(rate, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["fpn_80k", "upernet_160k"])
def test_weights_decay_as_the_authors_had_it(name):
    recipe = read_recipe(name)
    model = create_model("nextvit_nano", task="segment", head=recipe.head)
    groups = parameter_groups(model, recipe.optimizer)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == dict(model.named_parameters()).keys()
    assert {group["scale"] for group in groups} == {1.0}
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    of_norms = {
        f"{key}.{part}" for key, m in model.named_modules() if isinstance(m, norms) for part in ("weight", "bias")
    }
    spared = {key for key, value in decay.items() if value == 0}
    assert spared == (of_norms if name == "upernet_160k" else set())
    assert {value for key, value in decay.items() if key not in spared} == {0.01 if name == "upernet_160k" else 1e-4}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: segment\nmixing: {mixup: 0.8}", "mixing is not for the task segment"),
        ("task: segment\nlabel_smoothing: 0.2", "label_smoothing is not for the task segment"),
        ("crops: {size: 64}", "crops is not for the task classify"),
        ("head: fpn", "head is not for the task classify"),
        ("task: segment\ncrops: {scale: [2, 0.5]}", "the scale goes from the smaller to the larger number"),
        ("task: segment\nhead: mask_rcnn", "head mask_rcnn is not for the task segment; it has fpn and upernet"),
        ("task: paint", "task = 'paint' will not do"),
    ],
)
def test_what_a_task_does_not_read_is_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_recipe(text, "mine.yaml")


def test_an_image_size_keeps_the_proportions_of_the_crops():
    recipe = with_image_size(read_recipe("fpn_80k"), 128)
    assert (recipe.crops.size, recipe.crops.short_side, recipe.crops.long_side) == (128, 128, 512)


def test_blocks_of_another_backbone_cannot_be_asked_for():
    model = create_model("timm:resnet18", task="segment")
    with pytest.raises(UserError, match="go by Next-ViT's blocks"):
        insist_on_blocks(model, read_recipe("fpn_80k", ["optimizer.frozen_stages=1"]).optimizer)
    insist_on_blocks(model, read_recipe("fpn_80k").optimizer)


# ---- a batch and its loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_a_batch_costs_the_sum_of_the_losses_over_all_pixels_and_every_parameter_learns(head):
    model = fill(create_model("nextvit_nano", task="segment", head=head, num_classes=5)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    rng = np.random.default_rng(0)
    samples = torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 4), np.uint8))
    samples[..., 3] = torch.from_numpy(np.kron(rng.integers(0, 5, (2, 8, 8)), np.ones((8, 8), int)).astype(np.uint8))
    samples[:, :8, :, 3] = IGNORED
    samples[1, :, 48:] = PADDED
    batch = Batch(samples, torch.tensor([-1, -1]), torch.tensor([0, 1]), ())
    loss = PixelObjective(Normalise(DENSE["segment"], torch.device("cpu")))(model, batch, Moment(0, 0, 0, 0))
    loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    images, labels = as_input(samples, Normalise(DENSE["segment"], torch.device("cpu")))
    with torch.no_grad():
        maps = model.backbone(images)
        outputs = [(1.0, model.decode_head(model.neck(maps)))]
        if head == "upernet":
            outputs.append((0.4, model.auxiliary_head(maps[2])))
    expected = 0.0
    for weight, logits in outputs:  # written out: mmseg divides by all pixels
        large = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False).double().log_softmax(1)
        known = labels != IGNORED
        chosen = large.gather(1, labels.clamp(max=4)[:, None])[:, 0]
        expected += weight * float(-(chosen * known).sum() / labels.numel())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_of_so_many_steps_goes_through_the_images_in_whole_passes(street):
    """And an image that comes twice in an epoch is drawn anew."""
    split = mask_split(street, "train")
    transform = crop_transform(Crops(32, 48, 192))
    numbers = np.concatenate([k * len(split) + split.order(0, k) for k in range(3)])
    seen = [
        (int(b.indices[0]), b.images.numpy().tobytes()) for b in batches(split, transform, order=numbers, seed=(0,))
    ]
    assert Counter(index for index, _ in seen) == dict.fromkeys(range(len(split)), 3)
    assert len({pixels for _, pixels in seen}) == len(seen)


# ---- a folder in ADE20K's layout -------------------------------------------------------------------------------------


def write_street(root: Path, count: int, value) -> None:
    """Images whose halves differ, in ADE20K's layout; value: index -> the two values of its mask."""
    for part, number in (("training", count), ("validation", 3)):
        for index in range(number):
            a, b = value(index)
            mask = np.full((50, 70), a, np.uint8)
            mask[:, 35:] = b
            mask[:3] = 0  # nothing
            pixels = np.random.default_rng(index).integers(0, 255, (5, 7, 3), np.uint8)
            for folder, array, ending in (("images", np.kron(pixels, np.ones((10, 10, 1), np.uint8)), "jpg"),
                                          ("annotations", mask, "png")):  # fmt: skip
                path = root / folder / part / f"ADE_{part}_{index:08}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """The layout and the 150 classes of ADE20K, every class in some image: 0 is nothing, 150 the last class."""
    root = tmp_path_factory.mktemp("ade") / "ADEChallengeData2016"
    write_street(root, 10, lambda index: (1 + index, 150 - index))
    return root


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run_folder(street, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "street"
    train(street, read_recipe("finetune_segment", SMALL), folder, machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    return folder


def test_a_run_on_ade20k_s_layout_is_whole(run_folder):
    rows = metrics(run_folder)
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "val_miou", "val_accuracy", "images"]
    assert [row["images"] for row in rows] == ["12", "24"]
    metadata = read_weights(run_folder / "model.safetensors").metadata
    assert (metadata.task, metadata.head, metadata.labels) == ("segment", "fpn", class_names.ade20k())
    assert (metadata.preprocess.image_size, metadata.preprocess.long_side) == (48, 192)


def test_eval_of_the_run_gives_what_training_saw(run_folder, street):
    done = nextvit_here("eval", run_folder / "model.safetensors", street, "--json")
    assert done.returncode == 0, done.stderr
    best = max(float(row["val_miou"]) for row in metrics(run_folder))
    assert json.loads(done.stdout)["miou"] == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stop_after_any_step_resumes_to_the_same_run(step, run_folder, street, tmp_path, monkeypatch):
    from nextvit import train as module

    honest, calls = module.train_step, []

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return honest(*arguments)

    recipe = read_recipe("finetune_segment", SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", signalling)
        with pytest.raises(module.Interrupted):
            train(street, recipe, tmp_path / "run", machine=MACHINE)
    train(street, recipe, tmp_path / "run", resume=True, machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    assert metrics(tmp_path / "run") == metrics(run_folder)
    ours, theirs = (read_weights(f / "last.ckpt").tensors for f in (tmp_path / "run", run_folder))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(
    ("model", "head"), [("nextvit_nano", "upernet"), pytest.param("timm:resnet18", "fpn", marks=pytest.mark.slow)]
)
def test_other_heads_and_backbones_train(model, head, street, tmp_path):
    recipe = read_recipe("finetune_segment", [*SMALL, f"model={model}", f"head={head}", "schedule.epochs=1", "ema=0.9"])
    result = train(street, recipe, tmp_path / "run", machine=Machine(threads=1, workers=1))
    assert result.metrics.pixels > 0
    assert "ema_miou" in metrics(tmp_path / "run")[0]


def test_from_a_classifier_neck_and_head_are_new_and_the_rest_is_kept(street, tmp_path):
    classifier = fill(create_model("nextvit_nano", num_classes=4))
    save_weights(tmp_path / "c.safetensors", classifier.state_dict(), replace(classifier.metadata, num_classes=4))
    slow = [*SMALL, f"weights={tmp_path / 'c.safetensors'}", "model=null", "schedule.epochs=1", "optimizer.lr=1e-9",
            "schedule.min_lr=0", "schedule.warmup_lr=0"]  # fmt: skip
    train(street, read_recipe("finetune_segment", slow), tmp_path / "run", machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    found = read_weights(tmp_path / "run" / "last.ckpt").tensors
    kernels = [key for key, p in classifier.named_parameters() if key.startswith("stages.1") and p.ndim == 4]
    name = kernels[0]
    torch.testing.assert_close(found[f"model.backbone.{name}"], classifier.state_dict()[name], rtol=0, atol=1e-6)


def test_the_command_line_trains_and_draws(street, tmp_path):
    flags = [f for value in SMALL for f in ("--set", value)]
    done = nextvit_here("train", street, "--task", "segment", "--output", tmp_path / "run", *flags, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "val mIoU" in done.stdout
    assert {f.name for f in (tmp_path / "run" / "plots").iterdir()} == {
        "classes.csv", "confusion.csv", "confusion.png", "curves.png"}  # fmt: skip


# ---- masks that do not fit -------------------------------------------------------------------------------------------

SIX = "\n".join("abcdef")


def own(root: Path) -> Path:
    """A folder of one's own: six classes, four images."""
    rng = np.random.default_rng(0)
    for index in range(5):
        for part in ("train", "val"):
            image = np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((5, 5, 1), np.uint8))
            mask = np.full((40, 40), index % 6, np.uint8)
            mask[20:] = 5
            for folder, array in (("images", image), ("masks", mask)):
                path = root / part / folder / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (root / "labels.txt").write_text(SIX)
    return root


MISFITS = {
    "another size": (lambda p: Image.new("L", (39, 40)).save(p), "39 x 40 pixels and its image, upright, 40 x 40"),
    "colours": (lambda p: Image.new("RGB", (40, 40)).save(p), "has colours"),
    "missing": (lambda p: p.unlink(), "has no mask of the same name"),
    "a label that is no class": (
        lambda p: Image.new("L", (40, 40), 6).save(p),
        "1600 pixels of values that are no class, the first is 6; there are 6 classes",
    ),
    "16 bits": (lambda p: Image.new("I;16", (40, 40)).save(p), "more than 8 bits a pixel"),
}


@pytest.mark.fault("D12", "exit 2 before step 1: names the file, the value, how many, and ADE20K's layout")
@pytest.mark.parametrize("kind", MISFITS)
def test_a_mask_that_does_not_fit_stops_a_run_before_its_first_step(kind, tmp_path, found):
    root = own(tmp_path / "data")
    spoil, told = MISFITS[kind]
    spoil(root / "train" / "masks" / "2.png")
    flags = [f for value in SMALL for f in ("--set", value)]
    done = nextvit_here("train", root, "--task", "segment", "--output", tmp_path / "run", *flags)
    assert done.returncode == 2
    assert "2.png" in done.stderr
    assert told in done.stderr
    assert ("ADE20K's layout" in done.stderr) == (kind == "a label that is no class")
    assert not (tmp_path / "run").exists()
    found(done.stderr.strip().splitlines()[-1][:160])
    checked = check(read_splits(root, task_of(root)))
    assert checked.serious
    (finding,) = [f for f in checked.findings if f.serious]
    assert (finding.kind, finding.count) == ("entries" if kind == "missing" else "unreadable", 1)
    if kind in ("missing", "16 bits"):  # an entry without its mask, and a mask that cannot be read
        flags += ["--allow-bad", "--epochs", 1]
        done = nextvit_here("train", root, "--task", "segment", "--output", tmp_path / "run", *flags)
        assert done.returncode == 0, done.stderr


def test_a_mask_among_those_whose_images_are_not_decoded_stops_a_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr("nextvit.data.check.QUICK", 2)
    root = own(tmp_path / "data")
    Image.new("L", (40, 40), 6).save(root / "train" / "masks" / "2.png")
    with pytest.raises(UserError, match="1 of 5 images or masks of train .*2.png has 1600 pixels"):
        train(root, read_recipe("finetune_segment", SMALL), tmp_path / "run", machine=MACHINE)
    torch.use_deterministic_algorithms(False)


def test_a_folder_with_masks_is_not_taken_for_classes(tmp_path):
    done = nextvit_here("train", own(tmp_path / "data"), "--output", tmp_path / "run", "--weights", "none")
    assert done.returncode == 2
    assert "laid out for the task segment; say --task segment" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_a_check_of_nothing_says_what_is_missing(task, tmp_path):
    done = nextvit_here("data", "check", tmp_path, "--task", task)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr


def test_masks_in_which_nothing_counts_stop_a_run(tmp_path):
    root = own(tmp_path / "data")
    for path in (root / "train" / "masks").iterdir():
        Image.new("L", (40, 40), IGNORED).save(path)
    with pytest.raises(UserError, match="none of 5 masks of train has a pixel with a class"):
        train(root, read_recipe("finetune_segment", SMALL), tmp_path / "run", machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    (finding,) = [f for f in check(read_splits(root, "segment")).findings if f.kind == "no class"]
    assert (finding.count, finding.serious) == (5, False), "those of val have classes"


def test_data_check_counts_the_images_that_have_a_class(tmp_path):
    root = own(tmp_path / "data")
    checked = check(read_splits(root, "segment"))
    assert not checked.serious
    assert checked.images == {"train": 5, "val": 5}
    assert checked.splits["train"] == {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 5}
    done = nextvit_here("data", "check", root, "--json", "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["f"] == 5


def test_resuming_with_other_masks_is_refused(run_folder, street, tmp_path):
    changed = tmp_path / "ADEChallengeData2016"
    shutil.copytree(street, changed)
    shutil.copytree(run_folder, tmp_path / "run")
    (changed / "annotations" / "training" / "ADE_training_00000009.png").unlink()
    with pytest.raises(UserError, match="was trained with other images"):
        train(changed, read_recipe(str(tmp_path / "run" / "recipe.yaml")), tmp_path / "run", resume=True)
