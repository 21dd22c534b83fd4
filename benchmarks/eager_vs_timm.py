"""Our eager forward pass and training step beside timm's nextvit_small, in one interleaved run.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/eager_vs_timm.py

The first row of each pair is timm's; a ratio below 1 means that ours takes less time.
"""

from collections.abc import Callable

import numpy as np
import timm
import torch
from torch import nn

import nextvit
from nextvit.benchmark import benchmark
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup


class Call:
    """A session whose call is any function of a batch."""

    def __init__(self, name: str, function: Callable[[torch.Tensor], object]):
        self.metadata = Metadata("nextvit_small")
        self.setup = Setup(name, "cpu", "fp32", torch.get_num_threads())
        self.function = function

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.function(torch.from_numpy(batch))
        return batch


def forward(model: nn.Module) -> Callable[[torch.Tensor], object]:
    return torch.inference_mode()(model.eval())


def training_step(model: nn.Module) -> Callable[[torch.Tensor], object]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-5)

    def step(images: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(images).logsumexp(1).mean().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    for what, wrap in (("forward", forward), ("training step", training_step)):
        for batch in (1, 8) if wrap is forward else (8,):
            theirs, ours = timm.create_model("nextvit_small"), nextvit.create_model("nextvit_small")
            ours.load_state_dict(theirs.state_dict())
            rows = benchmark(
                [("timm", Call("timm", wrap(theirs))), ("nextvit", Call("nextvit", wrap(ours)))],
                batches=[batch],
                image_size=224,
                rounds=12,
            )
            for row in rows:
                print(
                    f"{what}, batch {batch}, {row.model}: {row.median_ms:.1f} ms, time ratio {row.ratio:.3f} "
                    f"({row.ratio_low:.3f} to {row.ratio_high:.3f})"
                )
