"""Our loader of training images beside timm's, with the same augmentation, in interleaved rounds.

    python benchmarks/loader_vs_timm.py --workers 2

Both read the same JPEG files: the photographs that ship with the package, at ImageNet's usual 500 x 375 pixels and at a
phone's 4032 x 3024. Augmentation is in1k_300e's: crop of 8 to 100 % of the area, flip, RandAugment. Both take
uint8 from the workers and give normalised batches; timm's with its prefetcher, as its train script has it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image

from nextvit.augmentation import Normalise, mend_posterize, sample_transform
from nextvit.data.loader import batches
from nextvit.data.sets import read_split
from nextvit.metadata import Preprocess
from nextvit.recipe import read_recipe

BATCH = 32


def write(folder: Path, size: tuple[int, int], count: int) -> None:
    """`count` JPEG files of that size in two classes, as train and val."""
    source = resources.files("nextvit.data") / "demo" / "backgrounds" / "train"
    photos = [Image.open(p).convert("RGB") for p in sorted(source.iterdir(), key=str) if p.name.endswith(".jpg")]
    for index in range(count):
        for split in ("train", "val"):
            path = folder / split / str(index % 2) / f"{index:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if split == "train" or index < 4:
                photos[index % len(photos)].resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def ours(data: Path, workers: int) -> Callable[[int], Iterable[object]]:
    recipe, split = read_recipe("in1k_300e"), read_split(data, "train")
    transform = sample_transform(recipe.images, Preprocess())
    normalise = Normalise(Preprocess(), torch.device("cpu"))
    how = {"batch_size": BATCH, "workers": workers}

    def epoch_of(number: int) -> Iterable[object]:
        for batch in batches(split, transform, order=split.order(0, number), seed=(0, number), **how):
            yield normalise(batch.images)

    return epoch_of


def theirs(data: Path, workers: int) -> Callable[[int], Iterable[object]]:
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(data), split="train"),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        device=torch.device("cpu"),
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        num_workers=workers,
        persistent_workers=False,
    )
    for step in loader.dataset.transform.transforms:
        if hasattr(step, "ops"):
            mend_posterize(step)
    return lambda epoch: loader


def seconds(loader: Iterable[object]) -> float:
    begun = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begun


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    flags = parser.parse_args()
    for size, count in (((500, 375), 640), ((4032, 3024), 64)):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), size, count)
            pair = ours(Path(folder), flags.workers), theirs(Path(folder), flags.workers)
            times = np.array([[seconds(make(turn)) for make in pair] for turn in range(flags.rounds + 1)])[1:]
        ratios = times[:, 1] / times[:, 0]
        low, high = np.quantile(
            [np.median(np.random.default_rng(i).choice(ratios, len(ratios))) for i in range(500)], [0.025, 0.975]
        )
        rate = [count / np.median(column) for column in times.T]
        print(
            f"{size[0]} x {size[1]}, {flags.workers} workers: nextvit {rate[0]:.0f} images/s, timm {rate[1]:.0f}, "
            f"{np.median(ratios):.2f} times timm's ({low:.2f} to {high:.2f})"
        )
