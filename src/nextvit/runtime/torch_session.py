"""A model on torch, eager or folded."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from nextvit.devices import DTYPES, insist_on_compiler, pick_device, pick_precision, set_threads
from nextvit.folding import fold
from nextvit.networks import Network, as_arrays, as_asked
from nextvit.runtime.session import Setup

MANY = 10_000  # compilations in one process
KINDS = ("eager", "folded", "compiled")


class TorchSession:
    """kind: "eager" as it was trained; "folded" with every BatchNorm merged; "compiled" that, by torch.compile."""

    fixed_batch: int | None = None

    def __init__(
        self, model: Network, *, device: str, threads: int | None, precision: str | None, kind: str = "folded"
    ):
        place = pick_device(device)
        chosen = pick_precision(precision or "fp32", place)
        self.metadata = model.metadata
        self.setup = Setup(
            f"torch {torch.__version__.partition('+')[0]}, {kind}",
            str(place),
            chosen,
            set_threads(threads),
        )
        self._dtype = DTYPES[chosen]
        network = copy.deepcopy(model).eval() if kind == "eager" else fold(model)
        self._model = as_asked(_in_dtype(network, self._dtype).to(place))
        if kind == "compiled":
            if place.type == "cpu":
                insist_on_compiler()
            torch._dynamo.config.recompile_limit = MANY  # a shape each; behind the limit it would run eager in silence
            torch._dynamo.config.accumulated_recompile_limit = MANY
            self._model.compile(dynamic=False)
        self._place = place

    def __call__(self, batch: np.ndarray) -> Any:
        set_threads(self.setup.threads)  # they are the process's, and another session may have other ones
        with torch.inference_mode():
            images = torch.from_numpy(batch).to(self._place, self._dtype, memory_format=torch.channels_last)
            return as_arrays(self._model(images))


def _in_dtype(model: Network, dtype: torch.dtype) -> Network:
    """All in `dtype` but BatchNorm, whose statistics need fp32 and whose operators take both."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.float()
    return model
