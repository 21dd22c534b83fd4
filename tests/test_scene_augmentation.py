"""Training samples of detection: an image, its boxes and its masks stay one; the authors' sizes and cuts."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from nextvit.augmentation import Normalise
from nextvit.data.objects import object_split
from nextvit.metadata import DENSE
from nextvit.recipe import Scenes, read_recipe, with_image_size
from nextvit.scene_augmentation import _boxes_of, as_scenes, blank, sample_of
from tests.test_objects import coco, content, entry

PLAIN = Scenes(short_sides=(96,), long_side=96, flip=0.0)


@pytest.fixture(scope="module")
def split():
    return object_split("demo", "train")


def unpacked(sample):
    width = sample.image.shape[1]
    return np.unpackbits(sample.masks.numpy(), axis=2)[:, :, :width]


def drawn(split, scenes, index, seed=0):
    return sample_of(split.sample(index), scenes, np.random.default_rng(seed))


def test_an_image_is_resized_with_its_boxes_and_masks(split):
    image, objects = split.labelled(3)
    sample = drawn(split, PLAIN, 3)
    assert sample.image.shape == (96, 96, 3)
    np.testing.assert_allclose(sample.boxes.numpy(), objects.boxes / 2)
    np.testing.assert_array_equal(unpacked(sample), objects.masks()[:, ::2, ::2])
    np.testing.assert_array_equal(sample.labels.numpy(), objects.labels)
    same = Scenes(short_sides=(192,), long_side=192, flip=0.0)
    np.testing.assert_array_equal(drawn(split, same, 3).image.numpy(), np.asarray(image))


def test_a_mirrored_image_has_mirrored_boxes_and_masks(split):
    plain, mirrored = drawn(split, PLAIN, 3), drawn(split, Scenes((96,), 96, flip=1.0), 3)
    np.testing.assert_array_equal(mirrored.image.numpy(), plain.image.numpy()[:, ::-1])
    boxes = plain.boxes.numpy()
    np.testing.assert_allclose(mirrored.boxes.numpy()[:, [0, 2]], 96 - boxes[:, [2, 0]])
    shared = (unpacked(mirrored) & unpacked(plain)[:, :, ::-1]).sum() / unpacked(plain).sum()
    assert shared > 0.9, "nearest pixels of a mirrored mask are one off"


def test_crowds_and_what_keeps_no_pixel_are_left_out(tmp_path):
    thin = [entry(7, box=(5, 5, 20, 1), segmentation=[[5, 5, 25, 5, 25, 6, 5, 6]]), entry(8, iscrowd=1)]
    split = object_split(coco(tmp_path / "set", content(1) | {"annotations": [entry(1), *thin]}, images=1), "train")
    assert len(drawn(split, Scenes((40,), 60, flip=0.0), 0).labels) == 2
    assert len(drawn(split, Scenes((32,), 48, flip=0.0), 0).labels) == 1, "a side below a pixel"
    alone = object_split(coco(tmp_path / "crowd", content(1) | {"annotations": thin[1:]}, images=1), "train")
    sample = drawn(alone, Scenes((40,), 60), 0)
    assert (sample.boxes.shape, sample.masks.shape) == ((0, 4), (0, 40, 8))


def test_short_sides_are_drawn_evenly_and_the_long_one_holds(split, tmp_path):
    scenes = Scenes(short_sides=(64, 96, 128), long_side=128)
    sizes = Counter(drawn(split, scenes, 3, seed).image.shape[0] for seed in range(120))
    assert set(sizes) == {64, 96, 128}
    assert min(sizes.values()) > 20
    wide = object_split(coco(tmp_path / "set"), "train")
    assert drawn(wide, Scenes((60,), 66), 0).image.shape == (44, 66, 3)


def test_a_cut_keeps_what_lies_in_it(split):
    scenes = Scenes((96,), 96, flip=0.0, cut=1.0, cut_short_sides=(96, 144), cut_sides=(48, 80))
    shapes, counts = set(), []
    for seed in range(40):
        sample = drawn(split, scenes, 3, seed)
        height, width = sample.image.shape[:2]
        shapes.add((height, width))
        boxes, masks = sample.boxes.numpy(), unpacked(sample)
        counts.append(len(boxes))
        assert max(height, width) == 96 or min(height, width) == 96
        assert (boxes >= 0).all()
        assert (boxes <= np.array([width, height] * 2)).all()
        around = _boxes_of(masks)
        seen = masks.any((1, 2))
        assert (around[seen, :2] >= boxes[seen, :2] - 2).all()
        assert (around[seen, 2:] <= boxes[seen, 2:] + 2).all()
    assert len(shapes) > 10
    assert min(counts) < max(counts) == 4


def test_pasted_objects_cover_what_lies_below(split):
    scenes, more = PLAIN, Scenes((96,), 96, flip=0.0, copy_paste=1.0)
    grown = 0
    for seed in range(20):
        before, after = drawn(split, scenes, 5, seed), drawn(split, more, 5, seed)
        masks = unpacked(after)
        assert (masks.sum(0) <= 1).all(), "no two objects share a pixel"
        changed = (before.image.numpy() != after.image.numpy()).any(2)
        new = masks[len(masks) - max(0, len(masks) - len(before.labels)) :].any(0)
        grown += len(after.labels) > len(before.labels)
        assert (changed & ~masks.any(0)).sum() == 0, "an image changes below the objects alone"
        assert len(masks) == len(after.boxes) == len(after.labels)
        assert new.shape == changed.shape
        np.testing.assert_allclose(after.boxes.numpy(), _boxes_of(masks), atol=2)
    assert grown > 10


def test_the_same_numbers_give_the_same_sample(split):
    scenes = read_recipe("maskrcnn_3x_ms", ["scenes.copy_paste=0.5"]).scenes
    scenes = with_image_size(read_recipe("maskrcnn_3x_ms", ["scenes.copy_paste=0.5"]), 96).scenes
    a, b, c = (drawn(split, scenes, 9, seed) for seed in (1, 1, 2))
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.masks, b.masks)
    assert a.image.shape != c.image.shape or not torch.equal(a.image, c.image)


def test_the_authors_policies():
    once, many = (read_recipe(name).scenes for name in ("maskrcnn_1x", "maskrcnn_3x_ms"))
    assert (once.short_sides, once.long_side, once.cut, once.flip) == ((800,), 1333, 0.0, 0.5)
    assert many.short_sides == tuple(range(480, 801, 32))
    assert (many.cut, many.cut_short_sides, many.cut_sides) == (0.5, (400, 500, 600), (384, 600))


def test_a_batch_is_padded_and_what_is_padded_is_0(tmp_path):
    whole = content(2)
    split = object_split(coco(tmp_path / "set", whole, images=2), "train")
    samples = [drawn(split, Scenes((40,), 60, flip=0.0), 0), drawn(split, Scenes((50,), 80, flip=0.0), 1)]
    normalise = Normalise(DENSE["detect"], torch.device("cpu"))
    images, targets, sizes = as_scenes(samples, normalise)
    assert sizes == [(40, 60), (50, 75)]
    assert images.shape == (2, 3, 64, 96)
    assert (images[0, :, 40:] == 0).all()
    assert (images[0, :, :, 60:] == 0).all()
    assert (images[0, :, :40, :60] != 0).any()
    picture = np.asarray(Image.open(split.files[0])).astype(np.float32) / 255
    mean, std = (np.array(v, np.float32) for v in (DENSE["detect"].mean, DENSE["detect"].std))
    np.testing.assert_allclose(images[0, :, :40, :60].permute(1, 2, 0), (picture - mean) / std, atol=1e-5)
    assert targets[0]["masks"].shape == (1, 40, 60)
    np.testing.assert_array_equal(targets[0]["masks"].numpy(), split.objects(0).masks())
    nothing = partial(blank, Scenes((40,), 60))
    _, (none, _), _ = as_scenes([nothing(), samples[0]], normalise)
    assert none["masks"].shape == (0, 40, 60)


def test_a_thousand_objects_in_one_image(tmp_path):
    rng = np.random.default_rng(0)
    places = rng.integers(0, [55, 35], (1000, 2))
    rows = [entry(n + 1, box=(int(x), int(y), 5, 5), segmentation=[[x, y, x + 5, y, x + 5, y + 5, x, y + 5]])
            for n, (x, y) in enumerate(places.tolist())]  # fmt: skip
    split = object_split(coco(tmp_path / "set", content(1) | {"annotations": rows}, images=1), "train")
    sample = drawn(split, Scenes((40,), 60, copy_paste=1.0), 0)
    assert len(sample.labels) > 300
    images, (target,), _ = as_scenes([sample], Normalise(DENSE["detect"], torch.device("cpu")))
    assert target["masks"].shape[1:] == (40, 60)
