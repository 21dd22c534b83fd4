"""The run folder: what a run saves, the newest of it that is whole, and who may write there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from nextvit.errors import UserError
from nextvit.metadata import Metadata
from nextvit.optimization import all_finite
from nextvit.progress import say
from nextvit.weights import WeightFile, read_weights, save_weights

LAST, PREVIOUS, BEST, WEIGHTS = "last.ckpt", "last.prev.ckpt", "best.ckpt", "model.safetensors"
OWNER, LOCK = ".owner", ".lock"


@dataclass(frozen=True)
class Epoch:
    """A row of metrics.csv."""

    epoch: int  # from 1
    lr: float  # at the last step of the epoch
    train_loss: float  # mean over the epoch's images, against the targets as they were smoothed and mixed
    val: dict[str, float]  # the numbers of the task on the validation images
    ema: dict[str, float] | None  # the same of the running mean of the weights
    images: int  # seen in training so far

    @property
    def merit(self) -> tuple[float, float]:
        """That of the weights, or of their running mean where that is better."""
        return max(merit(numbers) for numbers in (self.val, self.ema) if numbers is not None)

    @property
    def by_mean(self) -> bool:
        """Whether that was reached by the running mean."""
        return self.merit != merit(self.val)

    def row(self) -> dict[str, Any]:
        """As metrics.csv has it: val_loss, ema_top1."""
        of = {f"{name}_{key}": n for name in ("val", "ema") for key, n in (getattr(self, name) or {}).items()}
        return {
            "epoch": self.epoch,
            "lr": self.lr,
            "train_loss": self.train_loss,
            **of,
            "images": self.images,
        }


def merit(numbers: dict[str, float]) -> tuple[float, float]:
    """What decides between epochs, the greater the better: top-1, and of equal ones the loss; mIoU and accuracy; AP of
    boxes and AP50.
    """
    if "box_ap" in numbers:
        return numbers["box_ap"], numbers["box_ap50"]
    if "miou" in numbers:
        return numbers["miou"], numbers["accuracy"]
    return numbers["top1"], -numbers["loss"]


@dataclass
class Position:
    """Where a run is. Everything drawn at random is a function of it, so no generator's state is kept."""

    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done in the next one
    steps: int = 0  # in all
    images: int = 0  # seen so far
    loss_sum: float = 0.0  # over the images of the epoch that has begun
    loss_images: int = 0
    history: list[Epoch] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # file -> why


@contextmanager
def owned(folder: Path, *, new: bool) -> Iterator[None]:
    """Hold the run folder: a second process that wants to write there is told which has it.

    new: it must be empty. A folder that is made here and stays empty goes away again.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; take another --output.") from error
    note = folder / OWNER
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()  # by the system's own means: that of a dead process is free
    except Timeout as error:
        owner = note.read_text() if note.exists() else "?"
        raise UserError(f"process {owner} is writing to {folder}; wait for it, or take another --output.") from error
    try:
        if new and [path for path in folder.iterdir() if path.name not in (OWNER, LOCK)]:
            raise UserError(f"{folder} exists; go on with it by --resume {folder}, or take another --output.")
        note.write_text(str(os.getpid()))
        yield
    finally:
        note.unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: Metadata, state: dict[str, Any]) -> None:
    """Tensors, and the rest as JSON; a last checkpoint becomes the one before it. No number that is not finite."""
    if not all_finite(tensors.values()):
        raise RuntimeError(f"{path} would hold numbers that are not finite, and was not written")

    def keep_the_one_before() -> None:
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))

    save_weights(path, tensors, metadata, state, before=keep_the_one_before)


def newest_checkpoint(run: Path) -> WeightFile:
    """last.ckpt, or the one before it, or the best one, where that is damaged or missing."""
    problems = []
    for name in (LAST, PREVIOUS, BEST):  # in the first epoch the best may be there alone
        if (run / name).exists():
            try:
                saved = read_weights(run / name)
                if saved.state is not None:
                    if name != LAST:  # else the next save would move the damaged one over the good one
                        (run / LAST).unlink(missing_ok=True)
                    return saved
                problems.append(f"{run / name} is no training checkpoint")
            except UserError as error:
                problems.append(str(error))
                say(f"warning: {error}")
    raise UserError(f"there is nothing to resume in {run}: {'; '.join(problems) or 'it has no checkpoint'}.")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be in shards over the processes, put together; all of them must call this."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, laid out as the parameter is: in memory, which a fused optimiser walks, and over processes."""
    if tensor.shape != parameter.shape:
        return tensor  # a step count
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        there = cast(DTensor, parameter)
        return distribute_tensor(tensor.to(parameter.device), there.device_mesh, there.placements)
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer.PARAMETER.MOMENT` -> tensor."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = whole(value)
    return found


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the moments back; UserError where those of a parameter are missing."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {k.removeprefix(prefix): like(t, parameter) for k, t in tensors.items() if k.startswith(prefix)}
        if moments:
            optimizer.state[parameter] = moments
        elif id(parameter) in parameters and any(key.startswith("optimizer.") for key in tensors):
            raise UserError(f"the checkpoint has nothing of the optimiser for {name}; start a new run.")


def read_position(state: dict[str, Any]) -> Position:
    known = {f.name: state[f.name] for f in fields(Position)}
    return Position(**{**known, "history": [Epoch(**row) for row in state["history"]]})
