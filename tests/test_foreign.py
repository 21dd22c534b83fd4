"""Networks of others as classifiers: timm's answers, sizes, classes, the way from training to a file."""

import numpy as np
import pytest
import timm
import torch

from nextvit import create_model, export
from nextvit.create import open_checkpoint
from nextvit.errors import UserError
from nextvit.exporters.parity import real_images
from nextvit.foreign import preprocess_of
from nextvit.networks import of_size
from nextvit.runtime.open import open_session
from nextvit.weights import save_weights
from tests.conftest import fill, nextvit_here, relative_error


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_patch16_224", "mobilevitv2_050"])
def test_answers_as_timms_own_does_from_timms_file(name, tmp_path):
    theirs = fill(timm.create_model(name))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = create_model(f"timm:{name}", weights=tmp_path / "theirs.pth").eval()
    side = ours.metadata.preprocess.image_size
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    save_weights(tmp_path / "ours.safetensors", ours.state_dict(), ours.metadata)
    again = open_checkpoint(tmp_path / "ours.safetensors").eval()
    assert again.metadata.variant == f"timm:{name}"
    with torch.no_grad():
        torch.testing.assert_close(again(x), ours(x))


def test_images_are_prepared_as_timm_records():
    p, record = preprocess_of("timm:efficientnet_b3"), timm.get_pretrained_cfg("efficientnet_b3")
    assert (p.image_size, p.crop, p.mean, p.std) == (288, record.crop_pct, tuple(record.mean), tuple(record.std))


def test_another_count_of_classes_has_a_new_last_layer_and_the_same_body(tmp_path):
    theirs = timm.create_model("resnet10t")
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    with pytest.warns(UserWarning, match="1000 classes, 3 were asked for"):
        ours = create_model("timm:resnet10t", weights=tmp_path / "theirs.pth", num_classes=3)
    assert ours.state_dict()["body.fc.weight"].shape == (3, 512)
    torch.testing.assert_close(ours.body.layer4.state_dict(), theirs.layer4.state_dict())


@pytest.mark.parametrize("name", ["cvt_13", "trt_vit_c", "cmt_tiny", "uniformer_small", "cswin_tiny"])
def test_a_peers_file_of_other_classes_gives_its_body(name, tmp_path):
    theirs = create_model(f"peer:{name}", num_classes=7)
    save_weights(tmp_path / "a.safetensors", theirs.state_dict(), theirs.metadata)
    assert create_model(f"peer:{name}", weights=tmp_path / "a.safetensors").metadata.num_classes == 7
    with pytest.warns(UserWarning, match="the last layer is new"):
        ours = create_model(f"peer:{name}", weights=tmp_path / "a.safetensors", num_classes=3)
    same = [key for key, value in theirs.state_dict().items() if torch.equal(value, ours.state_dict()[key])]
    assert len(theirs.state_dict()) - len(same) == 2


def test_windows_follow_the_size_that_is_asked_for():
    torch.manual_seed(0)
    model = fill(create_model("timm:swin_tiny_patch4_window7_224", num_classes=4))
    with pytest.raises(UserError, match="takes images of 224 x 224 pixels as it is, and not of 256 x 256"):
        model(torch.zeros(1, 3, 256, 256))
    other = of_size(model, 256).eval()
    assert other(torch.zeros(1, 3, 256, 256)).shape == (1, 4)
    assert other.metadata.preprocess.image_size == 256
    assert of_size(model, 224) is model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [("timm:twins_svt_small", "fp32"), ("timm:pvt_v2_b0", "int8")], ids=["windows", "places"]
)
def test_what_leaves_no_size_open_is_exported_for_one(name, precision, tmp_path):
    """Twins' attention has five axes; in int8 PVT's maps have a range a place."""
    model = fill(create_model(name, num_classes=5))
    images = real_images() * 3 if precision == "int8" else None
    told = export(
        model, tmp_path / "m.xml", image_size=64, precision=precision, calibration=images, max_drop=None
    )  # fmt: skip
    assert "the sides are fixed" in told.notes[0]
    session = open_session(tmp_path / "m.xml", device="cpu", threads=1)
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    assert session(x).shape == (2, 5)


@pytest.mark.slow
def test_a_network_of_one_size_takes_images_of_any_with_preprocessing_inside(tmp_path):
    model = fill(create_model("timm:deit_tiny_patch16_224", num_classes=5))
    export(model, tmp_path / "m.onnx", preprocess=True)
    session = open_session(tmp_path / "m.onnx", device="cpu", threads=1)
    images = np.random.default_rng(0).integers(0, 255, (1, 90, 120, 3), np.uint8)
    assert session(images).shape == (1, 5)


def test_tables_of_positions_are_drawn_anew_before_anything_is_learnt_and_else_refused():
    model = fill(create_model("timm:deit_tiny_patch16_224", num_classes=5)).eval()
    with pytest.raises(UserError, match="tables of positions for 224 pixels; it is used at that size, and not at 64"):
        of_size(model, 64)
    other = of_size(model, 64, fresh=True)
    assert other.metadata.preprocess.image_size == 64
    assert other(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    ours, theirs = model.state_dict(), other.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == ["body.pos_embed"]


def test_tables_that_are_interpolated_at_every_call_are_made_once_for_a_size(tmp_path):
    model = create_model("peer:cmt_tiny", num_classes=5).eval()
    other = of_size(model, 96)
    images = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(other(images), model(images))
    assert [stage.bias.shape[1] for stage in other.body.stages] == [24 * 24, 12 * 12, 36, 9]
    assert other.metadata.preprocess.image_size == 96
    assert model.metadata.preprocess.image_size == 160
    assert model.body.stages[0].bias.shape[1] == 40 * 40
    save_weights(tmp_path / "m.safetensors", other.state_dict(), other.metadata)  # as it is after training at that size
    with torch.inference_mode():
        torch.testing.assert_close(open_checkpoint(tmp_path / "m.safetensors").eval()(images), other(images))


def test_a_table_of_positions_that_cannot_follow_is_told():
    with pytest.raises(UserError, match="has tables of positions for 224 pixels"):
        of_size(create_model("timm:deit_tiny_patch16_224"), 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("resnet18", ".onnx"), *(("swin_tiny_patch4_window7_224", suffix) for suffix in (".onnx", ".xml", ".pt2"))],
)
def test_a_file_of_it_answers_as_it_does_and_says_what_is_fixed(name, suffix, tmp_path):
    model = fill(create_model(f"timm:{name}", num_classes=5))
    report = export(model, tmp_path / f"m{suffix}", dynamic=True)
    fixed = any("the sides are fixed" in note for note in report.notes)
    assert fixed == name.startswith("swin")
    session = open_session(tmp_path / f"m{suffix}", device="cpu", threads=1, trust=True)
    side = model.metadata.preprocess.image_size
    images = np.random.default_rng(0).standard_normal((4, 3, side, side), np.float32)
    found = torch.from_numpy(np.concatenate([session(image[None]) for image in images]))
    with torch.no_grad():
        assert relative_error(found, model(torch.from_numpy(images))) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:resnet10t", "peer:uniformer_small"])
def test_from_a_folder_to_a_file_by_the_command_line(name, garment_folder, tmp_path):
    small = ["--epochs", 1, "--image-size", 32, "--batch-size", 4, "--set", "schedule.steps_per_epoch=2"]
    run = tmp_path / "run"
    weights, file = run / "model.safetensors", run / "m.onnx"
    for arguments in (
        ["train", garment_folder, "--model", name, "--weights", "none", *small, "--output", run],
        ["info", weights],
        ["eval", weights, garment_folder],
        ["export", weights, "--to", "onnx", "--output", file],
        ["benchmark", weights, file, "--rounds", 8],
    ):
        done = nextvit_here(*arguments)
        assert done.returncode == 0, done.stderr
        assert arguments[0] != "info" or name in done.stdout


@pytest.mark.parametrize("name", ["timm:resnet10t", "peer:trt_vit_c"])
def test_info_tells_of_it_before_anything_is_made_of_it(name):
    done = nextvit_here("info", name)
    assert done.returncode == 0
    assert name in done.stdout
    assert ("reconstruction" in done.stdout) == name.startswith("peer")
