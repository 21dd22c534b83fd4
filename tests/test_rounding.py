"""int8 as torch simulates it, and fine-tuning under it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nextvit
from nextvit.backbone import NCB, NTB
from nextvit.data.demo_images import garments
from nextvit.data.images import preprocess
from nextvit.exporters import rounding
from nextvit.exporters.form import export_form
from nextvit.metadata import Preprocess
from tests.conftest import fill, nextvit_here

LABELS = ("bag", "sandal", "trouser", "coat")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    tiles = [garments("train")[label][index] for index in range(60) for label in LABELS]
    return [tile.resize((32, 32)).convert("RGB") for tile in tiles]


@pytest.fixture(scope="module")
def broken_by_rounding(images) -> nn.Module:
    """A network that knows four garments; half of the channels inside each MLP are too small for one common scale."""
    torch.manual_seed(0)
    model = nextvit.create_model("nextvit_nano", num_classes=4)
    model.metadata = replace(model.metadata, labels=LABELS, preprocess=Preprocess(32, crop=1.0))
    batch = torch.from_numpy(np.stack([preprocess(image, model.metadata.preprocess) for image in images]))
    targets = torch.arange(len(images)) % 4
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(12):
        for indices in torch.randperm(len(images)).split(24):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[indices]), targets[indices]).backward()
            optimizer.step()
    with torch.no_grad():
        before = model.eval()(batch)
        assert (before.argmax(1) == targets).float().mean() > 0.7
        for block in model.modules():
            if isinstance(block, NCB | NTB):
                factors = torch.where(torch.arange(block.mlp.fc1.out_channels) % 2 == 0, 300.0, 1.0)
                block.mlp.fc1.weight *= factors.view(-1, 1, 1, 1)
                block.mlp.fc1.bias *= factors
                block.mlp.fc2.weight /= factors.view(1, -1, 1, 1)
        assert (model(batch) - before).abs().max() < 1e-4 * before.abs().max(), "it is the same function"
    return model


def test_weights_have_255_levels_a_channel_and_inputs_256_and_nothing_stays_behind():
    torch.manual_seed(0)
    layer, image = nn.Conv2d(3, 4, 1, bias=False), torch.randn(2, 3, 5, 5)
    weight = layer.weight.detach().clone()
    with rounding.rounded(layer):
        found = layer(image)
        loss = found.square().sum()
        loss.backward()
        assert layer.parametrizations.weight.original.grad.abs().min() > 0
    scale = np.abs(weight.numpy()).reshape(4, 3).max(1) / 127
    levels = np.rint(weight.numpy().reshape(4, 3) / scale[:, None])
    step = float(image.max() - image.min()) / 255
    zero = round(float(-image.min()) / step)
    pixels = (np.clip(np.rint(image.numpy() / step) + zero, 0, 255) - zero) * step
    expected = np.einsum("oc,bchw->bohw", levels * scale[:, None], pixels)
    assert np.abs(found.detach().numpy() - expected).max() < 1e-5
    assert torch.equal(layer.weight, weight), "the weight itself was never rounded"
    assert not hasattr(layer, "parametrizations")
    assert not layer._forward_pre_hooks


@pytest.mark.slow
def test_fine_tuning_changes_the_form_alone_and_comes_nearer_to_the_model(broken_by_rounding, images):
    model = broken_by_rounding
    before = copy.deepcopy(model.state_dict())
    form = export_form(model, fixed=True)
    batches = [preprocess(image, model.metadata.preprocess)[None] for image in images[:96]]
    first, last = rounding.finetune(form, model, batches, epochs=6)
    assert last < 0.5 * first
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in form.parameters())
    again = export_form(model, fixed=True)
    assert rounding.finetune(again, model, batches, epochs=6) == (first, last), "the same seed gives the same network"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".xml", ".pte"])
def test_an_int8_file_of_a_network_that_rounding_breaks_is_saved_by_it(ending, broken_by_rounding, images, tmp_path):
    kw = {"precision": "int8", "calibration": images, "max_drop": None, "dynamic": False}
    plain = nextvit.export(broken_by_rounding, tmp_path / f"a{ending}", **kw)
    tuned = nextvit.export(broken_by_rounding, tmp_path / f"b{ending}", qat_epochs=6, **kw)
    assert tuned.accuracy.agreement > plain.accuracy.agreement + 10
    assert "fine-tuned in int8 to answer as the model does, 6 epochs on 192 images" in tuned.notes[-1]


def test_fine_tuning_that_does_not_help_changes_nothing(monkeypatch):
    monkeypatch.setattr(rounding, "LEARNING_RATE", float("inf"))
    model = fill(nextvit.create_model("nextvit_nano", num_classes=5))
    form = export_form(model, fixed=True)
    before = copy.deepcopy(form.state_dict())
    rounding.finetune(form, model, [np.ones((1, 3, 32, 32), np.float32)] * 40, epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in form.state_dict().items())


def test_fine_tuning_without_int8_is_refused(tmp_path):
    done = nextvit_here("export", "nextvit_nano", "--to", "onnx", "--qat-epochs", 2, "--output", tmp_path / "m.onnx")
    assert done.returncode == 2
    assert "of no use in fp32; leave --qat-epochs out" in done.stderr
