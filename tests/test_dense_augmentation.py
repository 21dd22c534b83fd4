"""What segmentation trains on: image and labels stay one, and every step is that of the authors' pipeline."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from nextvit.augmentation import Normalise
from nextvit.data.masks import IGNORED
from nextvit.data.scenes import annotation_map, compose
from nextvit.dense_augmentation import PADDED, as_input, crop_of, distorted
from nextvit.metadata import Preprocess
from nextvit.recipe import Crops

PLAIN = Crops(64, 48, 192, flip=0.0, distortion=False)


class Drawn:
    """A generator that gives what it is told, in order."""

    def __init__(self, *values):
        self.values = list(values)

    def _next(self, *args):
        return self.values.pop(0)

    uniform = integers = random = _next


def painted(index=0):
    """A scene whose colours tell the label: a crop that moves one without the other shows."""
    labels = annotation_map(compose("train", index))
    colours = np.arange(0, 250, 40, dtype=np.uint8)
    return Image.fromarray(np.repeat(colours[labels][:, :, None], 3, 2)), labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_colours_and_labels_stay_together(scale, flip):
    image, labels = painted()
    crops = Crops(64, 96, 384, scale=(scale, scale), flip=flip, distortion=False)
    sample = crop_of(image, labels, crops, np.random.default_rng(0)).numpy()
    inside = sample[..., 3] != PADDED
    assert inside.sum() == min(64, int(96 * scale + 0.5)) ** 2
    right = sample[..., 0] == np.arange(0, 250, 40)[sample[..., 3].clip(max=6)]
    assert right[inside].mean() > 0.9  # at edges colours are mixed and labels are not


def test_a_mirrored_crop_is_the_crop_mirrored():
    image, labels = painted()
    plain, mirrored = (
        crop_of(image, labels, Crops(48, 96, 384, flip=flip, distortion=False), np.random.default_rng(3))
        for flip in (0.0, 1.0)
    )
    assert not torch.equal(plain, mirrored)
    torch.testing.assert_close(plain.flip(1), mirrored, rtol=0, atol=0)


def test_labels_are_resized_as_opencv_does():
    import cv2

    labels = np.random.default_rng(0).integers(0, 9, (57, 83)).astype(np.uint8)
    crops = Crops(400, 100, 400, scale=(1.3, 1.3), flip=0.0, distortion=False)
    sample = crop_of(Image.new("RGB", (83, 57)), labels, crops, np.random.default_rng(0)).numpy()[..., 3]
    height, width = int(57 * 130 / 57 + 0.5), int(83 * 130 / 57 + 0.5)
    expected = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(sample[:height, :width], expected)
    assert (sample[height:] == PADDED).all()


def test_a_crop_of_nearly_one_class_is_drawn_again_and_ten_times_at_most():
    labels = np.zeros((64, 256), np.uint8)
    labels[:, 200:] = 1
    image = Image.fromarray(np.repeat((labels * 100)[:, :, None], 3, 2))
    crops = Crops(64, 64, 256, scale=(1.0, 1.0), flip=0.0, distortion=False)
    good = 0
    for seed in range(200):
        found = crop_of(image, labels, crops, np.random.default_rng(seed)).numpy()[..., 3]
        good += 0.25 < (found == 1).mean() < 0.75
    assert good > 170  # a single draw gives such in one of six
    drawn = Drawn(1.0, *(0, 0) * 11, 0.9)  # scale; eleven places, all of one class; no flip
    crop_of(image, labels, crops, drawn)
    assert drawn.values == []


def test_ignored_pixels_are_no_class_when_a_crop_is_judged():
    labels = np.full((64, 64), IGNORED, np.uint8)
    labels[:8, :32], labels[:8, 32:] = 0, 1  # half and half of what counts
    drawn = Drawn(1.0, 0, 0, 0.9)  # the first place will do
    crop_of(Image.new("RGB", (64, 64)), labels, Crops(64, 64, 256, flip=0.0, distortion=False), drawn)
    assert drawn.values == []


def truncated(values):
    return np.clip(values, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((1, 20.7, 0, 0, 0, 0), lambda x: truncated(x + 20.7)),  # brightness
        ((1, -31.2, 0, 0, 0, 0), lambda x: truncated(x - 31.2)),
        ((0, 1, 1, 1.4, 0, 0), lambda x: truncated(x * 1.4)),  # contrast, early
        ((0, 0, 0, 0, 1, 0.6), lambda x: truncated(x * 0.6)),  # and late
        ((1, 20.0, 1, 1, 1.5, 0, 0), lambda x: truncated(truncated(x + 20.0) * np.float32(1.5))),
        ((0, 0, 0, 0, 0), lambda x: x),
    ],
)
def test_brightness_and_contrast_are_cut_and_rounded_down_in_the_authors_order(draws, expected):
    pixels = compose("val", 1).image
    drawn = Drawn(*draws)
    np.testing.assert_array_equal(distorted(pixels, drawn), expected(pixels.astype(np.float32)))
    assert drawn.values == []


@pytest.mark.parametrize(("draws", "gain", "turn"), [((0, 0, 1, 0.5, 0, 0), 0.5, 0), ((0, 0, 0, 1, 17, 0), 1.0, 17)])
def test_saturation_and_hue_change_in_hsv(draws, gain, turn):
    pixels = compose("val", 2).image[::16, ::16]
    drawn = Drawn(*draws)
    found = distorted(pixels, drawn)
    assert drawn.values == []
    expected = np.empty(pixels.shape)
    for place in np.ndindex(pixels.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        expected[place] = colorsys.hsv_to_rgb((h + turn / 180) % 1, s * gain, v)
    assert np.abs(found - 255 * expected).mean() < 1.5  # OpenCV keeps hue in steps of two degrees
    assert np.abs(found - 255 * expected).max() < 9


def test_padding_is_zero_for_the_network_and_counts_for_nothing():
    image, labels = painted()
    small = Image.fromarray(np.asarray(image)[:40, :50])
    sample = crop_of(small, labels[:40, :50], Crops(64, 40, 160, scale=(1.0, 1.0), flip=0.0), np.random.default_rng(0))
    p = Preprocess()
    images, targets = as_input(torch.stack([sample, sample]), Normalise(p, torch.device("cpu")))
    assert (images.shape, images.dtype, targets.dtype) == ((2, 3, 64, 64), torch.float32, torch.int64)
    assert (images[:, :, 40:] == 0).all()
    assert (images[:, :, :, 50:] == 0).all()
    assert (targets[:, 40:] == IGNORED).all()
    np.testing.assert_array_equal(targets[0, :40, :50], labels[:40, :50])
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    expected = (sample[:40, :50, :3].permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(images[1, :, :40, :50], expected, rtol=1e-5, atol=1e-5)
