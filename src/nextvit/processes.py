"""Training in several processes, as `torchrun` starts them; with one process every function here does nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextvit.backbone import Stacked
from nextvit.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # validation and saving may take as long on one process while others wait


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int = 0
    count: int = 1
    here: int = 0  # rank among those of this machine: the GPU that is this one's
    control: Any = None  # a group on the CPU, for what is no tensor of the network

    @property
    def first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise, over all processes."""
        if self.count == 1:
            return values
        total = torch.from_numpy(np.array(values))
        dist.all_reduce(total, group=self.control)
        return total.numpy()

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank; on every process."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """For all the others to come here."""
        if self.count > 1:
            dist.barrier(group=self.control)

    def share(self, indices: np.ndarray) -> np.ndarray:
        """This process's part of a batch.

        A batch is mixed with itself reversed, so an image and its partner are on one process: the parts are taken from
        both ends. All processes together then compute what one would.
        """
        half = len(indices) // (2 * self.count)
        if self.count == 1:
            return indices
        end = len(indices) - self.rank * half
        return np.concatenate([indices[self.rank * half : (self.rank + 1) * half], indices[end - half : end]])

    def same_buffers(self, model: nn.Module) -> None:
        """Those of the first process everywhere: each has kept BatchNorm's statistics of its own images."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def together(self, model: nn.Module, *, shard: bool) -> nn.Module:
        """The model as it is trained: gradients averaged over the processes, and weights in shards if asked for."""
        if shard:
            if self.count == 1:
                raise UserError("--shard spreads the weights over several processes; start them with torchrun.")
            from torch.distributed.fsdp import fully_shard  # takes a second

            model.to(memory_format=torch.contiguous_format)  # the only one that FSDP2 cuts
            for block in model.modules():
                if isinstance(block, Stacked):
                    fully_shard(block)
            fully_shard(model)
            return model
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of this run, by the variables that torchrun sets; left again at the end."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    here = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu and here >= torch.cuda.device_count():
        raise UserError(
            f"process {here} of this machine has no GPU: there are {torch.cuda.device_count()}; start fewer."
        )
    if gpu:
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    try:
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield Processes(dist.get_rank(), count, here, control)
    finally:
        dist.destroy_process_group()


class Agreement:
    """Whether any process was told to stop: all learn it at the same step, one step after, without waiting."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.asked: tuple[Tensor, Any] | None = None

    def __call__(self, told: int) -> int:
        """told: a signal's number or 0. Returns the largest that anyone was told by the step before (alone: now)."""
        if self.processes.count == 1:
            return told
        answer = 0
        if self.asked is not None:
            number, work = self.asked
            work.wait()
            answer = int(number)
        number = torch.tensor(told)
        self.asked = number, dist.all_reduce(number, dist.ReduceOp.MAX, group=self.processes.control, async_op=True)
        return answer


# ---- BatchNorm over all processes ------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """Over all processes; what each one's loss asks of the sum, it asks of everybody's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of all processes' images; torch's own takes GPUs only."""

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(x)
        over = [dim for dim in range(x.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        total = _Sum.apply(torch.cat([x.sum(over), count]))
        mean = total[:-1] / total[-1]
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(over)) / total[-1]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = variance * (total[-1] / (total[-1] - 1))
                self.running_mean.lerp_(mean, self.momentum or 0.1)
                self.running_var.lerp_(unbiased, self.momentum or 0.1)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape)


def synchronise_batchnorm(model: nn.Module) -> nn.Module:
    """The same network with BatchNorm over all processes, in place."""
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncedBatchNorm  # the same attributes; only forward differs
    return model
