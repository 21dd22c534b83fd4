"""From a split to batches. An image that cannot be read is reported, and nothing stands in for it."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextvit.data.images import ImageRejected, as_taken
from nextvit.data.seeds import seeded
from nextvit.data.split import ReadImage, Split
from nextvit.devices import cpu_count
from nextvit.metadata import Metadata
from nextvit.progress import say

NOT_PREPARED = "could not be prepared"
AHEAD = 2  # batches that each loading process may be ahead
Transform = Callable[[Any], Any]  # of what `Split.sample` gives; to a tensor, or to an object of a task's own


@dataclass(frozen=True)
class Batch:
    """images: as the transform gives them, stacked where they are tensors; targets, indices: int64 (B,); rejected:
    (index, why).
    """

    images: Any
    targets: Tensor
    indices: Tensor
    rejected: tuple[tuple[int, str], ...]

    def pin_memory(self) -> "Batch":
        """What a DataLoader calls for copies to a GPU that need not be waited for."""
        images = self.images.pin_memory() if isinstance(self.images, Tensor) else self.images
        return replace(self, images=images, targets=self.targets.pin_memory())


class _Images(Dataset):
    def __init__(self, split: Split, transform: Transform, seed: tuple[int, ...] | None):
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        drawn, index = divmod(number, len(self))
        try:
            with seeded(*self.seed, drawn, index) if self.seed is not None else nullcontext():
                return index, self.transform(self.split.sample(index))
        except ImageRejected as error:
            return index, str(error)
        except Exception as error:  # a fault of ours, which would be told without the image from another process
            raise RuntimeError(f"{self.split.files[index]} {NOT_PREPARED} ({type(error).__name__}: {error})") from error


class _Collate:
    def __init__(self, split: Split):
        self.split = split

    def __call__(self, samples: list[tuple[int, Any]]) -> Batch:
        good = [(index, image) for index, image in samples if not isinstance(image, str)]
        indices = torch.tensor([index for index, _ in good], dtype=torch.int64)
        return Batch(
            images=together([image for _, image in good]),
            targets=torch.tensor([self.split.targets[index] for index, _ in good], dtype=torch.int64),
            indices=indices,
            rejected=tuple((index, why) for index, why in samples if isinstance(why, str)),
        )


def together(samples: Sequence[Any]) -> Any:
    """Samples of a batch: tensors stacked, others side by side."""
    if not samples:
        return torch.empty(0)
    return torch.stack(list(samples)) if isinstance(samples[0], Tensor) else list(samples)


def eval_transform(metadata: Metadata) -> Transform:
    """What evaluation and prediction give to a model, as a tensor."""
    return partial(_as_taken, metadata=metadata)


def _as_taken(read: ReadImage, metadata: Metadata) -> Tensor:
    return torch.from_numpy(as_taken(read(None), metadata))


def batches(
    split: Split,
    transform: Transform,
    *,
    batch_size: int = 1,
    order: np.ndarray | Sequence[np.ndarray] | None = None,
    seed: tuple[int, ...] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of the split.

    order: numbers of samples to go through, or a sequence of such, one for each batch, whatever batch_size is; number
    n is image n % len(split), augmented for the time n // len(split); None: all images once, in order. seed: numbers
    that the augmentation depends on, such as the run's seed; None: there is none.
    """
    if order is None:
        order = np.arange(len(split))
    if isinstance(order, np.ndarray):
        order = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    loader = DataLoader(
        _Images(split, transform, seed),
        prefetch_factor=AHEAD if workers else None,
        batch_sampler=[indices.tolist() for indices in order],
        num_workers=workers,
        collate_fn=_Collate(split),
        pin_memory=pin_memory,
        worker_init_fn=_deaf_once,
        generator=torch.Generator(),  # of its own: the loader would draw from the one that the model uses
    )
    return iter(loader)


def _deaf_once(_: int) -> None:
    """A loading process goes on at the first SIGTERM, which its whole group is sent: the step under way needs it."""

    def heard(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, heard)


def loaders(workers: int | None, device: torch.device, batch_bytes: int) -> int:
    """How many processes load images: as asked for, or one beside a CPU that trains and up to eight for a GPU.

    They hand their batches on in shared memory; where there is not enough of it there are none, with a note.
    """
    if workers is None:
        share = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(8, share) if device.type == "cuda" else 1
    shared = Path("/dev/shm")
    if workers and shared.is_dir():
        free, needed = shutil.disk_usage(shared).free, AHEAD * workers * batch_bytes
        if free < needed:
            say(
                f"note: {shared} has {free / 1e6:.0f} MB free and {workers} loading processes need {needed / 1e6:.0f} "
                "MB, so this process loads the images itself, which is slower; a container takes --shm-size."
            )
            return 0
    return workers
