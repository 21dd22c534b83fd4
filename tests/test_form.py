"""The export form has the model's outputs, in float64 to rounding, whatever the size."""

import pytest
import torch
from torch import nn

import nextvit
from nextvit.errors import UserError
from nextvit.exporters.form import MapEMHSA, export_form
from tests.conftest import fill, relative_error


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kv_pooling", ["sequence", "spatial"])
@pytest.mark.parametrize("name", ["nextvit_nano", pytest.param("nextvit_small", marks=pytest.mark.slow)])
def test_the_export_form_equals_the_model(name, kv_pooling, fixed):
    model = fill(nextvit.create_model(name, kv_pooling=kv_pooling)).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    form = export_form(model, fixed=fixed)
    for size in ((224, 224), (33, 47), (96, 160), (32, 32)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.inference_mode():
            assert relative_error(form(images), model(images)) < 1e-11, size
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not [m for m in form.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def test_an_attention_that_is_not_folded_is_refused():
    with pytest.raises(UserError, match="made of a folded model"):
        MapEMHSA(nextvit.create_model("nextvit_nano").stages[1].blocks[-1].e_mhsa, fixed=True)
