"""A model on torch: as it was trained, folded, compiled, or with its kernels recorded."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit.devices import DTYPES, insist_on_compiler, pick_device, pick_precision, set_threads
from nextvit.errors import NotHere
from nextvit.folding import fold
from nextvit.networks import Network, as_arrays, as_asked
from nextvit.runtime.session import Setup

MANY = 10_000  # compilations in one process
KINDS = ("eager", "folded", "compiled", "graph")
WARM_UPS = 3  # calls before a recording


class TorchSession:
    """kind: "eager" as it was trained; "folded" with every BatchNorm merged; "compiled" that, by torch.compile; "graph"
    as it was trained, its kernels recorded once and launched together, on CUDA alone.
    """

    fixed_batch: int | None = None

    def __init__(
        self, model: Network, *, device: str, threads: int | None, precision: str | None, kind: str = "folded"
    ):
        place = pick_device(device)
        chosen = pick_precision(precision or "fp32", place)
        if kind == "graph" and place.type != "cuda":
            raise NotHere(f"graph records kernels of NVIDIA GPUs, and this is {place}; take folded or compiled.")
        if kind == "graph" and model.metadata.task == "detect":
            raise NotHere("a detector's work depends on what it finds, so it cannot be recorded; take folded.")
        self.metadata = model.metadata
        self.setup = Setup(
            f"torch {torch.__version__.partition('+')[0]}, {kind}",
            str(place),
            chosen,
            set_threads(threads),
        )
        self._dtype = DTYPES[chosen]
        network = copy.deepcopy(model).eval() if kind in ("eager", "graph") else fold(model)
        self._model: Callable[[Tensor], Any] = as_asked(_in_dtype(network, self._dtype).to(place))
        if kind == "compiled":
            if place.type == "cpu":
                insist_on_compiler()
            torch._dynamo.config.recompile_limit = MANY  # a shape each; behind the limit it would run eager in silence
            torch._dynamo.config.accumulated_recompile_limit = MANY
            self._model = torch.compile(self._model, dynamic=False)
        if kind == "graph":
            self._model = _Recorded(self._model)
        self._place = place

    def __call__(self, batch: np.ndarray) -> Any:
        set_threads(self.setup.threads)  # they are the process's, and another session may have other ones
        with torch.inference_mode():
            return as_arrays(self._model(self._placed(batch)))

    def resident(self, batch: np.ndarray) -> Callable[[], Any]:
        images = self._placed(batch)

        def call() -> Any:
            with torch.inference_mode():
                found = self._model(images)
            if self._place.type != "cpu":
                torch.accelerator.synchronize(self._place)
            return found

        return call

    def _placed(self, batch: np.ndarray) -> Tensor:
        return torch.from_numpy(batch).to(self._place, self._dtype, memory_format=torch.channels_last)


class _Recorded:
    """A network on CUDA as a graph of kernels for each shape of input. What it returns is overwritten by the next call.

    A launch from Python takes longer than most kernels of one image, so a network that launches them one by one tells
    the speed of Python. cuDNN searches for its fastest kernels before they are recorded.
    """

    def __init__(self, network: Callable[[Tensor], Any]):
        self._network = network
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}

    def __call__(self, images: Tensor) -> Any:
        with torch.cuda.device(images.device):
            if images.shape not in self._graphs:
                self._graphs[images.shape] = self._record(images.clone())
            graph, given, found = self._graphs[images.shape]
            given.copy_(images)
            graph.replay()
        return found

    def _record(self, given: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        searched = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # what first calls set up cannot be recorded
                for _ in range(WARM_UPS):
                    self._network(given)
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(graph, stream=beside):
                found = self._network(given)
        finally:
            torch.backends.cudnn.benchmark = searched
        return graph, given, found


def _in_dtype(model: Network, dtype: torch.dtype) -> Network:
    """All in `dtype` but BatchNorm, whose statistics need fp32 and whose operators take both."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.float()
    return model
