"""Augmentation and mixing against timm's own, and what they depend on."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, mixup, random_erasing

from nextvit.augmentation import (
    Normalise,
    draw_mixing,
    erase,
    erasing_box,
    mix,
    randaugment,
    sample_transform,
    smoothed,
)
from nextvit.data.demo_images import garments
from nextvit.data.images import normalise, read_image
from nextvit.data.loader import batches
from nextvit.data.seeds import generator, seeded
from nextvit.data.sets import read_split
from nextvit.metadata import Preprocess
from nextvit.recipe import Images, Mixing


class NumpyRandom:
    """`numpy.random` as timm's mixup calls it, out of one generator; the first coin always says to mix."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.first = rng, True
        self.beta = rng.beta

    def rand(self) -> float:
        if self.first:
            self.first = False
            return 0.0
        return self.rng.random()

    def randint(self, low, high, size=None) -> int:
        return int(self.rng.integers(low, high))


class PythonRandom:
    """Python's `random` as timm's erasing calls it."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.random, self.uniform = rng.random, rng.uniform

    def randint(self, low, high) -> int:
        return int(self.rng.integers(low, high + 1))


def test_mixup_and_cutmix_are_timm_s(monkeypatch):
    """The same draws give the same images and targets: mixup alone, cutmix alone, and either by a coin."""
    seen = set()
    for seed in range(60):
        m = (Mixing(0.8, 1.0), Mixing(0.8, 0.0), Mixing(0.0, 1.0))[seed % 3]
        torch.manual_seed(seed)
        images, indices = torch.randn(6, 3, 31, 44), torch.randint(0, 5, (6,))
        theirs = mixup.Mixup(m.mixup, m.cutmix, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=5)
        with monkeypatch.context() as patch:
            patch.setattr(mixup.np, "random", NumpyRandom(generator(seed)))
            expected_images, expected = theirs(images.clone(), indices)
        draw = draw_mixing(m, generator(seed), 31, 44)
        (found,) = mix(images, draw, smoothed(indices, 5, 0.1))
        torch.testing.assert_close(images, expected_images)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(1), torch.ones(6))
        seen.add((seed % 3, draw.box is None))
    assert len(seen) == 4, "with both, each came up"


def test_the_box_that_is_erased_is_timm_s_and_holds_normal_noise(monkeypatch):
    fills = []
    for seed in range(200):
        image = torch.full((3, 40, 56), 9.0)
        theirs = image.clone()
        with monkeypatch.context() as patch:
            patch.setattr(random_erasing, "random", PythonRandom(generator(seed)))
            random_erasing.RandomErasing(0.5, mode="pixel", device="cpu")(theirs)
        rng = generator(seed)
        box = erasing_box(rng, 40, 56) if rng.random() <= 0.5 else None
        expected = (theirs != 9).any(0)
        found = torch.zeros_like(expected)
        if box is not None:
            found[box[0] : box[1], box[2] : box[3]] = True
        assert torch.equal(found, expected)
        batch = image[None].clone()
        erase(batch, torch.tensor([seed]), 1.0, (0,))
        fills.append(batch[batch != 9])
        assert 0.015 < fills[-1].numel() / image.numel() < 0.36
    noise = torch.cat(fills)
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_erasing_depends_on_the_image_and_the_epoch_alone():
    images = torch.zeros(4, 3, 20, 20)
    indices = torch.tensor([7, 3, 9, 5])
    together = images.clone()
    erase(together, indices, 0.6, (0, 2))
    for row, index in enumerate(indices):
        alone = images[:1].clone()
        erase(alone, index[None], 0.6, (0, 2))
        assert torch.equal(alone[0], together[row])
    later = images.clone()
    erase(later, indices, 0.6, (0, 3))
    assert not torch.equal(later, together)


def test_randaugment_is_timm_s_and_takes_every_operation():
    """Whole, from the same seed, on a photograph-like image; Pillow's refusal of no bits at all is mended."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8))
    own = randaugment(Images(size=32, randaugment="rand-m9-mstd0.5-inc1"))
    square = picture.resize((32, 32))
    theirs = auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    )
    names = {op.name for op in theirs.ops}
    assert len(names) == 15
    refused = same = 0
    for seed in range(400):
        with seeded(seed):
            found = own(square)
        with seeded(seed):
            try:
                expected = theirs(square)
            except ValueError:
                refused += 1
                continue
        same += np.array_equal(np.asarray(found), np.asarray(expected))
    assert same + refused == 400
    assert same > 380


def test_posterising_to_no_bits_gives_black():
    from nextvit.augmentation import _posterize

    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert _posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert _posterize(image, 8) is image
    assert _posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)


def test_pixels_become_the_input_that_evaluation_gives():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    p = Preprocess(32)
    found = Normalise(p, torch.device("cpu"))(torch.from_numpy(pixels))
    expected = np.stack([normalise(image, p) for image in pixels])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    for label in ("bag", "coat"):
        (folder / label).mkdir()
        for index, tile in enumerate(garments("train")[label][:13]):
            tile.resize((50, 40)).convert("RGB").save(folder / label / f"{index:02}.jpg")
    return read_split(folder, "train")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sample_is_the_same_whatever_loads_it(workers, split):
    """With another number of processes, another batch size, another beginning."""
    transform = sample_transform(Images(size=32, randaugment="rand-m9-mstd0.5-inc1"), Preprocess(32))
    order = split.order(0, 1)

    def images(**how) -> dict[int, torch.Tensor]:
        found = {}
        for batch in batches(split, transform, seed=(0, 1), **how):
            assert batch.images.dtype == torch.uint8
            found |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
        return found

    alone = images(order=order, batch_size=4)
    before = random.random, np.random.get_state()[1].sum(), torch.get_rng_state().sum()
    other = images(order=[order[9:12], order[12:20]], workers=workers)
    assert len(other) == 11
    assert all(torch.equal(alone[index], image) for index, image in other.items())
    assert (random.random, np.random.get_state()[1].sum(), torch.get_rng_state().sum()) == before
    assert sorted(alone) == list(range(len(split)))


def test_every_epoch_and_every_seed_has_its_own_order(split):
    orders = {tuple(split.order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert np.array_equal(split.order(1, 2), split.order(1, 2))
    assert Path(split.files[0]).exists()


def cropped(read, images: Images, seed: int) -> np.ndarray:
    with seeded(seed):
        return sample_transform(images, Preprocess(images.size))(read).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_is_torchvision_s(interpolation):
    """The same draw gives its box; pixels are Pillow's to a level, or two where it resizes rows before columns."""
    from torchvision.transforms import v2

    from nextvit.exporters.parity import real_images

    picture = real_images()[10].resize((130, 90))
    images = Images(size=48, crop_area=0.2, flip=0, interpolation=interpolation)
    theirs = v2.RandomResizedCrop(48, (0.2, 1), (3 / 4, 4 / 3), interpolation=v2.InterpolationMode(interpolation))

    def read(draft):
        draft(*picture.size)
        return picture

    for seed in range(20):
        transform = sample_transform(images, Preprocess(48, interpolation=interpolation))
        with seeded(seed):
            found = transform(read).numpy().astype(int)
        with seeded(seed):
            expected = np.asarray(theirs(picture), int)
        assert np.abs(found - expected).max() <= 2
        assert (found != expected).mean() < 0.2


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(orientation, tmp_path):
    from nextvit.exporters.parity import real_images

    picture = real_images()[10].resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture if orientation == 1 else picture.rotate(90, expand=True)  # 6: turned back by readers
    stored.save(tmp_path / "large.jpg", quality=95, exif=exif)
    images, sizes = Images(size=96, crop_area=0.3, flip=0), []

    def small(draft):
        sizes.append(read_image(tmp_path / "large.jpg", draft=draft))
        return sizes[-1]

    def whole(draft):
        draft(1600, 1200)
        return picture

    for seed in range(10):
        apart = cropped(small, images, seed).astype(int) - cropped(whole, images, seed)
        assert np.abs(apart).mean() < 5, "a crop of so few pixels is off by half of one at most"
    assert {image.size for image in sizes} <= {(400, 300), (200, 150)}
    assert min(image.width for image in sizes) < 1600


@pytest.mark.parametrize("sides", [(1, 1), (1, 60), (60, 1), (2, 150)])
def test_of_a_thin_image_a_pixel_at_least_is_left(sides):
    picture = Image.new("RGB", sides, (10, 20, 30))

    def read(draft):
        draft(*sides[::-1])  # as if it were stored otherwise than it is told
        return picture

    for seed in range(30):
        assert cropped(read, Images(size=32, crop_area=0.05), seed).shape == (32, 32, 3)


def test_what_is_no_jpeg_is_decoded_in_full(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", draft=lambda w, h: (10, 10)).size == (640, 480)
