"""Semantic segmentation networks: the published layout, the check values, and plain re-computations of the heads."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nextvit
from nextvit import class_names
from nextvit.cost import cost
from nextvit.create import create_model, open_checkpoint
from nextvit.errors import UserError
from nextvit.heads.fpn import FPN
from nextvit.heads.upernet import FCNHead, GridPool
from nextvit.segmenter import IGNORED, pixel_loss
from nextvit.weights import save_weights
from tests.conftest import fill, uniform

PUBLISHED = [(size, head) for size in ("small", "base", "large") for head in ("fpn", "upernet")]
UNUSED = 1_025_000 + 2 * 1024  # parameters of the classifier and of the fourth norm, in the published files
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(prefix, width):
    return {f"{prefix}.{entry}": () if entry == "num_batches_tracked" else (width,) for entry in BN}


def unit(prefix, *shape):
    return {f"{prefix}.conv.weight": shape, **norm(f"{prefix}.bn", shape[0])}


def layer(prefix, *shape):
    return {f"{prefix}.weight": shape, f"{prefix}.bias": (shape[0],)}


def published_head(head):
    """Names and shapes beside the backbone's, in the order of the file."""
    widths = (96, 256, 512, 1024)
    if head == "fpn":
        found = {}
        for i in range(4):
            found |= layer(f"neck.lateral_convs.{i}.conv", 256, widths[i], 1, 1)
        for i in range(4):
            found |= layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
        found |= layer("decode_head.conv_seg", 150, 128, 1, 1)
        for place, c_in in (
            ("0.0", 256),
            ("1.0", 256),
            ("2.0", 256),
            ("2.2", 128),
            ("3.0", 256),
            ("3.2", 128),
            ("3.4", 128),
        ):
            found |= unit(f"decode_head.scale_heads.{place}", 128, c_in, 3, 3)
        return found
    found = layer("decode_head.conv_seg", 150, 512, 1, 1)
    for i in range(4):
        found |= unit(f"decode_head.psp_modules.{i}.1", 512, 1024, 1, 1)
    found |= unit("decode_head.bottleneck", 512, 3072, 3, 3)
    for i in range(3):
        found |= unit(f"decode_head.lateral_convs.{i}", 512, widths[i], 1, 1)
    for i in range(3):
        found |= unit(f"decode_head.fpn_convs.{i}", 512, 512, 3, 3)
    found |= unit("decode_head.fpn_bottleneck", 512, 2048, 3, 3)
    return found | layer("auxiliary_head.conv_seg", 150, 256, 1, 1) | unit("auxiliary_head.convs.0", 256, 512, 3, 3)


def published(model):
    """The network's tensors under the names of the released files, the entries that nothing reads included."""
    depths, named = model.backbone.variant.depths, {}

    def through_all_stages(match):
        return f"backbone.features.{sum(depths[: int(match[1])]) + int(match[2])}"

    for key, tensor in model.state_dict().items():
        key = re.sub(r"^backbone\.stages\.(\d)\.blocks\.(\d+)", through_all_stages, key)
        key = re.sub(r"\.mlp\.fc([12])\.", r".mlp.conv\1.", key)
        named[key.replace("backbone.stage_norms.", "backbone.extra_norm_list.")] = tensor.clone()
    for entry, tensor in torch.nn.BatchNorm2d(model.backbone.widths[-1]).state_dict().items():
        named[f"backbone.extra_norm_list.3.{entry}"] = tensor
    return named | {
        "backbone.proj_head.0.weight": torch.ones(1000, 1024),
        "backbone.proj_head.0.bias": torch.ones(1000),
    }


def filled(name, head, task="segment"):
    """Every entry a function of its place in the published file, as the reference's check values were made."""
    model = create_model(name, task=task, head=head)
    places = {f"backbone.{key}": k for k, key in enumerate(create_model(name).state_dict())}
    places |= {f"backbone.stage_norms.{q}.{e}": 200_000 + 10 * q + p for q in range(3) for p, e in enumerate(BN[:4])}
    rest = [key for key in model.state_dict() if not key.startswith("backbone.")]
    places |= {key: 300_000 + k for k, key in enumerate(rest)}
    for key, entry in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            fill(_One(key, entry), places[key])
    return model.eval()


class _One:
    """A state dict of one entry."""

    def __init__(self, key, entry):
        self.key, self.entry = key, entry

    def state_dict(self):
        return {self.key: self.entry}

    def eval(self):
        return self


@pytest.mark.parametrize(("size", "head"), PUBLISHED)
def test_names_shapes_and_parameters_are_those_of_the_published_files(size, head):
    with torch.device("meta"):
        model = create_model(f"nextvit_{size}", task="segment", head=head)
    named = published(model)
    beside = {key: tuple(t.shape) for key, t in named.items() if not key.startswith("backbone.")}
    assert list(beside.items()) == list(published_head(head).items())
    entries = {"fpn": 552, "upernet": 574}[head] + {"small": 0, "base": 220, "large": 440}[size]
    assert len(named) == entries
    params = {"fpn": (36_254_974, 49_310_462, 62_365_950), "upernet": (66_285_460, 79_340_948, 92_396_436)}[head]
    expected = dict(zip(("small", "base", "large"), params, strict=True))[size]
    assert sum(p.numel() for p in model.parameters()) + UNUSED == expected


@pytest.mark.parametrize(("size", "head"), PUBLISHED)
def test_operations_are_the_papers(size, head):
    printed = {"fpn": (208.09, 259.72, 311.36), "upernet": (968.38, 1020.01, 1071.6)}[head]
    expected = dict(zip(("small", "base", "large"), printed, strict=True))[size]
    with torch.device("meta"):
        model = create_model(f"nextvit_{size}", task="segment", head=head)
    counted = cost(model, 512, 2048)
    assert counted.gflops_paper == pytest.approx(expected, rel=0.002)


CHECKS = {  # of the reference: shape, mean, mean absolute, first, last
    "neck 0": ((256, 49, 41), 0.05696795, 0.60862482, -0.59273595, 0.54318978),
    "neck 1": ((256, 25, 21), -0.01705631, 0.58003630, 0.11121504, -0.13023720),
    "neck 2": ((256, 13, 11), 0.00481931, 0.57928677, 0.08404974, -0.34620642),
    "neck 3": ((256, 7, 6), -0.01501980, 0.40685548, -0.94067868, -0.61835277),
    "fpn": ((150, 49, 41), 0.04568539, 0.41653078, 0.04206963, -0.03444160),
    "fpn at input size": ((150, 193, 161), 0.04568628, 0.41576886, 0.04206963, -0.03444160),
    "upernet": ((150, 49, 41), 0.00268854, 0.14596199, 0.15912918, -0.00657131),
    "auxiliary": ((150, 13, 11), -0.01899400, 0.29547684, 0.11004005, 0.08314462),
    "upernet at input size": ((150, 193, 161), 0.00268865, 0.14569644, 0.15912918, -0.00657131),
}
COUNTS = {"fpn": {115: 12344, 61: 8045, 68: 5283}, "upernet": {66: 22799, 91: 2606, 143: 2074}}


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_outputs_are_the_references(head):
    model = filled("nextvit_small", head).double()
    image = torch.from_numpy(4 * uniform(100_000, 3 * 193 * 161)).reshape(1, 3, 193, 161)
    with torch.no_grad():
        maps = model.backbone(image)
        found = {f"neck {i}": x for i, x in enumerate(model.neck(maps))} if head == "fpn" else {}
        if head == "upernet":
            found["auxiliary"] = model.auxiliary_head(maps[2])
        found[head] = model(image)
        found[f"{head} at input size"] = F.interpolate(found[head], (193, 161), mode="bilinear", align_corners=False)
    for name, value in found.items():
        shape, *numbers = CHECKS[name]
        assert tuple(value.shape[1:]) == shape, name
        ours = (value.mean(), value.abs().mean(), value.flatten()[0], value.flatten()[-1])
        np.testing.assert_allclose([float(v) for v in ours], numbers, atol=2e-8, err_msg=name)
    labels, counts = found[f"{head} at input size"].argmax(1).unique(return_counts=True)
    largest = dict(sorted(zip(labels.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])[:3])
    assert largest == COUNTS[head]


@pytest.mark.parametrize("head", ["fpn", "upernet"])
@pytest.mark.parametrize(("unused", "prefix"), [(True, ""), (False, "module.")])
def test_a_published_file_loads_as_what_it_is(head, unused, prefix, tmp_path):
    model = filled("nextvit_nano", head)
    named = {k: t for k, t in published(model).items() if unused or ("proj_head" not in k and "list.3" not in k)}
    torch.save(
        {"meta": {"CLASSES": ("a",)}, "state_dict": {prefix + k: t for k, t in named.items()}}, tmp_path / "a.pth"
    )
    with torch.no_grad():
        image = torch.randn(1, 3, 64, 96)
        expected = model(image)
        for loaded in (
            create_model("nextvit_nano", task="segment", head=head, weights=tmp_path / "a.pth"),
            open_checkpoint(tmp_path / "a.pth"),
        ):
            assert loaded.metadata.labels == class_names.ade20k()
            assert loaded.metadata.head == head
            torch.testing.assert_close(loaded.eval()(image), expected, rtol=0, atol=0)


def test_a_published_file_that_lacks_the_final_norm_is_refused(tmp_path):
    named = {
        k: t for k, t in published(create_model("nextvit_nano", task="segment")).items() if "backbone.norm." not in k
    }
    torch.save({"state_dict": named}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"missing \(backbone\.norm\.bias"):
        create_model("nextvit_nano", task="segment", weights=tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("task", "head"), [("classify", None), ("segment", "upernet")], ids=["another task", "another head"]
)
def test_weights_of_another_task_or_head_are_refused(task, head, tmp_path):
    model = create_model("nextvit_nano", task="segment", num_classes=3)
    save_weights(tmp_path / "a.safetensors", model.state_dict(), model.metadata)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="task 'segment' with head 'fpn'"):
        create_model("nextvit_nano", task=task, head=head, weights=tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no Next-ViT in a layout|does not fit"):
        create_model("nextvit_nano", task=task, head=head, weights=tmp_path / "a.pth")


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_a_classifier_gives_its_backbone_and_a_warning(head, tmp_path):
    classifier = fill(create_model("nextvit_nano", num_classes=7))
    save_weights(tmp_path / "a.safetensors", classifier.state_dict(), classifier.metadata)
    with pytest.warns(UserWarning, match="a backbone alone: neck and head are new"):
        model = create_model(
            "nextvit_nano", task="segment", head=head, num_classes=5, weights=tmp_path / "a.safetensors"
        )
    for key, tensor in classifier.state_dict().items():
        if not key.startswith("head."):
            torch.testing.assert_close(model.state_dict()[f"backbone.{key}"], tensor, rtol=0, atol=0)
    assert model.metadata.num_classes == 5
    torch.save(classifier.state_dict(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="a backbone alone"):
        model = create_model("nextvit_nano", task="segment", head=head, weights=tmp_path / "a.pth")
    assert (model.metadata.num_classes, model.metadata.labels) == (150, ())  # nobody trained it on ADE20K


def test_other_classes_make_the_last_layers_new_and_say_so(tmp_path):
    model = filled("nextvit_nano", "upernet")
    save_weights(tmp_path / "a.safetensors", model.state_dict(), model.metadata)
    with pytest.warns(UserWarning, match="150 classes, 4 were asked for: the last layer is new") as told:
        found = create_model(
            "nextvit_nano", task="segment", head="upernet", num_classes=4, weights=tmp_path / "a.safetensors"
        )
    assert len(told) == 1
    kept = model.state_dict()
    new = {key for key, tensor in found.state_dict().items() if not torch.equal(tensor, kept[key])}
    heads = ("decode_head", "auxiliary_head")
    assert new == {f"{head}.conv_seg.{kind}" for head in heads for kind in ("weight", "bias")}
    assert found(torch.randn(2, 3, 64, 64)).shape == (2, 4, 16, 16)


def test_features_come_after_the_norms_that_heads_read():
    model = filled("nextvit_nano", "fpn")
    with torch.no_grad():
        image = torch.randn(1, 3, 65, 80)
        maps, x = [], model.backbone.stem(image)
        for stage, own in zip(model.backbone.stages, [*model.backbone.stage_norms, model.backbone.norm], strict=True):
            assert isinstance(own, torch.nn.BatchNorm2d)
            x = own(stage(x))
            maps.append(x)
        for found, expected in zip(model.backbone(image), maps, strict=True):
            torch.testing.assert_close(found, expected)
    alone = create_model("nextvit_nano", task="segment", features_only=True)
    assert [tuple(x.shape[1:]) for x in alone(image)] == [tuple(x.shape[1:]) for x in maps]
    assert alone.state_dict().keys() == model.backbone.state_dict().keys()


def test_the_loss_is_the_mean_over_all_pixels_and_the_auxiliary_one_counts_for_less():
    model = fill(create_model("nextvit_nano", task="segment", head="upernet", num_classes=4))
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    labels[:, :20] = IGNORED
    losses = model(images, labels)
    logits = F.interpolate(model(images), (64, 64), mode="bilinear", align_corners=False)
    each = -logits.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0] * (labels != IGNORED)
    torch.testing.assert_close(losses["loss_decode"], each.sum() / (2 * 64 * 64))
    auxiliary = pixel_loss(model.auxiliary_head(model.backbone(images)[2]), labels)
    torch.testing.assert_close(losses["loss_auxiliary"], 0.4 * auxiliary)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (7, 6), (16, 64), (13, 11)])
def test_grid_pooling_is_adaptive_average_pooling(cells, sides):
    x = torch.randn(2, 3, *sides, dtype=torch.float64)
    torch.testing.assert_close(GridPool(cells)(x), F.adaptive_avg_pool2d(x, cells), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fpn"),
        pytest.param("resnet18", "upernet", marks=pytest.mark.slow),
        pytest.param("convnext_atto", "fpn", marks=pytest.mark.slow),
        ("swin_tiny_patch4_window7_224", "fpn"),
        pytest.param("mobilenetv3_small_050", "fpn", marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm_are_backbones_and_take_their_classifiers_weights(name, head, tmp_path):
    import timm

    classifier = timm.create_model(name)
    torch.save(classifier.state_dict(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="a backbone alone"):
        model = create_model(
            f"timm:{name}", task="segment", head=head, num_classes=3, weights=tmp_path / "a.pth"
        ).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert model(image).shape == (1, 3, 56, 56)
        coarsest = model.backbone(image)[3]
        theirs = classifier.eval().forward_features(image)
    theirs = theirs.permute(0, 3, 1, 2) if theirs.shape[1] != coarsest.shape[1] and name.startswith("swin") else theirs
    if name in ("resnet18", "convnext_atto"):  # others go on behind their last map
        torch.testing.assert_close(coarsest, theirs)
    save_weights(tmp_path / "b.safetensors", model.state_dict(), model.metadata)
    torch.testing.assert_close(open_checkpoint(tmp_path / "b.safetensors").eval()(image), model(image))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "timm:vit_tiny_patch16_224", "task": "segment"}, "no maps at strides 4, 8, 16, 32"),
        ({"name": "timm:resnet_none", "task": "segment"}, "timm has no network 'resnet_none'"),
        ({"name": "nextvit_nano", "task": "paint"}, "there is no task 'paint'; take one of classify, segment"),
        ({"name": "nextvit_nano", "task": "segment", "head": "mask_rcnn"}, "no head 'mask_rcnn'; it has fpn, upernet"),
        ({"name": "nextvit_nano", "head": "fpn"}, "task 'classify' has no head 'fpn'"),
        ({"name": "timm:resnet18", "task": "segment", "drop_path_rate": 0.1}, "are Next-ViT's"),
    ],
)
def test_what_cannot_be_built_is_told(arguments, told):
    with pytest.raises(UserError, match=told):
        nextvit.create_model(**arguments)


def test_stochastic_depth_is_the_tasks_own():
    rates = {task: create_model("nextvit_small", task=task) for task in ("classify", "segment")}
    assert rates["classify"].stages[3].blocks[-1].drop_path.rate == pytest.approx(0.1)
    assert rates["segment"].backbone.stages[3].blocks[-1].drop_path.rate == pytest.approx(0.2)


def filled_head(head, widths):
    model = create_model("timm:resnet18", task="segment", head=head, num_classes=7)
    module = type(model.decode_head)(widths, 7) if head == "upernet" else model.decode_head
    return fill(module).double()


def maps_of(widths, sides=((33, 41), (17, 21), (9, 11), (5, 6))):
    return [torch.randn(2, width, *side, dtype=torch.float64) for width, side in zip(widths, sides, strict=True)]


def test_upernet_is_that_of_transformers():
    from transformers import ResNetConfig, UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    widths = (12, 20, 28, 36)
    config = UperNetConfig(
        backbone_config=ResNetConfig(),
        hidden_size=512,
        num_labels=7,
        auxiliary_in_channels=28,
        auxiliary_channels=256,
        auxiliary_num_convs=1,
    )
    for ours, theirs, give in (
        (filled_head("upernet", widths), UperNetHead(config, widths), lambda maps: maps),
        (fill(FCNHead(28, 7)).double(), UperNetFCNHead(config, list(widths)), lambda maps: maps[2]),
    ):
        tensors = {
            key.replace(".bn.", ".batch_norm.").replace("conv_seg.", "classifier."): tensor
            for key, tensor in ours.state_dict().items()
        }
        theirs.double().eval().load_state_dict(tensors)
        maps = maps_of(widths)
        with torch.no_grad():
            torch.testing.assert_close(ours(give(maps)), theirs(maps), rtol=1e-9, atol=1e-9)


def test_the_pyramid_is_that_of_torchvision():
    from torchvision.ops import FeaturePyramidNetwork

    widths = (12, 20, 28, 36)
    ours, theirs = fill(FPN(widths)).double(), FeaturePyramidNetwork(list(widths), 256).double()
    names = {"lateral_convs": "inner_blocks", "fpn_convs": "layer_blocks"}
    tensors = {
        re.sub(r"^(\w+)\.(\d)\.conv", lambda m: f"{names[m[1]]}.{m[2]}.0", key): tensor
        for key, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(tensors)
    maps = maps_of(widths)
    with torch.no_grad():
        expected = theirs({str(i): x for i, x in enumerate(maps)})
        for found, level in zip(ours(maps), expected.values(), strict=True):
            torch.testing.assert_close(found, level, rtol=1e-9, atol=1e-9)


def test_semantic_fpn_is_its_plain_recomputation():
    head = filled_head("fpn", None)
    t = head.state_dict()
    maps = maps_of((256,) * 4)

    def convolve(x, name):
        x = F.conv2d(x, t[f"{name}.conv.weight"], padding=1)
        mean, var = t[f"{name}.bn.running_mean"], t[f"{name}.bn.running_var"]
        return F.relu(F.batch_norm(x, mean, var, t[f"{name}.bn.weight"], t[f"{name}.bn.bias"], eps=1e-5))

    def enlarge(x, height, width):
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)

    total = convolve(maps[0], "scale_heads.0.0")
    for level in (1, 2, 3):
        x = maps[level]
        for place in range(level):
            x = convolve(x, f"scale_heads.{level}.{2 * place}")
            x = enlarge(x, 2 * x.shape[2], 2 * x.shape[3])
        total = total + enlarge(x, 33, 41)
    expected = F.conv2d(total, t["conv_seg.weight"], t["conv_seg.bias"])
    with torch.no_grad():
        torch.testing.assert_close(head(maps), expected, rtol=1e-9, atol=1e-9)
