"""A run before its first step: what it learns from, what it starts with or goes on from, and what it computes on."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit import checkpoints
from nextvit.augmentation import Normalise
from nextvit.checkpoints import BEST, WEIGHTS, Position, newest_checkpoint
from nextvit.create import create_model
from nextvit.data.check import quick_check
from nextvit.data.loader import loaders
from nextvit.data.sets import read_split
from nextvit.data.split import Split, with_unlabelled
from nextvit.decide import decided
from nextvit.detector import Detector
from nextvit.devices import pick_device, pick_precision, set_threads
from nextvit.errors import UserError
from nextvit.files import sweep, write_text
from nextvit.heads.boxes import Sampling
from nextvit.learning import LEARNING, Learning
from nextvit.metadata import Metadata
from nextvit.networks import Network, of_size
from nextvit.objective import Objective
from nextvit.optimization import RunningMean, freeze, insist_on_blocks, parameter_groups
from nextvit.processes import Processes, synchronise_batchnorm
from nextvit.progress import say
from nextvit.recipe import Recipe, changed, flat, from_dict, override, to_dict
from nextvit.weights import WeightFile, read_weights, save_weights


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and what else is the user's and not the recipe's."""

    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    workers: int | None = None  # processes that load images; None: one beside a CPU that trains, up to 8 for a GPU
    deterministic: bool = False
    compile: bool = False
    shard: bool = False  # FSDP2: weights and moments in shards over the processes
    logs: tuple[str, ...] = ()  # beside metrics.csv and TensorBoard: wandb, mlflow
    profile: bool = False
    allow_bad: bool = False  # train although more than 1 % of the images cannot be read
    strict_data: bool = False  # do not, if any cannot, or if an image is in train and val both


AUTOMATIC = Machine()


@dataclass
class Outcome:
    """What a step came to on this process, on its way from the device."""

    epoch: int
    step: int
    rate: float
    indices: list[int]
    values: Tensor  # (2,): sum of the images' losses, norm of the gradient
    ready: torch.cuda.Event | None = None


@dataclass
class Run:
    """Everything that the loop works on."""

    recipe: Recipe
    data: str
    folder: Path
    processes: Processes
    learning: Learning
    training: Split
    validation: Split
    model: Network
    network: nn.Module  # the model as it is called: compiled, in step with other processes
    frozen: list[nn.Module]
    mean: RunningMean | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    objective: Objective
    device: torch.device
    precision: str
    batch_size: int  # images a step, over all processes: as the recipe says, or all there are
    workers: int
    position: Position
    outcomes: list[Outcome] = field(default_factory=list)  # of steps that were not looked at yet
    seen: np.ndarray = field(default_factory=lambda: np.zeros(2))  # on this process since the last save: images, losses
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Of the whole run."""
        return self.recipe.schedule.epochs or 1

    @property
    def pass_steps(self) -> int:
        """That see all images once; see `Split.batches`."""
        return self.training.steps(self.batch_size)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.recipe.schedule.steps_per_epoch or self.pass_steps


def prepare(
    data: str | Path,
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    processes: Processes,
    *,
    resume: bool,
    changes: Sequence[str],
) -> Run:
    """Check everything before anything is written, and build the run as it starts or as it was left."""
    saved = newest_checkpoint(folder) if resume else None
    learning = LEARNING[recipe.task]
    training, validation = _read(data, recipe, learning)
    wanted, recipe = recipe, decided(recipe, training)
    if saved is not None:
        _insist_on_same(
            saved, recipe, training, validation, folder, meant={c.partition("=")[0].strip() for c in changes}
        )
        recipe = decided(override(recipe, changes), training)
        machine = _as_begun(machine, saved, folder)
    batch_size = _batch_size(data, recipe, len(training), processes)
    device, precision = _set_up(machine)
    _look_at(training, validation, machine, processes)

    torch.manual_seed(recipe.seed)
    model = _model(recipe, training.labels, saved, told=wanted.weights is not None).to(device)
    insist_on_blocks(model, recipe.optimizer)
    if recipe.sync_batchnorm and processes.count > 1:
        synchronise_batchnorm(model)
    frozen = freeze(model, recipe.optimizer.frozen_stages)
    mean = _running_mean(model, recipe, saved)
    network = processes.together(model, shard=machine.shard)
    if mean is not None and machine.shard:
        processes.together(mean.model, shard=True)
    if machine.compile:  # of a detector what has one plan for all images: how many boxes there are differs each time
        (model.backbone if isinstance(model, Detector) else network).compile()
    groups = parameter_groups(model, recipe.optimizer)
    run = Run(
        recipe=recipe,
        data=str(data),
        folder=folder,
        processes=processes,
        learning=learning,
        training=training,
        validation=validation,
        model=model,
        network=network,
        frozen=frozen,
        mean=mean,
        optimizer=torch.optim.AdamW(groups, lr=recipe.optimizer.peak, fused=device.type != "mps"),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        objective=learning.objective(recipe, training, Normalise(model.metadata.preprocess, device), processes.count),
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=loaders(machine.workers, device, learning.blank(recipe).nbytes * batch_size // processes.count),
        position=Position(),
    )
    if saved is not None:
        _go_on(run, saved)
    if processes.first:
        write_text(folder / "recipe.yaml", recipe.to_yaml())
    _say_what(run)
    return run


def new_run_folder(data: str | Path, recipe: Recipe) -> Path:
    """runs/DATA-MODEL, with a number where that is taken."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).resolve().name) if str(data) != "demo" else "demo"
    name = stem if recipe.model is None else f"{stem}-{recipe.model.removeprefix('nextvit_')}"
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder = Path("runs") / f"{name}.{number}"
        number += 1
    return folder


# ---- its state, to and from a checkpoint -----------------------------------------------------------------------------


def save(run: Run, name: str) -> None:
    """A checkpoint of the run, and with the best the weights alone. All processes call it; the first one writes."""
    gather(run)
    tensors = {f"model.{key}": checkpoints.whole(tensor) for key, tensor in run.model.state_dict().items()}
    if run.mean is not None:
        tensors |= {f"ema.{key}": checkpoints.whole(tensor) for key, tensor in run.mean.model.state_dict().items()}
    tensors |= checkpoints.optimizer_tensors(run.model, run.optimizer)
    if not run.processes.first:
        return
    state = {
        **asdict(run.position),
        "batch_size": run.batch_size,
        "data": _fingerprint(run.training, run.validation),
        "recipe": to_dict(run.recipe),
        "scaler": run.scaler.state_dict(),
        "precision": run.precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    metadata = replace(run.model.metadata, recipe=run.recipe.sha256)
    checkpoints.save_checkpoint(run.folder / name, tensors, metadata, state)
    if name == BEST:
        save_best(run.folder, WeightFile(str(run.folder / BEST), tensors, metadata, state))


def gather(run: Run) -> None:
    """Add what all processes saw since the last time to the position; BatchNorm's statistics are the first one's."""
    at = run.position
    images, losses = run.processes.sum(run.seen)
    at.images += int(images)
    at.loss_images += int(images)
    at.loss_sum += float(losses)
    for found in run.processes.gather(run.rejected):
        at.rejected |= found
    run.seen, run.rejected = np.zeros(2), {}
    run.processes.same_buffers(run.model)


def save_best(folder: Path, best: WeightFile) -> None:
    """model.safetensors: the weights of the best checkpoint, or their running mean where that was the better one."""
    state = _state(best)
    prefix = "ema." if checkpoints.read_position(state).history[-1].by_mean else "model."
    tensors = {key.removeprefix(prefix): value for key, value in best.tensors.items() if key.startswith(prefix)}
    recipe = from_dict(state["recipe"])
    metadata = replace(best.metadata or Metadata(recipe.variant), recipe=recipe.sha256)
    save_weights(folder / WEIGHTS, tensors, metadata)


def _go_on(run: Run, saved: WeightFile) -> None:
    """Moments, scaler and position as they were saved; the model's weights are there already."""
    state = _state(saved)
    checkpoints.restore_optimizer(run.model, run.optimizer, saved.tensors)
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.position = checkpoints.read_position(state)
    if run.recipe.schedule.steps_per_epoch is None:  # by images, which keep their order whatever the size of a step
        run.position.step = run.position.step * state["batch_size"] // run.batch_size
    if run.processes.first:
        sweep(run.folder)
        if not (run.folder / WEIGHTS).exists() and (run.folder / BEST).exists():
            save_best(run.folder, read_weights(run.folder / BEST))
    done = f"{run.position.epoch} of {run.epochs} epochs done, at step {run.position.step}"
    say(f"resuming {run.folder}: {done}.")


def _state(saved: WeightFile) -> dict[str, Any]:
    return saved.state or {}


# ---- parts of `prepare` ----------------------------------------------------------------------------------------------


def _read(data: str | Path, recipe: Recipe, learning: Learning) -> tuple[Split, Split]:
    """Images to train on, without labels too where the recipe has such, and to validate on."""
    training = learning.chosen(recipe, read_split(data, "train", task=recipe.task))
    if len(training.labels) < 2 and recipe.task != "detect":
        raise UserError(f"{data} has one class only ({training.labels[0]}); a classifier needs two or more.")
    _insist_on_two_each(data, len(training), 1)
    validation = read_split(data, "val", training.labels, recipe.task)
    if recipe.distillation.unlabelled is not None:
        training = with_unlabelled(training, recipe.distillation.unlabelled)
    return training, validation


def _look_at(training: Split, validation: Split, machine: Machine, processes: Processes) -> None:
    """The quick part of `data check`, by the first process; where it refuses the data, all of them end."""
    problem: UserError | None = None
    if processes.first:
        try:
            checked = quick_check(training, validation, allow_bad=machine.allow_bad, strict=machine.strict_data)
            for note in [*training.notes, *validation.notes, *checked]:
                say(f"note: {note}.")
        except UserError as error:
            problem = error
    if any(processes.gather(problem is not None)):
        raise problem or SystemExit(2)  # the first one tells why


def _fingerprint(training: Split, validation: Split) -> dict[str, Any]:
    return {
        "labels": list(training.labels),
        "images": [len(training), len(validation)],
        "files": [training.sha256, validation.sha256],
    }


def _insist_on_same(
    saved: WeightFile, recipe: Recipe, training: Split, validation: Split, folder: Path, *, meant: set[str]
) -> None:
    """Data and recipe are those that the run was begun with, but for the keys that are meant to change."""
    state = _state(saved)
    if flat(state.get("recipe", {})).keys() != flat(to_dict(recipe)).keys():
        raise UserError(f"{folder} was begun by an older version; start a new run with --weights {folder / WEIGHTS}.")
    for key, now in _fingerprint(training, validation).items():
        before = state["data"][key]
        if before != now:
            raise UserError(
                f"{folder} was trained with other {key} ({before!s:.80}, now {now!s:.80}); give the same data, or "
                f"start a new run with --weights {folder / WEIGHTS}."
            )
    for key, (before, now) in changed(state["recipe"], to_dict(recipe)).items():
        if key in meant:
            continue
        raise UserError(
            f"{folder / 'recipe.yaml'} has {key} = {now!r} and the run was begun with {before!r}; put it back, or say "
            f"that you mean it: --set {key}={now}."
        )


def _as_begun(machine: Machine, saved: WeightFile, folder: Path) -> Machine:
    """In the precision that the run had, unless another is asked for; deterministic if it was."""
    state = _state(saved)
    if machine.precision not in ("auto", state["precision"]):
        say(f"note: {folder} was begun in {state['precision']} and goes on in {machine.precision}.")
    precision = state["precision"] if machine.precision == "auto" else machine.precision
    return replace(machine, precision=precision, deterministic=machine.deterministic or state["deterministic"])


def _batch_size(data: str | Path, recipe: Recipe, images: int, processes: Processes) -> int:
    """Images a step: as the recipe says, or all there are. UserError where they do not divide into parts."""
    parts = processes.count * recipe.accumulation
    _insist_on_two_each(data, images, parts)
    if parts == 1:
        return min(recipe.batch_size, images)
    if recipe.batch_size % (2 * parts):
        raise UserError(
            f"a batch of {recipe.batch_size} does not divide into {parts} parts of an even number of images; take a "
            f"multiple of {2 * parts}."
        )
    return min(recipe.batch_size, images // (2 * parts) * 2 * parts)


def _insist_on_two_each(data: str | Path, images: int, parts: int) -> None:
    if images < 2 * parts:
        count = "one training image" if images == 1 else f"{images} training images"
        several = f" for each of {parts} parts of a batch" if parts > 1 else ""
        raise UserError(f"{data} has {count} only; a network with BatchNorm needs two or more{several}.")


def _set_up(machine: Machine) -> tuple[torch.device, str]:
    """The device and the precision to train in; sets the process's threads and whether it must repeat exactly."""
    device = pick_device(machine.device)
    set_threads(machine.threads)
    precision = pick_precision(machine.precision, device)
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(machine.deterministic)
    return device, precision


def _model(recipe: Recipe, labels: Sequence[str], saved: WeightFile | None, *, told: bool) -> Network:
    """The network to start from or to go on with, with its metadata. told: the user has named the weights."""
    weights = saved if saved is not None else None if recipe.weights == "none" else recipe.weights
    if saved is None:
        say(f"starting from {'random weights' if weights is None else f'the weights {weights}'}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the last layer is new is what training on other classes means
            model = create_model(
                recipe.variant,
                weights=weights,
                num_classes=len(labels),
                drop_path_rate=recipe.drop_path,
                kv_pooling=recipe.kv_pooling,
                task=recipe.task,
                head=recipe.head,
            )
    except UserError as error:
        if saved is None and not told:
            raise UserError(f"{error} To start from random weights: --weights none.") from error
        raise
    if isinstance(model, Detector):
        model.fixed_norms, model.sampling = bool(recipe.fixed_norms), Sampling(**asdict(recipe.sampling))
    p = LEARNING[recipe.task].prepared(recipe, model.metadata.preprocess)
    model = of_size(model, p.image_size, fresh=weights is None)
    model.metadata = replace(model.metadata, labels=tuple(labels), preprocess=p)
    return model


def _running_mean(model: Network, recipe: Recipe, saved: WeightFile | None) -> RunningMean | None:
    if recipe.ema is None:
        return None
    mean = RunningMean(model, recipe.ema)
    kept = (
        {} if saved is None else {k.removeprefix("ema."): t for k, t in saved.tensors.items() if k.startswith("ema.")}
    )
    if kept:
        mean.model.load_state_dict(kept)
    return mean


def _say_what(run: Run) -> None:
    r, count = run.recipe, run.processes.count
    parts = f" of {r.accumulation} parts" if r.accumulation > 1 else ""
    several = f", {count} processes" if count > 1 else ""
    head = f" with {run.model.metadata.head}" if run.model.metadata.head else ""
    epochs = f"{run.epochs} epochs" + (f" of {run.steps} steps" if r.schedule.steps_per_epoch else "")
    say(
        f"{r.variant}{head} on {len(run.training)} images of {len(run.training.labels)} classes, "
        f"{len(run.validation)} to validate; {run.device}, {run.precision}, "
        f"{torch.get_num_threads()} threads{several}, batch {run.batch_size}{parts}, {epochs}."
    )
