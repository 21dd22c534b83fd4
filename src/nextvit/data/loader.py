"""From a split to batches. An image that cannot be read is reported, and nothing stands in for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextvit.data.folders import Split
from nextvit.data.images import ImageRejected, as_taken, read_image
from nextvit.metadata import Metadata

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Batch:
    """images: what the model takes, (B, ...); targets, indices: int64 (B,); rejected: (index, why)."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    rejected: tuple[tuple[int, str], ...]

    def pin_memory(self) -> "Batch":
        """What a DataLoader calls for copies to a GPU that need not be waited for."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


class _Images(Dataset):
    def __init__(self, split: Split, transform: Transform, seed: tuple[int, ...] | None):
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            image = read_image(self.split.files[index])
        except ImageRejected as error:
            return index, str(error)
        if self.seed is None:
            return index, self.transform(image)
        # A sample's augmentation depends on the seed, the epoch and the sample: not on workers or on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                int(np.random.SeedSequence((*self.seed, index)).generate_state(1, np.uint64)[0])
            )
            return index, self.transform(image)


class _Collate:
    def __init__(self, split: Split):
        self.split = split

    def __call__(self, samples: list[tuple[int, Tensor | str]]) -> Batch:
        good = [(index, image) for index, image in samples if isinstance(image, Tensor)]
        indices = torch.tensor([index for index, _ in good], dtype=torch.int64)
        return Batch(
            images=torch.stack([image for _, image in good]) if good else torch.empty(0),
            targets=torch.tensor([self.split.targets[index] for index, _ in good], dtype=torch.int64),
            indices=indices,
            rejected=tuple((index, why) for index, why in samples if isinstance(why, str)),
        )


def eval_transform(metadata: Metadata) -> Transform:
    """What evaluation and prediction give to a model, as a tensor."""
    return partial(_as_taken, metadata=metadata)


def _as_taken(image: Image.Image, metadata: Metadata) -> Tensor:
    return torch.from_numpy(as_taken(image, metadata))


def batches(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    order: Sequence[int] | np.ndarray | None = None,
    seed: tuple[int, ...] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of the split.

    order: indices to go through; None: all, in order. seed: numbers that the augmentation depends on, such as
    the run's seed and the epoch; None: there is no augmentation.
    """
    loader = DataLoader(
        _Images(split, transform, seed),
        batch_size=batch_size,
        sampler=list(order) if order is not None else None,
        num_workers=workers,
        collate_fn=_Collate(split),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of its own: the loader would draw from the one that the model uses
    )
    return iter(loader)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)
