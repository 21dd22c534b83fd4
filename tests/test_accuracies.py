"""Accuracies of the tables' rows: trained alike, kept when known, never twice; or of weights that are there."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
from dataclasses import replace

import pytest
import torch

from nextvit import accuracies, create_model
from nextvit import train as training
from nextvit.accuracies import (
    GIVEN,
    Kind,
    Score,
    evaluate_networks,
    kinds_of,
    of_row,
    read_scores,
    study_of,
    summed_up,
    train_networks,
    trained_on,
)
from nextvit.checkpoints import owned
from nextvit.data.demo_images import garments
from nextvit.data.scenes import GROUPS, scenes_folder
from nextvit.errors import Interrupted, UserError
from nextvit.paper import PaperRow, paper_rows
from nextvit.recipe import read_recipe
from nextvit.reproduced import latency_rows, order_rows
from nextvit.weights import read_weights, save_weights
from tests.conftest import fill, nextvit_here

NANO = PaperRow("table8", "Nano", "nextvit_nano", 224, {"top1": 70.0})
TINY = PaperRow("table8", "Other", "timm:resnet10t", 224, {"top1": 60.0})
NONE = PaperRow("table8", "None", "timm:no_such_network", 224, {"top1": 50.0})


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Proxies of two steps."""
    changes = {
        "classify": "schedule: {epochs: 1, steps_per_epoch: 2}\nbatch_size: 8\nimages: {size: 32}\n",
        "segment": "task: segment\nhead: fpn\nschedule: {epochs: 1, steps_per_epoch: 2}\nbatch_size: 2\n"
        "crops: {size: 64, short_side: 64, long_side: 256}\n",
        "detect": "task: detect\nhead: mask_rcnn\nschedule: {epochs: 1, steps_per_epoch: 2}\nbatch_size: 2\n"
        "scenes: {short_sides: [64], long_side: 64}\n",
    }
    for task, text in changes.items():
        file = tmp_path / f"{task}.yaml"
        file.write_text(f"model: nextvit_nano\nweights: none\ndrop_path: 0.0\n{text}")
        monkeypatch.setitem(accuracies.PROXY, task, str(file))
    monkeypatch.setattr(accuracies, "SCENES", (8, 2))


@pytest.fixture
def quick(short, few, monkeypatch):
    """The same on few images, in the place of those that ship."""
    monkeypatch.setattr(accuracies, "DEMO", str(few))
    return str(few)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three images of each garment, to judge by and to train on."""
    folder = tmp_path_factory.mktemp("few") / "clothes"
    for split in ("train", "val"):
        for label, tiles in garments(split).items():
            (folder / split / label).mkdir(parents=True)
            for index, tile in enumerate(tiles[:3]):
                tile.save(folder / split / label / f"{index}.png")
    return folder


# ---- trained ---------------------------------------------------------------------------------------------------------


def test_every_row_is_trained_once_from_every_seed(quick, tmp_path, monkeypatch):
    study = study_of([quick], ["classify"], 2)
    found = train_networks([NANO, TINY, NONE, NANO], study, tmp_path)
    there = {(one.network, one.seed): one for one in found}
    assert set(there) == {(row.network, seed) for row in (NANO, TINY, NONE) for seed in (0, 1)}
    for row in (NANO, TINY):
        for seed in (0, 1):
            one = there[row.network, seed]
            assert 0 <= one.percent <= 100
    assert there[NONE.network, 0].percent is None
    assert "no_such_network" in there[NONE.network, 0].why
    assert not list((tmp_path / "runs").iterdir())  # proxies leave no weights behind

    def fail(*arguments, **more):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(accuracies, "train", fail)
    assert train_networks([NANO, TINY], study, tmp_path) == found
    again = train_networks([NANO], study_of([quick], ["classify"], 1), tmp_path)
    assert again == found


def test_the_same_seed_gives_the_same_figure(quick, tmp_path, monkeypatch):
    study, weights = study_of([quick], ["classify"], 1), []
    honest = accuracies.train

    def noted(data, recipe, run, **more):
        found = honest(data, recipe, run, **more)
        weights.append(read_weights(run / "model.safetensors").tensors)
        return found

    monkeypatch.setattr(accuracies, "train", noted)
    first, second = (train_networks([NANO], study, tmp_path / name) for name in "ab")
    assert [one.percent for one in first] == [one.percent for one in second]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.slow
def test_dense_tasks_start_from_the_classifier_of_their_seed(short, tmp_path, monkeypatch):
    begun = []
    honest = accuracies.train

    def noted(data, recipe, run, **more):
        begun.append((recipe.task, recipe.weights, recipe.seed))
        return honest(data, recipe, run, **more)

    kept = tmp_path / "runs" / "nextvit_nano-in1k_300e-0a1b2c3d-0-224"  # of another training: it is none of theirs
    kept.mkdir(parents=True)

    monkeypatch.setattr(accuracies, "train", noted)
    found = train_networks([NANO], study_of(["demo"], ["detect", "segment"], 1), tmp_path)
    assert [(one.task, one.head) for one in found] == [("classify", ""), ("segment", "fpn"), ("detect", "mask_rcnn")]
    assert all(one.percent is not None for one in found), found
    start = str(accuracies.run_folder(found[0], tmp_path) / "model.safetensors")
    assert begun == [("classify", "none", 0), ("segment", start, 0), ("detect", start, 0)]
    assert list((tmp_path / "runs").iterdir()) == [kept]


def test_a_real_set_is_trained_by_the_papers_recipe_and_its_run_is_kept(tmp_path, monkeypatch, few):
    file = tmp_path / "in1k.yaml"
    file.write_text("weights: none\nschedule: {epochs: 1, warmup_epochs: 0}\nbatch_size: 30\nimages: {size: 32}\n")
    assert accuracies.REAL["classify"] == "in1k_300e"
    monkeypatch.setitem(accuracies.REAL, "classify", str(file))
    study, row = study_of([str(few)]), replace(NANO, image_size=512, table="table5")
    (one,) = train_networks([row], study, tmp_path)  # of a table of dense networks: at the recipe's size
    assert (one.data, one.seed, one.image_size) == (str(few), 0, 32)
    left = accuracies.run_folder(one, tmp_path)
    assert left.name.startswith(f"nextvit_nano-{one.of.replace(' ', '-')}-0-32-")
    assert accuracies.run_folder(replace(one, data="/other/images"), tmp_path) != left
    assert {"recipe.yaml", "model.safetensors", "last.ckpt"} <= {path.name for path in left.iterdir()}
    assert of_row(NANO, [one], one.kind) == []  # a row of 224 pixels tells nothing of 32
    other = replace(TINY, image_size=64)
    both = train_networks([other, replace(NANO, image_size=384)], study, tmp_path)  # which is trained from weights
    assert [(one.network, one.image_size) for one in both[1:]] == [(TINY.network, 64)]
    assert of_row(other, both, one.kind) == [both[1]]


def test_a_training_that_was_stopped_goes_on(tmp_path, monkeypatch, few):
    file = tmp_path / "in1k.yaml"
    file.write_text("weights: none\nschedule: {epochs: 3, warmup_epochs: 0}\nbatch_size: 30\nimages: {size: 32}\n")
    monkeypatch.setitem(accuracies.REAL, "classify", str(file))
    study, honest, epochs = study_of([str(few)]), training.finish_epoch, []
    row = replace(NANO, image_size=512, table="table5")

    def stop(run):
        row = honest(run)
        epochs.append(row.epoch)
        if len(epochs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(training, "finish_epoch", stop)
    with pytest.raises(Interrupted, match="go on with the same command"):
        train_networks([row], study, tmp_path)
    assert read_scores(tmp_path) == []
    (one,) = train_networks([row], study, tmp_path)
    assert epochs == [1, 2, 3]
    whole = tmp_path / "whole"
    assert train_networks([row], study, whole)[0].percent == one.percent


def test_a_run_that_came_to_nothing_is_begun_again(tmp_path, quick):
    study = study_of([quick], seeds=1)
    left = accuracies.run_folder(study.unknown("nextvit_nano", 32, 0, "classify"), tmp_path)
    left.mkdir(parents=True)
    (left / "recipe.yaml").write_text("of a run that was killed\n")
    with owned(left, new=False):  # it is another process's
        (one,) = train_networks([NANO], study, tmp_path)
        assert "is writing to" in one.why
        assert (left / "recipe.yaml").exists()
    (one,) = train_networks([NANO], study, tmp_path)
    assert one.percent is not None


def test_a_failure_does_not_take_the_place_of_a_figure(tmp_path, short, monkeypatch):
    known = study_of(["demo"], seeds=1).unknown("nextvit_nano", 32, 0, "classify")
    accuracies._keep(replace(known, percent=71.0), tmp_path)

    def fail(*arguments, **more):
        raise UserError("memory is short")

    monkeypatch.setattr(accuracies, "train", fail)
    found = train_networks([NANO], study_of(["demo"], ["segment"], 1), tmp_path)
    assert [(one.task, one.percent) for one in found] == [("classify", 71.0), ("segment", None)]
    assert re.fullmatch("not known: it starts from a classifier .*model.safetensors is gone.", summed_up(found[1:]))


def test_the_shipped_proxy_is_for_networks_of_others_too(tmp_path, few, monkeypatch):
    monkeypatch.setattr(accuracies, "DEMO", str(few))
    cut = ["schedule.steps_per_epoch=1", "batch_size=4", "images.size=32"]
    (one,) = train_networks([TINY], study_of([str(few)], seeds=1, overrides=cut), tmp_path)
    assert one.percent is not None, one.why


def test_a_dense_task_without_a_classifier_says_what_to_do(tmp_path, monkeypatch):
    study = study_of([str(scenes_folder(8, 2) / "ade20k")])
    (one,) = train_networks([NANO], study, tmp_path)
    assert one.percent is None
    assert one.why.startswith("it starts from a classifier of the same network and seed: --train IMAGENET --train /")


def test_a_dense_task_starts_from_no_classifier_but_its_own(few, tmp_path):
    """Of a run before on other images, or by another recipe, none is taken where the study trains its own; and where it
    trains none, only one that is the only one.
    """
    scenes = str(scenes_folder(8, 2) / "ade20k")
    both, alone = study_of([str(few), scenes]), study_of([scenes])
    own = both.unknown("nextvit_nano", 224, 0, "classify")
    dense = both.unknown("nextvit_nano", 224, 0, "segment")
    elsewhere, before = replace(own, data="/flowers"), replace(own, of="in1k_300e 00000000")

    def keep(score):
        accuracies._keep(replace(score, percent=1.0), tmp_path)
        run = accuracies.run_folder(score, tmp_path)
        run.mkdir(parents=True)
        (run / "model.safetensors").touch()
        return run / "model.safetensors"

    keep(replace(own, network="nextvit_tiny"))
    first = keep(elsewhere)
    with pytest.raises(UserError, match="which could not be trained"):
        accuracies._classifier(dense, 224, both, tmp_path)
    assert accuracies._classifier(dense, 224, alone, tmp_path) == first
    keep(before)
    with pytest.raises(UserError, match="are such, so name its images too: --train IMAGENET --train"):
        accuracies._classifier(dense, 224, alone, tmp_path)
    mine = keep(own)
    assert accuracies._classifier(dense, 224, both, tmp_path) == mine
    mine.unlink()
    with pytest.raises(UserError, match="is gone"):
        accuracies._classifier(dense, 224, both, tmp_path)


@pytest.mark.parametrize(
    ("data", "tasks", "said"),
    [
        (["demo"], ["sing"], "there is no task 'sing'; take of classify, segment, detect"),
        (["demo", "demo"], ["classify"], "demo and demo are both for the task classify"),
        (["nowhere"], [], "there is no folder"),
        (["nowhere"], ["segment"], "leave --task out"),
    ],
)
def test_what_cannot_be_trained_is_refused(data, tasks, said):
    with pytest.raises(UserError, match=said):
        study_of(data, tasks, None)


def test_proxies_and_real_trainings_are_not_mixed(few):
    with pytest.raises(UserError, match="the shipped images are for proxies"):
        study_of(["demo", str(few)], ["segment"])


def test_torchrun_is_told_how(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="let torchrun start `nextvit train`, and give the weights to --evaluate"):
        study_of(["demo"])


def test_a_proxy_has_three_seeds_and_the_recipes_are_short(few):
    assert study_of(["demo"]).seeds == 3
    assert study_of([str(few)]).seeds == 1
    for task, name in accuracies.PROXY.items():
        recipe = read_recipe(name)
        assert recipe.task == task
        assert recipe.schedule.epochs * recipe.schedule.steps_per_epoch <= 200


# ---- of weights that are there ---------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A folder with weights of nano alone."""
    folder = tmp_path / "weights"
    folder.mkdir()
    model = fill(create_model("nextvit_nano", num_classes=10))
    model.metadata = replace(model.metadata, labels=tuple(garments("val")))
    save_weights(folder / "nextvit_nano.safetensors", model.state_dict(), model.metadata)
    return folder


def test_weights_are_evaluated_as_eval_does(tmp_path, few, weights):
    rows = [PaperRow("table4", "Nano", "nextvit_nano", size, {"top1": 1.0}) for size in (224, 384)]
    shutil.copy(weights / "nextvit_nano.safetensors", weights / "nextvit_nano-384.safetensors")
    found = evaluate_networks([*rows, TINY], str(few), weights, tmp_path)
    assert [(one.network, one.image_size) for one in found] == [("nextvit_nano", 224), ("nextvit_nano", 384)]
    for row, one in zip(rows, found, strict=True):
        file, size = weights / "nextvit_nano.safetensors", ("--image-size", row.image_size)
        done = nextvit_here("eval", file, few, *size, "--json")
        assert json.loads(done.stdout)["top1"] == pytest.approx(one.percent, abs=1e-3)
        assert of_row(row, found, Kind("classify", "", str(few), GIVEN)) == [one]
        assert one.source.startswith(f"nextvit_nano{'-384' * (row.image_size == 384)}.safetensors ")
    fill(model := create_model("nextvit_nano", num_classes=10), 5000)
    model.metadata = replace(model.metadata, labels=tuple(garments("val")))
    save_weights(weights / "nextvit_nano.safetensors", model.state_dict(), model.metadata)
    again = evaluate_networks(rows[:1], str(few), weights, tmp_path)
    assert again[0].source != found[0].source  # what is asked for is evaluated anew
    assert again[1:] == found[1:]


def test_a_dense_file_is_of_the_row_it_is_named_for(tmp_path, weights):
    model = create_model("nextvit_nano", task="segment", head="fpn", num_classes=6)
    model.metadata = replace(model.metadata, labels=("background", *GROUPS))
    for name in ("nextvit_nano-fpn", "nextvit_nano-upernet", "timm-resnet10t-fpn"):
        save_weights(weights / f"{name}.safetensors", model.state_dict(), model.metadata)
    found = evaluate_networks([NANO, TINY], str(scenes_folder(8, 2) / "ade20k"), weights, tmp_path)
    assert [(one.network, one.head, one.percent is None) for one in found] == [
        ("nextvit_nano", "fpn", False),
        ("nextvit_nano", "upernet", True),
        ("timm:resnet10t", "fpn", True),
    ]
    assert "is nextvit_nano with fpn, not nextvit_nano with upernet" in found[1].why


def test_images_that_cannot_be_read_are_in_no_figure(tmp_path, few, weights):
    folder = tmp_path / "clothes"
    shutil.copytree(few, folder)
    next((folder / "val").rglob("*.png")).write_bytes(b"no image")
    (one,) = evaluate_networks([NANO], str(folder), weights, tmp_path)
    assert one.percent is None
    assert "1 images of" in one.why


def test_weights_that_do_not_fit_are_told_and_the_rest_goes_on(tmp_path, few, weights):
    (weights / "timm-resnet10t.pth").write_bytes(b"no weights")
    found = evaluate_networks([TINY, NANO], str(few), weights, tmp_path)
    assert [one.percent is None for one in found] == [True, False]
    assert "timm-resnet10t.pth" in found[0].why


def test_two_files_for_a_row_are_not_chosen_from(tmp_path, few, weights):
    torch.save({}, weights / "nextvit_nano.pth")
    (one,) = evaluate_networks([NANO], str(few), weights, tmp_path)
    assert "are both for Nano" in one.why


@pytest.mark.parametrize("arguments", [("--weights", "."), ("--weights", "nowhere", "--evaluate", "demo")])
def test_weights_are_a_folder_and_need_images(arguments, tmp_path):
    done = nextvit_here("reproduce", "table8", "--costs", *arguments, "--output", tmp_path)
    assert done.returncode == 2
    assert "--weights is a folder of weight files, and goes with --evaluate DATA" in done.stderr


# ---- told ------------------------------------------------------------------------------------------------------------


def test_one_kind_a_title_and_each_is_told_apart():
    kinds = [
        Kind("classify", "", "demo", "proxy 1"),
        Kind("classify", "", "demo", "proxy 2"),
        Kind("classify", "", "demo", "proxy 2", "a GPU, bf16"),
        Kind("classify", "", "/a/imagenet", "in1k_300e 1"),
        Kind("classify", "", "/a/imagenet", GIVEN),
        Kind("classify", "", "/a/flowers", GIVEN),
        Kind("segment", "fpn", "/a/ade", GIVEN),
    ]
    found = [
        Score("nextvit_nano", kind.task, kind.data, kind.of, head=kind.head, image_size=224, percent=1.0, on=kind.on)
        for kind in kinds
    ]
    assert list(kinds_of([NANO], found)) == kinds
    assert list(kinds_of([NANO], found).values()) == [
        "top-1, %, a proxy (demo, proxy 1)",
        "top-1, %, a proxy (demo, proxy 2)",
        "top-1, %, a proxy (demo, proxy 2, a GPU, bf16)",
        "top-1, %, trained on imagenet",
        "top-1, %, of weights on imagenet",
        "top-1, %, of weights on flowers",
        "mIoU, % with fpn, of weights on ade",
    ]


def scores(of):
    return [
        Score(row.network, "classify", "demo", "proxy 0", seed, percent=value)
        for row, values in zip(paper_rows("table8"), of, strict=True)
        for seed, value in enumerate(values)
    ]


def test_a_row_tells_mean_and_standard_deviation_of_its_seeds():
    assert summed_up([]) == "-"
    rows = paper_rows("table8")
    lines = latency_rows(rows, [], scores(of=[[60, 62], [61], [], [64], [63]]))
    assert [line["top-1, %, a proxy"] for line in lines] == ["61.0 ± 1.4 (2 seeds)", "61.0", "-", "64.0", "63.0"]


def test_the_order_of_means_is_compared_with_the_printed_one():
    rows = paper_rows("table8")
    printed = [row.printed["top1"] for row in rows]
    same = [[value + 1, value - 1] for value in printed]
    (line,) = order_rows(rows, [], scores(of=same))
    assert (line["Spearman's rho"], line["rows"]) == ("1.00", 5)
    (line,) = order_rows(rows, [], scores(of=[[-statistics.mean(values)] for values in same]))
    assert line["Spearman's rho"] == "-1.00"
    assert order_rows(rows, [], scores(of=[[1], [2], [3], [4], []])) == []  # four rows have no order to speak of


def test_the_verb_shows_a_proxy_as_one(tmp_path, quick):
    asked = ("table8", "--costs", "--only", "0.5", "--train", quick, "--seeds", 1, "--output", tmp_path)
    done = nextvit_here("reproduce", *asked)
    assert done.returncode == 0, done.stderr
    assert "top-1, %, a proxy" in done.stdout
    page = (tmp_path / "table8.html").read_text()
    assert "trained for a minute or two on the images that ship" in page
    assert f"Trained on {trained_on()}." in page
    with open(tmp_path / "accuracies.csv", newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert row["network"] == "table8_r050"
    assert read_scores(tmp_path)[0].percent == float(row["percent"])
