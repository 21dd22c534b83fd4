"""Folding: no BatchNorm is left, the outputs are the same, the model given in is untouched."""

import copy
import itertools

import pytest
import torch
from torch import nn

import nextvit
from nextvit.folding import ScaleShift
from tests.conftest import fill

NAMES = ["nextvit_nano", "nextvit_tiny", "nextvit_small", "nextvit_base", "nextvit_large"]


@pytest.mark.parametrize(
    ("name", "features_only", "kv_pooling"),
    [  # nano has every kind of block; the others differ in counts and widths
        case if case[0] == "nextvit_nano" or case == ("nextvit_small", False, "sequence")
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(NAMES, (False, True), ("sequence", "spatial"))
    ],
)  # fmt: skip
def test_folding_keeps_the_outputs_and_leaves_no_batchnorm(name, kv_pooling, features_only):
    model = fill(nextvit.create_model(name, kv_pooling=kv_pooling, features_only=features_only)).double()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 64, 99, dtype=torch.float64)  # odd: smaller windows and left-out tokens must fold too
    with torch.inference_mode():
        expected = model(images)
        folded = nextvit.fold(model)
        found = folded(images)
    for f, e in zip(found, expected, strict=True):
        assert ((f - e).abs().max() / e.abs().max()).item() < 1e-9
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert not folded.training
    assert folded.metadata == model.metadata
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "head", "features_only", "left"),
    [
        ("nextvit_nano", "fpn", False, 0),
        ("nextvit_nano", "upernet", False, 1),
        ("nextvit_nano", None, True, 4),
        ("timm:resnet18", "fpn", False, 0),
        ("timm:resnet18", "upernet", False, 0),
    ],
)
def test_folding_a_segmenter_leaves_a_scale_and_shift_where_no_layer_takes_a_norm(name, head, features_only, left):
    timm = name.startswith("timm")
    model = nextvit.create_model(name, task="segment", head=head, num_classes=5, features_only=features_only)
    model = fill(model).double()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 65, 99, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(images)
        folded = nextvit.fold(model)
        found = folded(images)
    for f, e in zip(found, expected, strict=True):
        assert ((f - e).abs().max() / e.abs().max()).item() < 1e-9
    norms = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [n for n in norms if not (timm and n.startswith("backbone."))] == []
    assert len([m for m in folded.modules() if isinstance(m, ScaleShift)]) == left
    assert not any("auxiliary" in key for key in folded.state_dict())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kv_pooling", [pytest.param("sequence", marks=pytest.mark.slow), "spatial"])
def test_a_folded_model_keeps_its_outputs_through_torch_export(kv_pooling):
    model = fill(nextvit.create_model("nextvit_nano", kv_pooling=kv_pooling)).double()
    sizes = {2: torch.export.Dim("h", min=64, max=512), 3: torch.export.Dim("w", min=64, max=512)}
    dims = ({0: torch.export.Dim("b", min=1, max=64), **sizes},)
    example = (torch.randn(2, 3, 96, 128, dtype=torch.float64),)
    program = torch.export.export(nextvit.fold(model), example, dynamic_shapes=dims).module()
    for shape in ((1, 3, 64, 64), (3, 3, 70, 81)):
        images = torch.randn(shape, dtype=torch.float64)
        with torch.inference_mode():
            expected = model(images)
            assert ((program(images) - expected).abs().max() / expected.abs().max()).item() < 1e-9


def test_folding_a_model_in_training_mode_folds_the_running_statistics():
    model = fill(nextvit.create_model("nextvit_nano"))
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(nextvit.fold(model.train())(images), expected, rtol=1e-4, atol=1e-5)
    assert model.training
