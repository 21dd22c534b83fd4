"""Training for detection: the authors' schedules and groups, the loop's promises, what can be learnt from."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from nextvit.augmentation import Normalise
from nextvit.backbone import DropPath
from nextvit.create import create_model
from nextvit.data import objects
from nextvit.data.loader import Batch
from nextvit.data.objects import object_split
from nextvit.data.scenes import scenes_folder
from nextvit.decide import decided
from nextvit.errors import UserError
from nextvit.learning import LEARNING
from nextvit.metadata import DENSE
from nextvit.objective import Moment, ObjectObjective
from nextvit.optimization import freeze, learning_rate, parameter_groups
from nextvit.recipe import Sampling, parse_recipe, read_recipe, with_image_size
from nextvit.run import Machine
from nextvit.scene_augmentation import as_scenes
from nextvit.train import train
from nextvit.weights import read_weights, save_weights
from tests.conftest import fill, nextvit_here
from tests.test_objects import coco, content
from tests.test_scene_augmentation import PLAIN, drawn

SMALL = ["model=nextvit_nano", "weights=none", "batch_size=2", "scenes.short_sides=[64]", "scenes.long_side=64",
         "schedule.epochs=1", "schedule.steps_per_epoch=4", "sampling.boxes=16", "sampling.masks=2"]  # fmt: skip
MACHINE = Machine(threads=1, workers=0, deterministic=True)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "epochs", "falls"), [("maskrcnn_1x", 12, (8, 11)), ("maskrcnn_3x_ms", 36, (27, 33))])
def test_the_rate_is_the_authors(name, epochs, falls):
    recipe, steps = read_recipe(name), 7330
    assert (recipe.batch_size, recipe.schedule.epochs, recipe.optimizer.clip_norm) == (16, epochs, None)
    assert (recipe.optimizer.frozen_stages, recipe.fixed_norms, recipe.drop_path) == (1, True, None)
    assert recipe.sampling == Sampling(256, 512, 128)
    i = np.arange(epochs * steps)
    rate = np.array([learning_rate(n / steps, epochs, recipe) for n in i.tolist()])
    expected = 1e-4 * 0.1 ** sum((i // steps >= fall).astype(int) for fall in falls)
    expected = expected * np.where(i < 500, 1 - (1 - i / 500) * (1 - 1e-6), 1)  # reference: 500 steps from a millionth
    np.testing.assert_allclose(rate, expected, rtol=1e-9)


def test_weights_decay_as_the_authors_had_it():
    recipe = read_recipe("maskrcnn_1x")
    model = create_model("nextvit_small", task="detect")
    freeze(model, recipe.optimizer.frozen_stages)
    groups = {
        group["weight_decay"]: {id(p) for p in group["params"]} for group in parameter_groups(model, recipe.optimizer)
    }
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert set(groups) == {0.0, 0.05}
    norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    assert groups[0.0] == norms & set(names)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 51_790_936 - 1_025_000 - 2 * 1024


@pytest.mark.parametrize(("size", "rate"), [("small", 0.1), ("base", 0.2), ("large", 0.2)])
def test_drop_path_is_the_authors(size, rate):
    with torch.device("meta"):
        model = create_model(f"nextvit_{size}", task="detect")
    rates = [m.rate for m in model.backbone.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: detect\nlabel_smoothing: 0.2", "label_smoothing is not for the task detect"),
        ("task: detect\ncrops: {size: 64}", "crops is not for the task detect"),
        ("task: segment\nscenes: {flip: 0}", "scenes is not for the task segment"),
        ("task: detect\nhead: fpn", "head fpn is not for the task detect"),
        ("task: detect\nscenes: {short_sides: [900], long_side: 800}", "no short side is longer"),
        ("task: detect\nscenes: {short_sides: []}", "scenes.short_sides"),
        ("task: detect\nscenes: {cut_sides: [600, 384]}", "from the smaller to the larger"),
        ("fixed_norms: true", "fixed_norms is not for the task classify"),
    ],
)
def test_what_a_task_does_not_read_is_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_recipe(text, "recipe")


def test_an_image_size_keeps_the_proportions_of_the_sides():
    scenes = with_image_size(read_recipe("maskrcnn_3x_ms"), 400).scenes
    assert (scenes.short_sides[0], scenes.short_sides[-1], scenes.long_side) == (240, 400, 666)
    assert (scenes.cut_short_sides, scenes.cut_sides) == ((200, 250, 300), (192, 300))


def test_norms_are_fixed_where_there_are_weights(monkeypatch):
    split = object_split("demo", "train")
    recipe = read_recipe("finetune_detect", ["model=nextvit_nano"])
    assert decided(replace(recipe, weights="none"), split).fixed_norms is False
    assert decided(replace(recipe, weights="file.safetensors"), split).fixed_norms is True


# ---- the loss of a batch ---------------------------------------------------------------------------------------------


def test_a_batch_costs_the_sum_of_the_losses():
    split = object_split("demo", "train")
    model = create_model("nextvit_nano", task="detect", num_classes=5).train()
    normalise = Normalise(DENSE["detect"], torch.device("cpu"))
    samples = [drawn(split, PLAIN, index) for index in (3, 4)]
    none = torch.empty(0, dtype=torch.int64)
    torch.manual_seed(1)
    found = ObjectObjective(normalise)(model, Batch(samples, none, none, ()), Moment(0, 0, 0, 0))
    torch.manual_seed(1)
    expected = sum(model(*as_scenes(samples, normalise)).values())
    torch.testing.assert_close(found, expected)


def test_images_without_an_object_are_seen_if_asked(tmp_path):
    whole = content(6)
    whole["annotations"] = whole["annotations"][:4]
    whole["images"][0] |= {"height": 31}
    split = object_split(coco(tmp_path / "set", whole, images=6), "train")
    chosen = LEARNING["detect"].chosen
    assert len(chosen(read_recipe("maskrcnn_1x"), split)) == 3, "two have none, one has a side below 32"
    assert len(chosen(read_recipe("finetune_detect"), split)) == 5


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "scenes_folder", lambda: scenes_folder(9, 3))
        yield


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run_folder(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scenes"
    train("demo", read_recipe("finetune_detect", SMALL), folder, machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    return folder


def test_a_run_is_whole(run_folder):
    rows = metrics(run_folder)
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "val_box_ap", "val_box_ap50", "val_box_ap75", "val_mask_ap",
                             "val_mask_ap50", "val_mask_ap75", "images"]  # fmt: skip
    assert [row["images"] for row in rows] == ["8"]
    metadata = read_weights(run_folder / "model.safetensors").metadata
    assert (metadata.task, metadata.head) == ("detect", "mask_rcnn")
    assert metadata.labels == ("top", "trousers", "dress", "footwear", "bag")
    assert (metadata.preprocess.image_size, metadata.preprocess.long_side) == (64, 64)


def test_eval_of_the_run_gives_what_training_saw(run_folder, few):
    done = nextvit_here("eval", run_folder / "model.safetensors", "demo", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    seen = [float(row["val_box_ap50"]) for row in metrics(run_folder)]
    assert any(told["box"]["ap50"] == pytest.approx(value, abs=0.1) for value in seen)
    assert told["images"] == 3


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (3, []),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(5, ["schedule.epochs=2", "ema=0.9"], marks=pytest.mark.slow),
    ],
)
def test_a_stop_after_any_step_resumes_to_the_same_run(step, more, run_folder, few, tmp_path, monkeypatch):
    from nextvit import train as module

    honest, calls = module.train_step, []

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return honest(*arguments)

    recipe = read_recipe("finetune_detect", [*SMALL, *more])
    if more:
        run_folder = tmp_path / "whole"
        train("demo", recipe, run_folder, machine=MACHINE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", signalling)
        with pytest.raises(module.Interrupted):
            train("demo", recipe, tmp_path / "run", machine=MACHINE)
    train("demo", recipe, tmp_path / "run", resume=True, machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    assert metrics(tmp_path / "run") == metrics(run_folder)
    ours, theirs = (read_weights(f / "last.ckpt").tensors for f in (tmp_path / "run", run_folder))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_from_a_classifier_with_loading_processes_the_frozen_stage_is_kept(few, tmp_path):
    classifier = fill(create_model("nextvit_nano", num_classes=4))
    save_weights(tmp_path / "c.safetensors", classifier.state_dict(), replace(classifier.metadata, num_classes=4))
    changes = [*SMALL, f"weights={tmp_path / 'c.safetensors'}", "model=null",
               "schedule.steps_per_epoch=2", "optimizer.frozen_stages=1", "scenes.copy_paste=0.5"]  # fmt: skip
    train("demo", read_recipe("finetune_detect", changes), tmp_path / "run", machine=Machine(threads=1, workers=1))
    found = read_weights(tmp_path / "run" / "last.ckpt").tensors
    before = classifier.state_dict()
    kept = [key for key in before if key.startswith(("stem.", "stages.0."))]
    assert all(torch.equal(found[f"model.backbone.{key}"], before[key]) for key in kept)
    statistics = [key for key in before if "running" in key and key.startswith("stages.")]
    assert all(torch.equal(found[f"model.backbone.{key}"], before[key]) for key in statistics), "norms are fixed"
    moved = "stages.2.blocks.0.mlp.fc1.weight"
    assert not torch.equal(found[f"model.backbone.{moved}"], before[moved])


@pytest.mark.slow
def test_it_trains_compiled(few, tmp_path):
    recipe = read_recipe("finetune_detect", SMALL)
    train("demo", recipe, tmp_path / "run", machine=Machine(threads=1, workers=0, compile=True))
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_backbone_of_timms_and_a_set_of_one_class_train(tmp_path):
    whole = content(4)
    whole["categories"] = [{"id": 3, "name": "dog"}]
    folder = coco(tmp_path / "set", whole)
    recipe = read_recipe("finetune_detect", [*SMALL, "model=timm:resnet18"])
    result = train(folder, recipe, tmp_path / "run", machine=Machine(threads=1, workers=0))
    assert result.split.labels == ("dog",)


@pytest.mark.slow
def test_the_command_line_trains_and_draws(few, tmp_path):
    flags = [f for value in SMALL for f in ("--set", value)]
    done = nextvit_here("train", "demo", "--task", "detect", "--output", tmp_path / "run", "--threads", 1, *flags)
    assert done.returncode == 0, done.stderr
    assert "box AP" in done.stdout
    assert {f.name for f in (tmp_path / "run" / "plots").iterdir()} == {
        "classes.csv", "precision.csv", "precision.png", "curves.png", "detections.json"}  # fmt: skip


def test_resuming_with_other_objects_is_refused(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "scenes_folder", lambda: scenes_folder(8, 3))
    with pytest.raises(UserError, match="was trained with other images"):
        train("demo", read_recipe("finetune_detect", SMALL), run_folder, resume=True, machine=MACHINE)
