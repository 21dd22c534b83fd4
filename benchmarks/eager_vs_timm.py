"""Our eager forward pass and whole training step beside timm's nextvit_small, in one interleaved run.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/eager_vs_timm.py

A training step is all that happens to a batch of uint8 images of in1k_300e: normalise, erase, mixup or cutmix with
smoothed labels, forward, soft-target cross entropy, backward, clip at 5, AdamW. Ours is the training loop's own,
timm's that of its train script, of timm's own parts. The first row of each pair is timm's; a ratio below 1 means that
ours takes less time.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import timm
import timm.data
import timm.loss
import timm.optim
import timm.utils
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader

import nextvit
from nextvit.benchmark import benchmark
from nextvit.data.loader import Batch
from nextvit.metadata import Metadata
from nextvit.processes import ALONE
from nextvit.recipe import read_recipe
from nextvit.run import Machine, prepare
from nextvit.runtime.session import Setup
from nextvit.train import train_step

CLASSES = 10


class Call:
    """A session whose call is any function of a batch."""

    def __init__(self, name: str, function: Callable[[torch.Tensor], object]):
        self.metadata = Metadata("nextvit_small")
        self.setup = Setup(name, "cpu", "fp32", torch.get_num_threads())
        self.function = function

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.function(torch.from_numpy(batch))
        return batch


@contextmanager
def forward(size: int) -> Iterator[list[Callable]]:
    theirs, ours = timm.create_model("nextvit_small"), nextvit.create_model("nextvit_small")
    ours.load_state_dict(theirs.state_dict())
    yield [torch.inference_mode()(model.eval()) for model in (theirs, ours)]


@contextmanager
def step(size: int) -> Iterator[list[Callable]]:
    """Both take any images and train on the same uint8 ones, of the same size."""
    pixels = torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (size,))
    with tempfile.TemporaryDirectory() as place:
        for label in range(CLASSES):
            for index in range(max(5, 2 * size // CLASSES)):
                path = Path(place, "data", str(label), f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
        recipe = read_recipe("in1k_300e", [f"batch_size={size}", "mixing.images=null"])
        machine = Machine(device="cpu", workers=0)
        run = prepare(Path(place, "data"), recipe, Path(place, "run"), machine, ALONE, resume=False, changes=())
        run.network.train()
        numbers = count()

        def ours(_: torch.Tensor) -> None:
            run.position.step = next(numbers)
            train_step(run, [Batch(pixels, labels, torch.arange(size), ())], 1e-4)

        yield [timm_step(pixels, labels, size), ours]


def timm_step(pixels: torch.Tensor, labels: torch.Tensor, size: int) -> Callable[[torch.Tensor], None]:
    model = timm.create_model("nextvit_small", num_classes=CLASSES, drop_path_rate=0.1).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.1)
    loss_function = timm.loss.SoftTargetCrossEntropy()
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    batch = (pixels.permute(0, 3, 1, 2).contiguous(), labels)
    loader = PrefetchLoader([batch], device=torch.device("cpu"), re_prob=0.25, re_mode="pixel")

    def step(_: torch.Tensor) -> None:
        for images, targets in loader:
            mixed, soft = mixup(images, targets)
            loss = loss_function(model(mixed), soft)
            optimizer.zero_grad()
            loss.backward()
            timm.utils.dispatch_clip_grad(model.parameters(), value=5.0, mode="norm")
            optimizer.step()
            loss.item()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    flags = parser.parse_args()
    for what, pair, sizes in (("forward", forward, (1, 8)), ("training step", step, (8,))):
        for size in sizes:
            with pair(size) as functions:
                sessions = [(name, Call(name, f)) for name, f in zip(("timm", "nextvit"), functions, strict=True)]
                for row in benchmark(sessions, batches=[size], image_size=224, rounds=flags.rounds):
                    print(
                        f"{what}, batch {size}, {row.model}: {row.median_ms:.1f} ms, time ratio {row.ratio:.3f} "
                        f"({row.ratio_low:.3f} to {row.ratio_high:.3f})",
                        flush=True,
                    )
