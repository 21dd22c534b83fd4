"""What a recipe leaves open: network, weights, epochs and rate, by what there is."""

import os
from dataclasses import replace

import pytest

from nextvit.create import create_model
from nextvit.data.sets import read_split
from nextvit.decide import decided
from nextvit.errors import UserError
from nextvit.recipe import parse_recipe, read_recipe
from nextvit.weights import save_weights
from tests.conftest import nextvit, nextvit_here


@pytest.fixture(scope="module")
def training(garment_folder):
    return read_split(garment_folder, "train")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A weight file of nextvit_tiny."""
    model = create_model("nextvit_tiny", num_classes=5)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, model.state_dict(), model.metadata)
    return path


def test_the_network_is_that_of_the_weights(training, tiny):
    found = decided(read_recipe("finetune", values={"weights": str(tiny)}), training)
    assert (found.model, found.weights) == ("nextvit_tiny", str(tiny))
    assert found.optimizer.layer_decay == 0.8
    assert found.optimizer.lr == 1e-3
    assert found.schedule.epochs == 100
    assert decided(found, training) == found, "what is decided stays"


def test_without_weights_it_is_the_smallest(training):
    found = decided(read_recipe("finetune", values={"weights": "none"}), training)
    assert (found.model, found.weights, found.optimizer.lr) == ("nextvit_nano", "none", 1e-3)
    assert found.optimizer.layer_decay == 1


def test_weights_that_cannot_be_read_are_an_error(training, tmp_path):
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        decided(read_recipe("finetune", values={"weights": str(tmp_path / "missing.safetensors")}), training)


@pytest.mark.parametrize(("images", "epochs"), [(10, 100), (600, 50), (100_000, 10)])
def test_epochs_follow_from_the_number_of_images(images, epochs, training):
    many = replace(training, files=training.files[:1] * images, targets=training.targets[:1] * images)
    assert decided(read_recipe("finetune", values={"weights": "none"}), many).schedule.epochs == epochs


@pytest.mark.parametrize(("batch", "rate"), [(4, 5e-4), (16, 1e-3), (4096, 1.7e-3)])
def test_the_rate_follows_from_the_batch(batch, rate, training):
    """By its square root; a batch is never larger than the data, which has 48 images."""
    recipe = read_recipe("finetune", values={"weights": "none", "batch_size": batch})
    assert decided(recipe, training).optimizer.lr == rate


def test_what_is_said_is_kept(training):
    values = {"model": "nextvit_base", "weights": "none", "optimizer.lr": 3e-5, "schedule.epochs": 7}
    values["optimizer.layer_decay"] = 0.9
    found = decided(read_recipe("finetune", values=values), training)
    assert (found.model, found.optimizer.lr, found.schedule.epochs) == ("nextvit_base", 3e-5, 7)
    assert found.optimizer.layer_decay == 0.9
    assert parse_recipe(found.to_yaml(), "again") == found


@pytest.mark.slow
def test_finetune_without_a_network_starts_small_and_says_so(garment_folder, tmp_path):
    """As a new user behind a closed door would have it: no flag but the recipe (and two to be quick)."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    flags = ["--recipe", "finetune", "--epochs", 1, "--image-size", 32]
    done = nextvit("train", garment_folder, *flags, "--output", tmp_path / "run", env=environment)
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first.startswith("warning: cannot get timm/nextvit_small")
    assert "So nextvit_nano starts from random weights" in first
    assert "layer_decay: 1.0" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_weights_that_are_asked_for_by_name_are_not_replaced(garment_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    flags = ["--recipe", "finetune", "--weights", "in1k", "--output", tmp_path / "run"]
    told = nextvit_here("train", garment_folder, *flags)
    assert told.returncode == 2
    assert "cannot get timm/nextvit_small.bd_in1k from the hub" in told.stderr
    assert "--weights none" in told.stderr
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
