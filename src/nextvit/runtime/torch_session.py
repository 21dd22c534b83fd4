"""A model on torch, eager or folded."""

import copy

import numpy as np
import torch
from torch import nn

from nextvit.backbone import NextViT
from nextvit.devices import DTYPES, pick_device, pick_precision, set_threads
from nextvit.folding import fold
from nextvit.runtime.session import Setup


class TorchSession:
    """`folded`: with every BatchNorm merged, as it is exported; else as it was trained."""

    fixed_batch: int | None = None

    def __init__(self, model: NextViT, *, device: str, threads: int | None, precision: str | None, folded: bool = True):
        place = pick_device(device)
        chosen = pick_precision(precision or "fp32", place)
        self.metadata = model.metadata
        self.setup = Setup(
            f"torch {torch.__version__.partition('+')[0]}{', folded' if folded else ', eager'}",
            str(place),
            chosen,
            set_threads(threads),
        )
        self._dtype = DTYPES[chosen]
        self._model = _in_dtype(fold(model) if folded else copy.deepcopy(model).eval(), self._dtype).to(place)
        self._place = place

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        set_threads(self.setup.threads)  # they are the process's, and another session may have other ones
        with torch.inference_mode():
            images = torch.from_numpy(batch).to(self._place, self._dtype, memory_format=torch.channels_last)
            return self._model(images).float().cpu().numpy()


def _in_dtype(model: NextViT, dtype: torch.dtype) -> NextViT:
    """All in `dtype` but BatchNorm, whose statistics need fp32 and whose operators take both."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.float()
    return model
