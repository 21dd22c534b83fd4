"""The rate of every epoch, which weights move and how fast, and their running mean."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from nextvit.create import create_model
from nextvit.optimization import RunningMean, all_finite, freeze, learning_rate, parameter_groups
from nextvit.recipe import Optimizer, parse_recipe, read_recipe

LOGS = Path(__file__).parent / "data" / "released_logs.csv"  # of the authors' training runs, as they were published


def logged(model: str, resolution: str) -> dict[int, float]:
    with open(LOGS, newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["resolution"]) == (model, resolution)]
    return {int(row["epoch"]): float(row["lr"]) for row in rows}


@pytest.mark.parametrize("model", ["nextvit_small", "nextvit_base", "nextvit_large"])
def test_the_rate_of_every_epoch_is_that_of_the_published_logs(model):
    recipe, rates = read_recipe("in1k_300e"), logged(model, "224")
    assert sorted(rates) == list(range(300))
    for epoch, rate in rates.items():
        for step in (0, 0.5, 0.999):  # constant within an epoch
            assert float(f"{learning_rate(epoch + step, 300, recipe):.6f}") == rate


def test_the_rate_at_384_pixels_is_that_of_the_published_logs():
    recipe, rates = read_recipe("in1k_384"), logged("nextvit_small", "384")
    assert len(rates) == 30
    assert all(float(f"{learning_rate(epoch, 30, recipe):.6f}") == rate for epoch, rate in rates.items())


def test_the_paper_s_rate_warms_up_for_20_epochs_and_then_falls_as_a_cosine():
    recipe = read_recipe("in1k_300e_paper")
    rates = [learning_rate(epoch, 300, recipe) for epoch in range(301)]
    assert rates[20] == max(rates) == pytest.approx(2e-3)
    assert rates[10] == pytest.approx((1e-6 + 2e-3) / 2)
    assert rates[160] == pytest.approx((1e-5 + 2e-3) / 2)
    assert rates[300] == pytest.approx(1e-5)


def test_the_warm_up_of_a_short_run_is_at_most_half_of_it():
    recipe = parse_recipe("schedule: {warmup_epochs: 5}", "test")
    assert learning_rate(1, 2, recipe) == pytest.approx(recipe.optimizer.lr)
    assert learning_rate(2, 2, recipe) == pytest.approx(recipe.schedule.min_lr)


def by_parameter(model, groups) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (round(g.get("lr_scale", g.get("scale", 1.0)), 9), g["weight_decay"])
        for g in groups
        for p in g["params"]
    }


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_parameter_groups_are_those_of_timm(layer_decay):
    ours, theirs = create_model("nextvit_small"), timm.create_model("nextvit_small")
    found = by_parameter(ours, parameter_groups(ours, Optimizer(weight_decay=0.1, layer_decay=layer_decay)))
    expected = (
        param_groups_weight_decay(theirs, 0.1)
        if layer_decay == 1
        else param_groups_layer_decay(theirs, 0.1, layer_decay=layer_decay, weight_decay_exclude_1d=True)
    )
    assert found == by_parameter(theirs, expected)


@pytest.mark.parametrize("stages", [0, 1, 4])
def test_frozen_stages_have_no_gradient_and_are_in_no_group(stages):
    model = create_model("nextvit_nano")
    frozen = freeze(model, stages)
    assert len(frozen) == (stages + 1 if stages else 0)
    kept = {id(p) for part in frozen for p in part.parameters()}
    grouped = {id(p) for group in parameter_groups(model, Optimizer()) for p in group["params"]}
    assert not kept & grouped
    assert kept | grouped == {id(p) for p in model.parameters()}
    assert all(p.requires_grad is (id(p) in grouped) for p in model.parameters())


def test_the_running_mean_is_that_of_torch_and_has_the_statistics_of_now():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    mean = RunningMean(model, 0.5)
    reference = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.randn(4, 3, 5, 5))
        mean.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            reference[name] = decay * reference[name] + (1 - decay) * p.detach().double()
    for name, p in mean.model.named_parameters():
        torch.testing.assert_close(p.double(), reference[name], rtol=1e-6, atol=1e-6)
    assert torch.equal(mean.model[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in mean.model.parameters())


def test_a_number_that_is_not_finite_is_seen():
    good, whole = torch.ones(3), torch.arange(3)
    assert all_finite([good, whole])
    for bad in (float("nan"), float("inf")):
        assert not all_finite([good, torch.tensor([1.0, bad])])
