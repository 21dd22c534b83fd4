"""Mask R-CNN: the published layout, the check values, torchvision's on the same features, and each convention alone."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align

import nextvit
from nextvit import class_names
from nextvit.cost import cost
from nextvit.create import create_model, open_checkpoint
from nextvit.detector import rpn_losses
from nextvit.heads.boxes import (
    ROI_MATCHING,
    RPN_MATCHING,
    Matching,
    Sampling,
    anchors,
    decoded,
    encoded,
    mask_targets,
    matched,
    overlaps,
    pooled,
    sampled,
    suppressed,
)
from nextvit.heads.mask_rcnn import anchors_of
from nextvit.weights import save_weights
from tests.conftest import uniform
from tests.detectors import lively, noise
from tests.test_segmenter import filled, layer, published

SIZES = ("small", "base", "large")
UNUSED = 1_025_000 + 2 * 1024  # parameters of the classifier and of the last norm, in the published files
FROZEN = 361_024  # of the stem and the first stage


# ---- the published layout --------------------------------------------------------------------------------------------


def published_heads() -> dict[str, tuple[int, ...]]:
    """Names and shapes beside the backbone's, in the order of the file."""
    found = {}
    for i, width in enumerate((96, 256, 512, 1024)):
        found |= layer(f"neck.lateral_convs.{i}.conv", 256, width, 1, 1)
    for i in range(4):
        found |= layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    found |= layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    found |= layer("rpn_head.rpn_cls", 3, 256, 1, 1) | layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    found |= layer("roi_head.bbox_head.fc_cls", 81, 1024) | layer("roi_head.bbox_head.fc_reg", 320, 1024)
    found |= layer("roi_head.bbox_head.shared_fcs.0", 1024, 12544)
    found |= layer("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
    for i in range(4):
        found |= layer(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3)
    found |= layer("roi_head.mask_head.upsample", 256, 256, 2, 2)
    return found | layer("roi_head.mask_head.conv_logits", 80, 256, 1, 1)


@pytest.mark.parametrize("size", SIZES)
def test_names_shapes_and_parameters_are_those_of_the_published_files(size):
    with torch.device("meta"):
        model = create_model(f"nextvit_{size}", task="detect")
    state = model.state_dict()
    beside = {key: tuple(t.shape) for key, t in state.items() if not key.startswith("backbone.")}
    assert list(beside.items()) == list(published_heads().items())
    assert len(state) == 507 + {"small": 0, "base": 220, "large": 440}[size]
    whole = dict(zip(SIZES, (52_151_960, 65_207_448, 78_262_936), strict=True))[size]
    assert sum(p.numel() for p in model.parameters()) + UNUSED == whole
    early = (model.backbone.stem, model.backbone.stages[0])
    assert sum(p.numel() for part in early for p in part.parameters()) == FROZEN


@pytest.mark.parametrize(("size", "expected"), zip(SIZES, (289.93, 340.43, 390.92), strict=True))
def test_operations_are_the_papers(size, expected):
    with torch.device("meta"):
        model = create_model(f"nextvit_{size}", task="detect")
    assert cost(model, 800, 1280).gflops_paper == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("unused", [True, False])
def test_a_published_file_gives_its_network(prefix, unused, tmp_path):
    model = lively("nextvit_nano")
    tensors = published(model)
    tensors = {key: t for key, t in tensors.items() if "extra_norm_list" not in key}
    tensors |= {f"backbone.norm.{key}": t for key, t in nn.BatchNorm2d(model.backbone.widths[-1]).state_dict().items()}
    if not unused:
        tensors = {k: t for k, t in tensors.items() if not k.startswith(("backbone.norm.", "backbone.proj_head."))}
    file = tmp_path / "mask_rcnn.pth"
    torch.save({"state_dict": {prefix + key: t for key, t in tensors.items()}, "meta": {"epoch": 12}}, file)
    for found in (create_model("nextvit_nano", task="detect", weights=file), open_checkpoint(file)):
        assert found.metadata.labels == class_names.coco()
        assert (found.metadata.labels[0], found.metadata.labels[79]) == ("person", "toothbrush")
        same = found.state_dict()
        assert all(torch.equal(t, same[key]) for key, t in model.state_dict().items())


def test_the_networks_own_file_comes_back_and_another_class_count_is_told(tmp_path):
    model = lively("nextvit_nano", classes=5)
    save_weights(tmp_path / "m.safetensors", model.state_dict(), model.metadata)
    found = open_checkpoint(tmp_path / "m.safetensors").eval()
    assert (found.metadata.task, found.metadata.head, found.metadata.num_classes) == ("detect", "mask_rcnn", 5)
    image = noise((96, 128))
    with torch.inference_mode():
        for ours, theirs in zip(found(image)[0].values(), model(image)[0].values(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.warns(UserWarning, match="5 classes, 7 were asked for"):
        other = create_model("nextvit_nano", task="detect", weights=tmp_path / "m.safetensors", num_classes=7)
    assert other.roi_head.bbox_head.fc_reg.weight.shape == (28, 1024)
    assert torch.equal(other.rpn_head.rpn_cls.weight, model.rpn_head.rpn_cls.weight)


def test_a_classifier_gives_its_backbone(tmp_path):
    classifier = create_model("nextvit_nano", num_classes=10)
    save_weights(tmp_path / "c.safetensors", classifier.state_dict(), classifier.metadata)
    with pytest.warns(UserWarning, match="neck and head are new"):
        model = create_model("nextvit_nano", task="detect", weights=tmp_path / "c.safetensors", num_classes=10)
    state = model.backbone.state_dict()
    assert all(torch.equal(t, classifier.state_dict()[key]) for key, t in state.items())


def test_any_backbone_of_timm_with_four_maps_will_do():
    model = create_model("timm:resnet18", task="detect", num_classes=3).eval()
    with torch.inference_mode():
        (found,) = model(noise((96, 128)))
    assert found["boxes"].shape[1:] == (4,)
    assert found["masks"].shape[1:] == (28, 28)


CHECKS = {  # of the reference: shape, mean, mean absolute, first, last
    "neck 0": ((256, 49, 41), 0.03368327, 0.47849208, -0.12748109, 0.37763296),
    "neck 1": ((256, 25, 21), -0.01048241, 0.46644721, 0.25978134, -0.19837758),
    "neck 2": ((256, 13, 11), 0.01399751, 0.41789550, 0.28347293, -0.45391056),
    "neck 3": ((256, 7, 6), -0.00955852, 0.29234758, -0.63635173, -0.37878359),
    "neck 4": ((256, 4, 3), -0.01196456, 0.28471254, -0.63635173, -0.31628950),
    "scores 0": ((3, 49, 41), 0.14072186, 0.14426471, 0.00190738, -0.11357091),
    "deltas 0": ((12, 49, 41), -0.01829079, 0.13180355, 0.00254362, 0.19039891),
    "scores 4": ((3, 4, 3), 0.07579345, 0.08922709, 0.03595033, 0.10448482),
    "deltas 4": ((12, 4, 3), -0.03251981, 0.09005661, 0.11534415, 0.08261637),
    "class scores": ((2, 81), 0.00035110, 0.16016278, 0.09237136, -0.24618684),
    "box deltas": ((2, 320), -0.00760298, 0.16000480, -0.11439005, -0.13745098),
    "masks": ((2, 80, 28, 28), 0.01473825, 0.06045109, 0.13680810, 0.00792591),
}


def test_the_check_values_come_out():
    model = filled("nextvit_small", "mask_rcnn", task="detect").double()
    found = {}
    with torch.inference_mode():
        maps = model.neck(model.backbone(_input(100_000, 1, 3, 193, 161)))
        scores, deltas = model.rpn_head(maps)
        boxes, masks = model.roi_head.bbox_head, model.roi_head.mask_head
        logits, shifts = boxes(_input(400_000, 2, 256, 7, 7))
        found |= {f"neck {i}": x[0] for i, x in enumerate(maps)}
        for i in (0, 4):
            grid = maps[i].shape[2:]
            found[f"scores {i}"] = scores[i].view(*grid, 3).permute(2, 0, 1)
            found[f"deltas {i}"] = deltas[i].view(*grid, 12).permute(2, 0, 1)
        found |= {
            "class scores": logits,
            "box deltas": shifts.flatten(1),
            "masks": masks(_input(400_001, 2, 256, 14, 14)),
        }
    for name, (shape, mean, size, first, last) in CHECKS.items():
        x = found[name]
        assert tuple(x.shape) == shape, name
        values = [float(v) for v in (x.mean(), x.abs().mean(), x.flatten()[0], x.flatten()[-1])]
        assert values == pytest.approx([mean, size, first, last], abs=2e-8), name


def _input(key: int, *shape: int) -> Tensor:
    return torch.from_numpy(4 * uniform(key, math.prod(shape)).reshape(shape)).float().double()


def test_anchors_are_floats_about_the_corner_of_their_place():
    like = torch.zeros((), dtype=torch.float64)
    first = [[-22.627417, -11.313708, 22.627417, 11.313708], [-16, -16, 16, 16]]
    assert anchors(49, 41, 4, like)[:2].tolist() == [pytest.approx(row, abs=1e-6) for row in first]
    last = [10.980667, -234.038666, 373.019348, 490.038666]
    assert anchors(3, 4, 64, like)[-1].tolist() == pytest.approx(last, abs=2e-5), "given in float32"
    boxes = anchors(2, 3, 8, like).view(2, 3, 3, 4)
    assert (boxes[1, 2] - boxes[0, 0] == torch.tensor([16.0, 8, 16, 8])).all(), "row, column, ratio"
    assert (boxes[0, 1] - boxes[0, 0] == torch.tensor([8.0, 0, 8, 0])).all()


# ---- torchvision's Mask R-CNN on the same features -------------------------------------------------------------------


class OfficialAnchors(nn.Module):
    """Where torchvision rounds corners and derives strides from sizes, written out place by place."""

    def num_anchors_per_location(self):
        return [3] * 5

    def forward(self, images, maps):
        boxes = []
        for x, stride in zip(maps, (4, 8, 16, 32, 64), strict=True):
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    for ratio in (0.5, 1.0, 2.0):
                        w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                        cx, cy = column * stride, row * stride
                        boxes.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        return [torch.tensor(boxes)] * len(images.tensors)


class AlignedPool(MultiScaleRoIAlign):
    """torchvision's own, which rounds nothing else, with aligned corners and as many samples as a box needs."""

    def forward(self, maps, boxes, image_shapes):
        x = [maps[str(i)] for i in range(4)]
        whole = torch.cat(boxes)
        levels = torch.floor(2 + torch.log2((whole[:, 2:] - whole[:, :2]).prod(1).sqrt() / 224) + 1e-6).clamp(0, 3)
        rois = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(boxes)])
        out = torch.zeros(len(rois), 256, *self.output_size)
        for level in range(4):
            here = levels == level
            out[here] = roi_align(x[level], rois[here], self.output_size, 1 / 4 / 2**level, 0, True)
        return out


def theirs(model: nn.Module) -> tuple[RegionProposalNetwork, RoIHeads]:
    """torchvision's parts with our weights, by the table of names of the published layout."""
    state, classes = model.state_dict(), model.metadata.num_classes
    head = RPNHead(256, 3)
    _take(
        head,
        state,
        {"conv.0.0": "rpn_head.rpn_conv", "cls_logits": "rpn_head.rpn_cls", "bbox_pred": "rpn_head.rpn_reg"},
    )
    most = dict(training=1000, testing=1000)
    rpn = RegionProposalNetwork(OfficialAnchors(), head, 0.7, 0.3, 256, 0.5, most, most, 0.7)
    boxes, predictor = TwoMLPHead(256 * 49, 1024), FastRCNNPredictor(1024, classes + 1)
    _take(boxes, state, {f"fc{6 + i}": f"roi_head.bbox_head.shared_fcs.{i}" for i in range(2)})
    scores = {k: state[f"roi_head.bbox_head.fc_cls.{k}"] for k in ("weight", "bias")}
    deltas = {k: state[f"roi_head.bbox_head.fc_reg.{k}"] for k in ("weight", "bias")}
    predictor.cls_score.load_state_dict({k: torch.cat([t[-1:], t[:-1]]) for k, t in scores.items()})
    predictor.bbox_pred.load_state_dict({k: torch.cat([torch.zeros_like(t[:4]), t]) for k, t in deltas.items()})
    masks, mask_predictor = MaskRCNNHeads(256, (256,) * 4, 1), MaskRCNNPredictor(256, 256, classes + 1)
    _take(masks, state, {f"{i}.0": f"roi_head.mask_head.convs.{i}.conv" for i in range(4)})
    _take(mask_predictor, state, {"conv5_mask": "roi_head.mask_head.upsample"}, strict=False)
    last = {k: state[f"roi_head.mask_head.conv_logits.{k}"] for k in ("weight", "bias")}
    mask_predictor.mask_fcn_logits.load_state_dict(
        {k: torch.cat([torch.zeros_like(t[:1]), t]) for k, t in last.items()}
    )
    names = ["0", "1", "2", "3"]
    heads = RoIHeads(
        AlignedPool(names, 7, 0), boxes, predictor, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100,
        AlignedPool(names, 14, 0), masks, mask_predictor,
    )  # fmt: skip
    return rpn.eval(), heads.eval()


def _take(module, state, names, strict=True):
    found = {f"{own}.{kind}": state[f"{name}.{kind}"] for own, name in names.items() for kind in ("weight", "bias")}
    module.load_state_dict(found, strict=strict)


@pytest.mark.parametrize("size", [(193, 161), (256, 320)])
def test_detections_are_torchvisions_given_the_same_features_and_weights(size):
    model, images = lively(), noise(size, batch=2)
    rpn, heads = theirs(model)
    with torch.inference_mode():
        found = model(images)
        maps = OrderedDict((str(i), x) for i, x in enumerate(model.neck(model.backbone(images))))
        places, _ = rpn(ImageList(images, [size, size]), maps)
        expected, _ = heads(maps, places, [size, size])
    for ours, other in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == len(other["boxes"]) == 100
        assert len(other["labels"].unique()) > 8
        pairs = overlaps(ours["boxes"], other["boxes"]) * (ours["labels"][:, None] == other["labels"][None] - 1)
        value, index = pairs.max(dim=1)
        assert (value > 0.999).float().mean() >= 0.99, "one of a hundred may swap with an equal one"
        near = value > 0.999
        assert float((ours["scores"] - other["scores"][index]).abs()[near].max()) < 1e-4
        assert float((ours["masks"] - other["masks"][index, 0]).abs()[near].max()) < 1e-3


# ---- each convention alone -------------------------------------------------------------------------------------------


def test_deltas_are_clipped_on_both_sides_and_boxes_come_back():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (50, 2, 2))
    bases = torch.from_numpy(np.concatenate([corners[:, 0], corners[:, 0] + corners[:, 1] + 1], 1))
    deltas = torch.from_numpy(rng.normal(0, 2, (50, 4)) * [1, 1, 6, 6])
    limit, expected = math.log(1000 / 16), []
    for (x1, y1, x2, y2), (dx, dy, dw, dh) in zip(
        bases.tolist(), (deltas * torch.tensor([0.1, 0.1, 0.2, 0.2])).tolist(), strict=True
    ):
        w = (x2 - x1) * math.exp(min(max(dw, -limit), limit))
        h = (y2 - y1) * math.exp(min(max(dh, -limit), limit))
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        expected.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    found = decoded(bases, deltas, (0.1, 0.1, 0.2, 0.2))
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-6)
    assert decoded(bases[:1], torch.tensor([[0, 0, -99.0, 0]]).double(), (1, 1, 1, 1))[0, 2] > found.new_tensor(
        float(bases[0, 0])
    ), "a box never loses more than 1 / 62.5 of its side"
    small = torch.from_numpy(rng.normal(0, 1, (50, 4)))
    back = encoded(bases, decoded(bases, small, (0.1, 0.1, 0.2, 0.2)), (0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(back, small, rtol=1e-5, atol=1e-5)


def test_suppression_is_within_groups_and_by_score():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 5], [-40, -40, -30, -30.0]])
    scores, groups = torch.tensor([0.5, 0.9, 0.4, 0.8, 0.1]), torch.tensor([0, 0, 1, 0, 0])
    assert suppressed(boxes, scores, groups, 0.5).tolist() == [1, 2, 4], "0.556 with the best falls, 0.5 would stay"
    assert suppressed(boxes, scores, groups, 0.6).tolist() == [1, 3, 2, 4]
    assert suppressed(boxes[:0], scores[:0], groups[:0], 0.5).tolist() == []


def test_boxes_are_pooled_from_the_level_of_their_size_and_empty_ones_give_zeros():
    maps = [torch.full((1, 2, 2048 // s, 2048 // s), float(s)) for s in (4, 8, 16, 32)]
    wanted = {10: 4, 111.9: 4, 112.1: 8, 223.9: 8, 224.1: 16, 447.9: 16, 448.1: 32, 2000: 32}
    rois = torch.tensor([[0, 20, 20, 20 + side, 20 + side] for side in wanted] + [[0, 5, 5, 5, 60], [0, 9, 9, 9, 9.0]])
    found = pooled(maps, rois, 7)
    assert [int(x.max()) for x in found] == [*wanted.values(), 0, 0]
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(1, 1, 32, 32))).float()
    box = torch.tensor([[0, 13.0, 22.0, 97.0, 110.0]])
    plain = _bilinear_average(x[0, 0].numpy(), (box[0, 1:] / 4 - 0.5).tolist(), 7)
    np.testing.assert_allclose(pooled([x], box, 7)[0, 0].numpy(), plain, rtol=1e-4, atol=1e-5)


def _bilinear_average(x: np.ndarray, box: list[float], size: int) -> np.ndarray:
    """RoI align in plain words: each cell is the mean of ceil(cell) samples a side, each between four pixels."""
    x1, y1, x2, y2 = box
    w, h = (x2 - x1) / size, (y2 - y1) / size
    across, down = math.ceil(w), math.ceil(h)
    out = np.zeros((size, size))
    for r in range(size):
        for c in range(size):
            values = []
            for i in range(down):
                for j in range(across):
                    y, z = y1 + h * (r + (i + 0.5) / down), x1 + w * (c + (j + 0.5) / across)
                    y, z = max(y, 0), max(z, 0)
                    a, b = int(y), int(z)
                    fy, fx = y - a, z - b
                    top = x[a, b] * (1 - fx) + x[a, b + 1] * fx
                    low = x[a + 1, b] * (1 - fx) + x[a + 1, b + 1] * fx
                    values.append(top * (1 - fy) + low * fy)
            out[r, c] = np.mean(values)
    return out


def _plain_matching(boxes: Tensor, objects: Tensor, rule: Matching) -> list[int]:
    """The original's assignment, word by word."""
    found = overlaps(objects, boxes)
    match = []
    for j in range(len(boxes)):
        best = float(found[:, j].max()) if len(objects) else -1.0
        match.append(-1 if best < rule.negative else int(found[:, j].argmax()) if best >= rule.positive else -2)
    for i in range(len(objects)):
        top = found[i].max()
        if top >= rule.least:
            for j in range(len(boxes)):
                if found[i, j] == top:
                    match[j] = i
    return match


@pytest.mark.parametrize("rule", [RPN_MATCHING, ROI_MATCHING])
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_matching_is_the_originals(rule, count, monkeypatch):
    monkeypatch.setattr("nextvit.heads.boxes.AT_ONCE", 3000)  # several parts
    rng = np.random.default_rng(count)
    sizes = rng.uniform(5, 60, (count, 2))
    corner = rng.uniform(0, 100, (count, 2)).round()
    objects = torch.from_numpy(np.concatenate([corner, corner + sizes.round()], 1)).float().view(-1, 4)
    boxes = anchors(13, 13, 8, torch.zeros(()))
    boxes = torch.cat([boxes, objects + 1, objects + 0.5])  # some that overlap much, and equally
    found = matched(boxes, objects, rule)
    assert found.tolist() == _plain_matching(boxes, objects, rule)
    assert count == 0 or (found >= 0).any()


def test_an_object_without_a_good_box_takes_its_best_and_the_last_object_wins():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 4, 10.0]])
    objects = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 20.0]])  # overlaps of the first box: 1 and 0.5
    assert matched(boxes, objects, RPN_MATCHING).tolist() == [1, -2], "0.5 is the second's best, so it overwrites"
    assert matched(boxes, objects, ROI_MATCHING).tolist() == [1, -1]


def test_samples_are_drawn_up_to_their_number_and_share():
    torch.manual_seed(0)
    match = torch.full((5000,), -1)
    match[:300], match[300:400] = 2, -2
    positive, negative = sampled(match, RPN_MATCHING, 256)
    assert (len(positive), len(negative)) == (128, 128)
    assert (match[positive] >= 0).all()
    assert (match[negative] == -1).all()
    match[10:300] = -2
    positive, negative = sampled(match, ROI_MATCHING, 512)
    assert (len(positive), len(negative)) == (10, 502)
    assert len(negative.unique()) == 502


def test_mask_targets_are_pooled_and_thresholded():
    masks = torch.zeros(3, 40, 50, dtype=torch.uint8)
    masks[0, 10:30, 5:25] = 1
    masks[2, :, 30:] = 1
    boxes = torch.tensor([[5, 10, 25, 30], [5, 10, 45, 30], [20, 0, 40, 40], [-9, -9, 300, 300.0]])
    found = mask_targets(masks, torch.tensor([0, 0, 2, 2]), boxes, 28)
    assert found[0].min() == 1
    assert torch.equal(found[1], (torch.arange(28) < 14).float().expand(28, 28))
    assert torch.equal(found[2], (torch.arange(28) >= 14).float().expand(28, 28))
    assert found[3].mean() == pytest.approx(0.4, abs=0.03), "the box is cut to the image"
    assert set(found.unique().tolist()) <= {0.0, 1.0}


# ---- training --------------------------------------------------------------------------------------------------------


def targets_of(size, count, seed=0, classes=80):
    rng = np.random.default_rng(seed)
    height, width = size
    corner = rng.uniform(0, [width - 12, height - 12], (count, 2))
    far = np.minimum(corner + rng.uniform(8, 60, (count, 2)), [width, height])
    masks = np.zeros((count, height, width), np.uint8)
    for mask, (x1, y1), (x2, y2) in zip(masks, corner.astype(int), far.astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    boxes = torch.from_numpy(np.concatenate([corner, far], 1)).float().view(-1, 4)
    labels = torch.from_numpy(rng.integers(0, classes, count))
    return {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}


def test_losses_of_proposals_are_their_plain_sums(monkeypatch):
    monkeypatch.setattr("nextvit.heads.boxes.some", lambda places, most: places[:most])  # no chance
    size, padded = (64, 90), (64, 128)
    model, image = lively(), noise(padded)
    maps = model.neck(model.backbone(image))
    scores, deltas = model.rpn_head(maps)
    bases = anchors_of(maps)
    target = targets_of(size, 4)
    found = rpn_losses(scores, deltas, bases, [x.shape[2:] for x in maps], [target], [size], 256)
    inside = []
    for x, stride in zip(maps, (4, 8, 16, 32, 64), strict=True):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                inside += [row * stride < 64 and column * stride < 96] * 3  # 90 is padded to 96 alone
    inside = torch.tensor(inside)
    assert not inside.all()
    base, score, delta = torch.cat(bases)[inside], torch.cat(scores, 1)[0, inside], torch.cat(deltas, 1)[0, inside]
    match = torch.tensor(_plain_matching(base, target["boxes"], RPN_MATCHING))
    positive = (match >= 0).nonzero()[:128, 0]
    negative = (match == -1).nonzero()[: 256 - len(positive), 0]
    classes = F.softplus(-score[positive]).sum() + F.softplus(score[negative]).sum()
    wanted = encoded(base[positive], target["boxes"][match[positive]], (1, 1, 1, 1))
    count = len(positive) + len(negative)
    assert float(found["loss_rpn_cls"]) == pytest.approx(float(classes / count), rel=1e-5)
    assert float(found["loss_rpn_bbox"]) == pytest.approx(
        float((delta[positive] - wanted).abs().sum() / count), rel=1e-5
    )


@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (1, 200)])
def test_training_lowers_the_losses_whatever_the_number_of_objects(counts):
    torch.manual_seed(0)
    size = (96, 128)
    model = create_model("nextvit_nano", task="detect", num_classes=3).train()
    targets = [targets_of(size, count, seed, classes=3) for seed, count in enumerate(counts)]
    images, optimizer = noise(size, batch=2), torch.optim.AdamW(model.parameters(), 3e-4)
    history = []
    model.sampling = Sampling(256, 64, 8)
    for step in range(4):
        torch.manual_seed(step)
        losses = model(images, targets)
        assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
        assert all(torch.isfinite(loss) for loss in losses.values())
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None for p in model.parameters()), "every process has every gradient"
        optimizer.step()
        history.append(float(total))
    assert history[-1] < history[0]


def test_norms_of_the_backbone_keep_their_statistics():
    model = create_model("nextvit_nano", task="detect", num_classes=3).train()
    before = {key: t.clone() for key, t in model.state_dict().items() if "running" in key}
    model(noise((96, 128), batch=2), [targets_of((96, 128), 2, classes=3)] * 2)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in before.items())
    model.fixed_norms = False
    model.train()(noise((96, 128), batch=2), [targets_of((96, 128), 2, classes=3)] * 2)
    assert not any(torch.equal(t, model.state_dict()[key]) for key, t in before.items())


# ---- whole images ----------------------------------------------------------------------------------------------------


def test_images_of_a_batch_are_answered_as_each_alone():
    model, sizes = lively(), [(160, 224), (192, 170)]
    images = [noise(size, key=500 + i)[0] for i, size in enumerate(sizes)]
    batch = torch.zeros(2, 3, 192, 224)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    with torch.inference_mode():
        together = model(batch, sizes=sizes)
        for image, size, found in zip(batch, sizes, together, strict=True):
            (alone,) = model(image[None], sizes=[size])
            assert len(found["boxes"]) == 100
            assert float(found["boxes"][:, 2].max()) <= size[1]
            assert float(found["boxes"][:, 3].max()) <= size[0]
            assert torch.equal(found["labels"], alone["labels"])
            torch.testing.assert_close(found["boxes"], alone["boxes"], atol=5e-3, rtol=0)
            torch.testing.assert_close(found["masks"], alone["masks"], atol=1e-3, rtol=0)


def test_no_object_gives_empty_tensors():
    model = lively()
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias[-1] += 100  # all is background
    with torch.inference_mode():
        (found,) = model(noise((96, 128)))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        "masks": (0, 28, 28),
    }


def test_folding_changes_nothing():
    model, image = lively().double(), noise((193, 161)).double()
    with torch.inference_mode():
        (ours,), (folded,) = model(image), nextvit.fold(model)(image)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in nextvit.fold(model).modules())
    assert torch.equal(ours["labels"], folded["labels"])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(ours[name], folded[name], atol=1e-6, rtol=1e-6)
