"""Heat maps of networks whose evidence is known, spectra of maps whose frequencies are, and the page of both."""

import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nextvit import create_model
from nextvit.backbone import EMHSA
from nextvit.data.images import normalise
from nextvit.errors import UserError
from nextvit.explain import heat, log_amplitude, points_of, received, spectra, tapped
from nextvit.explained import titles
from nextvit.metadata import Metadata
from nextvit.weights import save_weights
from tests.conftest import nextvit_here

SIDE = 96


def scene(left: bool | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey noise with a red square in its left or right half, or none -> uint8 (SIDE, SIDE, 3), and its mask."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(90, 160, (SIDE, SIDE, 1), np.uint8).repeat(3, 2)
    mask = np.zeros((SIDE, SIDE), bool)
    if left is not None:
        top, start = rng.integers(8, SIDE - 40), rng.integers(4, 14) + (0 if left else SIDE // 2)
        mask[top : top + 30, start : start + 30] = True
        picture[mask] = (230, 30, 30)
    return picture, mask


def whole(metadata: Metadata) -> Metadata:
    """The record of a network that is given scenes as they are."""
    return replace(metadata, preprocess=replace(metadata.preprocess, image_size=SIDE, crop=1.0))


def batch(network, seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Images as the network takes them, whether they have a square, and its mask."""
    scenes = [(scene(None if seed % 2 else bool(seed // 2 % 2), seed), seed % 2 == 0) for seed in seeds]
    images = np.stack([normalise(picture, network.metadata.preprocess) for (picture, _), _ in scenes])
    masks = np.stack([mask for (_, mask), _ in scenes])
    return torch.from_numpy(images), torch.tensor([there for _, there in scenes]).long(), torch.from_numpy(masks)


@pytest.fixture(scope="module")
def classifier():
    """A nano that learnt to tell images with a red square from those without."""
    torch.manual_seed(0)
    model = create_model("nextvit_nano", num_classes=2)
    model.metadata = whole(model.metadata)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(60):
        images, there, _ = batch(model, range(16 * step, 16 * step + 16))
        loss = torch.nn.functional.cross_entropy(model(images), there)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, there, _ = batch(model.eval(), range(5000, 5032))
    with torch.no_grad():
        assert (model(images).argmax(1) == there).float().mean() > 0.9
    return model


def shares(values: np.ndarray) -> tuple[float, float]:
    """Of the left and of the right half."""
    whole = values.sum()
    return values[:, : SIDE // 2].sum() / whole, values[:, SIDE // 2 :].sum() / whole


# ---- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("seed", [7000, 7001, 7002])
def test_evidence_lies_where_the_object_is(left, seed, classifier):
    picture, _ = scene(left, seed)
    found = heat(classifier, Image.fromarray(picture), label="1", stage=3)
    assert found.evidence.shape == (SIDE, SIDE)
    assert shares(found.evidence)[0 if left else 1] > 0.7
    assert found.answer.startswith("class 1")
    np.testing.assert_allclose(found.picture, picture, atol=1)


@pytest.mark.parametrize(("side", "stage"), [(96, 4), (64, 3), (32, 2)])
def test_a_stage_with_places_enough_is_weighed_by_itself(side, stage, classifier):
    picture = Image.fromarray(scene(True, 7003)[0])
    model = copy.copy(classifier)
    model.metadata = classifier.metadata.with_image_size(side)
    found, same = heat(model, picture, label="1"), heat(model, picture, label="1", stage=stage)
    np.testing.assert_array_equal(found.evidence, same.evidence)


def test_what_is_the_same_everywhere_is_no_evidence(classifier):
    model = copy.copy(classifier)
    model.metadata = classifier.metadata.with_image_size(32)
    assert heat(model, Image.fromarray(scene(True, 7003)[0]), stage=4).evidence.max() == 0  # a map of one place


@pytest.fixture(scope="module")
def segmenter():
    """A nano with Semantic FPN that learnt where red squares are."""
    torch.manual_seed(0)
    model = create_model("nextvit_nano", task="segment", num_classes=2)
    model.metadata = whole(model.metadata)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(40):
        images, _, masks = batch(model, range(0, 32, 2) if step % 2 else range(16 * step, 16 * step + 16))
        wanted = torch.nn.functional.interpolate(masks[:, None].float(), scale_factor=0.25)[:, 0].long()
        loss = torch.nn.functional.cross_entropy(model(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def segmenter_file(segmenter, tmp_path_factory):
    path = tmp_path_factory.mktemp("segmenter") / "m.safetensors"
    save_weights(path, segmenter.state_dict(), segmenter.metadata)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False])
def test_evidence_of_a_segmenter_lies_where_the_class_is(left, segmenter):
    found = heat(segmenter, Image.fromarray(scene(left, 7004)[0]), label="1")
    assert shares(found.evidence)[0 if left else 1] > 0.7
    assert found.answer.startswith("class 1, ")


@pytest.fixture(scope="module")
def detector():
    """A nano with Mask R-CNN that learnt to find red squares, in images that all have one."""
    torch.manual_seed(0)
    model = create_model("nextvit_nano", task="detect", num_classes=2)
    model.metadata, model.fixed_norms = whole(model.metadata), False
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for step in range(120):
        images, _, masks = batch(model, range(0, 4, 2) if step % 8 == 0 else [4 * step, 4 * step + 2])
        targets = []
        for mask in masks:
            rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
            box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            targets.append({"boxes": box[None], "labels": torch.tensor([1]), "masks": mask[None].to(torch.uint8)})
        loss = torch.stack([*model(images, targets).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False])
def test_evidence_of_a_detector_lies_where_its_object_is(left, detector):
    picture, mask = scene(left, 7008)
    found = heat(detector, Image.fromarray(picture), label="1")
    assert found.answer.startswith("class 1 ")
    assert shares(found.evidence)[0 if left else 1] > 0.7
    assert found.attention is not None


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"label": "cow"}, "knows no class 'cow'; it knows the numbers below 2"),
        ({"label": "2"}, "knows no class '2'"),
        ({"stage": 9}, "there is no stage 9; nextvit_nano has stages 1 to 4"),
    ],
)
def test_what_cannot_be_asked_is_told(how, told, classifier):
    with pytest.raises(UserError, match=told):
        heat(classifier, Image.fromarray(scene(True, 0)[0]), **how)


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("pooling", ["sequence", "spatial"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_attention_is_what_each_query_gives_to_each_token(pooling, size, reduction):
    torch.manual_seed(0)
    module = EMHSA(64, 32, reduction, pooling).eval()
    x = torch.randn(1, 64, *size)
    found = received(module, x)[0]
    tokens = x[0].flatten(1).T
    pooled = module.norm(module.pool(x))[0].T
    q, k = module.q(tokens), module.k(pooled)
    weights = torch.zeros(len(pooled))
    for head in (slice(0, 32), slice(32, 64)):
        for query in q[:, head]:
            weights += (k[:, head] @ query / 32**0.5).softmax(0) / (2 * len(q))
    for row in range(size[0]):
        for column in range(size[1]):
            if reduction == 1:
                expected = weights[row * size[1] + column]
            elif pooling == "sequence":
                group = (row * size[1] + column) // 4
                expected = weights[group] if group < len(weights) else torch.tensor(0.0)
            else:
                expected = weights[row // 2 * -(-size[1] // 2) + column // 2]
            torch.testing.assert_close(found[row, column], expected)


# ---- frequencies -----------------------------------------------------------------------------------------------------


def test_noise_has_all_frequencies_alike():
    torch.manual_seed(0)
    frequencies, values = log_amplitude(torch.randn(8, 64, 32, 32))
    assert frequencies.tolist() == [pytest.approx(2 * k / 32) for k in range(17)]
    assert abs(values[1:-1] - values[1:-1].mean()).max() < 0.1


@pytest.mark.parametrize("number", [1, 3, 7])
def test_a_wave_is_found_at_its_frequency(number):
    row, column = torch.meshgrid(*[torch.arange(32, dtype=torch.float64)] * 2, indexing="ij")
    wave = torch.cos(2 * torch.pi * number * (row + column) / 32)
    _, values = log_amplitude((1 + wave).expand(2, 3, 32, 32))
    assert values.argmax() in (0, number)
    assert values[number] == pytest.approx(np.log(0.5), abs=1e-6)  # a cosine has half of its amplitude on either side
    others = np.delete(values, [0, number])
    assert others.max() < -15


def test_a_blur_takes_the_high_frequencies_away_as_its_transform_says():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 32, 32)
    blurred = (x + x.roll(1, 2) + x.roll(1, 3) + x.roll((1, 1), (2, 3))) / 4
    (frequencies, before), (_, after) = log_amplitude(x), log_amplitude(blurred)
    expected = 2 * np.log(np.cos(frequencies[:-1] * np.pi / 2))  # of both axes
    np.testing.assert_allclose((after - before)[:-1], expected, atol=1e-5)


def test_maps_that_are_not_square_are_cut_and_scale_does_not_matter():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16)
    wide = torch.cat([torch.full((2, 8, 16, 5), 9.0), x, torch.full((2, 8, 16, 5), -9.0)], 3)
    np.testing.assert_allclose(log_amplitude(wide)[1], log_amplitude(7 * x)[1], atol=1e-5)


def test_spectra_are_of_the_four_stages_and_of_both_branches(classifier):
    found = spectra(classifier, [Image.fromarray(scene(True, 1)[0]), Image.fromarray(scene(None, 2)[0])])
    names = [one.point for one in found]
    assert [name for name in names if "," not in name] == [f"stage {n}" for n in (1, 2, 3, 4)]
    assert "stage 3, E-MHSA" in names
    assert "stage 3, MHCA" in names
    assert all(np.isfinite(one.log_amplitude).all() and one.log_amplitude[0] == 0 for one in found)
    highest = {one.point: one.frequencies[-1] for one in found}
    side = classifier.metadata.preprocess.image_size // 32
    assert highest["stage 1"] == 1
    assert side % 2
    assert highest["stage 4"] <= (side - 1) / side  # a map of an odd side has no higher frequency


# ---- other networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("timm:resnet10t", "classify"),
        ("timm:swin_tiny_patch4_window7_224", "classify"),
        ("timm:convnext_atto", "classify"),
        ("timm:deit_tiny_patch16_224", "classify"),
        pytest.param("peer:cswin_tiny", "classify", marks=pytest.mark.slow),
        ("peer:uniformer_small", "classify"),
        pytest.param("timm:resnet18", "segment", marks=pytest.mark.slow),
        pytest.param("peer:uniformer_small", "segment", marks=pytest.mark.slow),
        ("nextvit_nano", "segment"),
        pytest.param("table8_r100", "classify", marks=pytest.mark.slow),
    ],
)
def test_every_network_is_looked_at_and_left_as_it_was(name, task):
    torch.manual_seed(0)
    network = create_model(name, task=task, num_classes=3).eval()
    side = network.metadata.preprocess.image_size if task == "classify" else 128
    network.metadata = network.metadata.with_image_size(side)
    x = torch.randn(1, 3, side, side)
    points = points_of(network)
    with torch.no_grad():
        before = network(x)
        with tapped(network, points) as taps:
            seen = []
            for tap in taps:
                tap.maps.register_forward_hook(lambda module, inputs, output: seen.append(output))
            torch.testing.assert_close(network(x), before)
        torch.testing.assert_close(network(x), before)
    assert len(seen) == len(points)
    assert all(m.ndim == 4 for m in seen)
    sides = [m.shape[2] for m in seen]
    assert sides == sorted(sides, reverse=True)
    image = Image.fromarray(scene(True, 0)[0])
    found = heat(network, image).evidence
    assert found.shape == (side, side)
    assert found.max() == pytest.approx(1)
    assert len(spectra(network, [image])) >= 3


def test_a_network_without_stages_says_so():
    with pytest.raises(UserError, match="does not tell where its stages are"):
        points_of(create_model("peer:cvt_13", num_classes=3))


# ---- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb_leaves_pictures_and_a_page(classifier, tmp_path):
    save_weights(tmp_path / "m.safetensors", classifier.state_dict(), classifier.metadata)
    for number, left in enumerate((True, None)):
        Image.fromarray(scene(left, number)[0]).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    files = [tmp_path / "0.png", tmp_path / "bad.png", tmp_path / "1.png"]
    asked = ("explain", tmp_path / "m.safetensors", *files, "--beside", "timm:resnet10t", "--output", tmp_path / "out")
    done = nextvit_here(*asked, "--json")
    assert done.returncode == 0, done.stderr
    assert "timm:resnet10t has random weights here" in done.stderr
    shown = json.loads(done.stdout)
    assert list(shown["answers"]) == [str(files[0]), str(files[2])]
    assert all(len(row) == 2 for row in shown["answers"].values())
    assert len(shown["left_out"]) == 1
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"explained.html", "heat-001.png", "heat-002.png", "spectra.csv", "spectra.png"}
    page = (tmp_path / "out" / "explained.html").read_text()
    assert page.count("<img") == 3
    with open(tmp_path / "out" / "spectra.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["network"] for row in rows} == {"nextvit_nano", "timm:resnet10t"}
    assert float(rows[0]["relative_log_amplitude"]) == 0


@pytest.mark.slow
def test_an_image_without_the_class_is_left_out_and_the_rest_goes_on(segmenter_file, tmp_path):
    for number, left in enumerate((True, None)):
        Image.fromarray(scene(left, 40 + number)[0]).save(tmp_path / f"{number}.png")
    asked = (
        "explain",
        segmenter_file,
        tmp_path / "0.png",
        tmp_path / "1.png",
        "--class",
        "1",
        "--output",
        tmp_path / "out",
    )
    done = nextvit_here(*asked, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert list(shown["answers"]) == [str(tmp_path / "0.png")]
    assert "no pixel is class 1 to the model" in shown["left_out"][0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nextvit_nano", "absent.png"], "absent.png"),
        (["nextvit_nano", "bad.png"], "none of 1 images can be explained"),
        (["nextvit_nano", "good.png", "--class", "cow"], "knows no class 'cow'"),
        (["model.onnx", "good.png"], "is an exported file; this needs a variant's name or a weight file"),
    ],
)
def test_what_cannot_be_explained_is_told(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    Image.fromarray(scene(True, 0)[0]).save(tmp_path / "good.png")
    done = nextvit_here("explain", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "explained").exists()


@pytest.mark.parametrize(
    ("names", "variants", "called"),
    [
        (["/a/b/run/m.safetensors", "timm:resnet18"], ["nextvit_nano", "timm:resnet18"],
         ["nextvit_nano", "timm:resnet18"]),
        (["/a/1/m.pth", "/a/2/m.pth"], ["nextvit_nano"] * 2, ["nextvit_nano, 1/m.pth", "nextvit_nano, 2/m.pth"]),
        (["/a/one/m.pth", "nextvit_nano"], ["nextvit_nano"] * 2, ["nextvit_nano, one/m.pth", "nextvit_nano"]),
        (["/a/one/m.pth", "/b/one/m.pth"], ["nextvit_nano"] * 2, ["/a/one/m.pth", "/b/one/m.pth"]),
        (["nextvit_nano"] * 2, ["nextvit_nano"] * 2, ["nextvit_nano (1)", "nextvit_nano (2)"]),
    ],
)  # fmt: skip
def test_networks_are_called_by_what_tells_them_apart(names, variants, called):
    assert titles(names, variants) == called
