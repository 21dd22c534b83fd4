"""A network for a budget: operations add up exactly, the search keeps the budget, a name makes the network again."""

import json
import random

import pytest
import torch

from nextvit.cost import cost
from nextvit.create import create_model
from nextvit.errors import UserError
from nextvit.fit import (
    FRAMES,
    PARTS,
    Candidate,
    Costs,
    Device,
    Fitted,
    budget_of,
    candidates,
    configurations,
    costs_from,
    fit,
    latencies,
    operations,
    parts_of,
    probes,
    promise_of,
)
from nextvit.spec import VARIANTS, Configuration, configured, plan
from tests.conftest import nextvit_here

DEVICE = Device("torch", "fp32", 1, "a machine")
PUBLISHED = {  # G multiply-adds at 224 pixels, and the authors' top-1 at 224 and at 384
    "nextvit_small": (5.8, 82.5, 83.6), "nextvit_base": (8.3, 83.2, 84.3), "nextvit_large": (10.8, 83.6, 84.7),
}  # fmt: skip


def known(device, frame, image_size, mix, rounds) -> Costs:
    """Milliseconds of a device that takes 0.01 for 1e6 multiply-adds and one for each block's start."""
    counted = operations(frame, image_size, mix)
    return Costs(8 + 10 * counted.base, {part: 1 + 10 * gflops for part, gflops in counted.blocks.items()})


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_variant_is_a_configuration_of_its_own_widths(variant):
    (_, _, first), *_ = variant.stages[0].pattern
    n, groups = variant.stages[2].pattern[0][2], variant.stages[2].groups
    c = Configuration(variant.name, first, variant.stages[1].pattern[0][2], n, groups, variant.stages[3].pattern[0][2])
    assert c.variant.stages == variant.stages
    with torch.device("meta"):
        model = create_model(c.name)
    assert sum(p.numel() for p in model.parameters()) == variant.params


@pytest.mark.parametrize("name", ["nextvit_small@3,3,4x2,2", "nextvit_nano@1,2,3x4,5", "nextvit_tiny@2,2,1x1,1,r0.5"])
def test_a_name_makes_the_network_again(name):
    found = configured(name)
    assert found.name == name
    with torch.device("meta"):
        assert create_model(name).metadata.variant == name
    if "r0.5" in name:
        assert found.mix == 0.5


@pytest.mark.parametrize(
    "name", ["nextvit_small@3,3,4,2", "nextvit_small@0,3,4x2,2", "nextvit_huge@1,1,1x1,1", "nextvit_small@1,1,1x1,1,r2"]
)
def test_what_is_no_configuration_is_no_model(name):
    assert configured(name) is None
    with pytest.raises(UserError, match="there is no model"):
        create_model(name)


# ---- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frame", "size", "mix"), [("nextvit_nano", 160, 0.75), ("nextvit_small", 224, 0.5)])
def test_operations_of_a_configuration_are_the_sum_of_its_blocks(frame, size, mix):
    counted = operations(frame, size, mix)
    some = random.Random(0).sample(list(configurations(frame, mix)), 6)
    for c in some:
        with torch.device("meta"):
            model = create_model(c.name)
        assert counted.of(c) == pytest.approx(cost(model, size).gflops_paper, rel=1e-9)


def test_parts_are_counted_as_the_network_has_them():
    c = Configuration("nextvit_nano", 2, 3, 4, 5, 1)
    kinds = [[b.kind for b in stage] for stage in plan(c.variant)]
    assert parts_of(c) == {
        "ncb_1": kinds[0].count("ncb"),
        "ncb_2": kinds[1].count("ncb"),
        "ncb_3": kinds[2].count("ncb"),
        "ntb_3": kinds[2].count("ntb"),
        "ncb_4": kinds[3].count("ncb"),
    }


def test_costs_of_probes_give_each_block_its_own():
    blocks = dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    true = Costs(10.0, blocks)
    found = costs_from({name: true.of(c) for name, c in probes("nextvit_nano", 0.75).items()})
    assert found.base == 10
    assert found.blocks == pytest.approx(blocks)


def test_latencies_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path))
    found = latencies(DEVICE, "nextvit_nano", 64, 0.75, 8)
    assert found.base > 0
    assert len(list((tmp_path / "fit").iterdir())) == 1
    monkeypatch.setattr("nextvit.fit.measured", lambda *a, **k: pytest.fail("it was measured again"))
    assert latencies(DEVICE, "nextvit_nano", 64, 0.75, 8) == found


# ---- promise and search ----------------------------------------------------------------------------------------------


def test_the_promise_has_the_published_results_in_their_order_and_near():
    for gflops, at_224, at_384 in PUBLISHED.values():
        assert promise_of(gflops, 224) == pytest.approx(at_224 - 82.5, abs=0.1)
        assert promise_of(gflops, 384) == pytest.approx(at_384 - 82.5, abs=0.1)


@pytest.mark.parametrize("budget", [30.0, 60.0, 120.0, 400.0])
def test_what_is_found_keeps_the_budget_and_nothing_that_keeps_it_promises_more(budget):
    found = fit(budget, DEVICE, costs_of=known)
    assert all(one.predicted_ms <= budget for one in found)
    assert found == sorted(found, key=lambda one: -one.promise)
    best = found[0]
    frame, size = best.configuration.frame, best.image_size
    times, at_size = known(DEVICE, frame, size, 0.75, 8), operations(frame, size, 0.75)
    at_224 = operations(frame, 224, 0.75)
    assert best == candidates(budget, frame, size, 0.75, times, at_size, at_224)[0]
    rivals = [c for c in configurations(frame, 0.75) if promise_of(at_224.of(c), size) > best.promise + 1e-3]
    assert all(times.of(c) > budget for c in rivals)


def test_more_time_promises_more():
    promises = [fit(budget, DEVICE, costs_of=known)[0].promise for budget in (25, 40, 80, 160, 320)]
    assert promises == sorted(promises)


def test_of_equal_promise_the_paper_s_n_is_taken():
    times = Costs(1.0, dict.fromkeys(PARTS, 0.0))
    flat = Costs(1.0, dict.fromkeys(PARTS, 0.0))
    assert candidates(2.0, "nextvit_nano", 224, 0.75, times, flat, flat)[0].configuration.n == 4


def test_a_budget_that_nothing_keeps_is_told():
    with pytest.raises(UserError, match="nothing takes 0.5 ms or less here: of what was measured, the smallest"):
        fit(0.5, DEVICE, costs_of=known)


def test_sizes_that_are_slower_than_their_area_says_are_passed_over():
    """As on a GPU, where small images take as long as larger ones: what is told is what was measured."""

    def flat(device, frame, size, mix, rounds):
        return known(device, frame, 224, mix, rounds)

    least = min(flat(DEVICE, frame, 224, 0.75, 8).base for frame in FRAMES)
    with pytest.raises(UserError, match=f"of nextvit_nano's widths takes the least, {least:.3g} ms"):
        fit(0.9 * least, DEVICE, costs_of=flat)
    found = fit(1.1 * least, DEVICE, costs_of=flat)
    assert {one.configuration.frame for one in found} == {"nextvit_nano"}
    assert all(one.predicted_ms <= 1.1 * least for one in found)


def test_frames_whose_widths_cannot_be_mixed_so_are_left_out(capsys):
    found = fit(200.0, DEVICE, frames=("nextvit_nano", "nextvit_small"), mix=0.9, costs_of=known)
    assert {one.configuration.frame for one in found} == {"nextvit_small"}
    assert "nextvit_nano cannot have r = 0.9: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"nextvit_nano cannot have r = 0.9: "):
        fit(200.0, DEVICE, frames=("nextvit_nano",), mix=0.9, costs_of=known)


def test_the_error_is_of_the_prediction():
    c = Candidate(Configuration("nextvit_nano", 1, 1, 1, 1, 1), 224, 11.0, 5.0, 1.0, 0.0)
    for speed in (1, 2):  # of a machine that is as busy as it was, or busier
        one = Fitted(c, 10.0 * speed, ratio=2.0, base_ms=5.0 * speed)
        assert one.error == pytest.approx(0.1)
        assert one.speed == pytest.approx(speed)


# ---- the verb --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("10ms", 10.0), (" 2.5 ms ", 2.5), ("7", 7.0)])
def test_a_budget_is_milliseconds(text, value):
    assert budget_of(text) == value


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--budget", "fast"], "a budget is milliseconds for one image, as in 10ms, not 'fast'"),
        (["--budget", "0ms"], "a budget is milliseconds"),
        (["--budget", "5ms", "--frames", "resnet"], "there are no widths of 'resnet'"),
        (["--budget", "5ms", "--sizes", "32"], "--sizes takes whole numbers from 64"),
        (["--budget", "5ms", "--device-runtime", "tvm"], "there is no runtime 'tvm'"),
        (["--budget", "5ms", "--mix", "2"], "--mix"),
    ],
)
def test_what_cannot_be_fitted_is_told_at_once(flags, told):
    done = nextvit_here("fit", *flags)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.mark.slow
def test_the_verb_finds_builds_and_measures(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXTVIT_CACHE", str(tmp_path))
    asked = ["--budget", "500ms", "--device-runtime", "torch", "--precision", "fp32", "--frames", "nextvit_nano"]
    done = nextvit_here("fit", *asked, "--sizes", "128,224", "--threads", 1, "--rounds", 8, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {one["pixels"] for one in shown["candidates"]} <= {128, 224}
    assert shown["chosen"] is None or shown["chosen"]["measured_ms"] <= 500
