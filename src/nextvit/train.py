"""Training: one flat loop, a run folder that is whole at every moment, and resuming from it."""

import contextlib
import math
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit import checkpoints
from nextvit.augmentation import Normalise, draw_mixing, erase, mix, sample_transform
from nextvit.backbone import NextViT
from nextvit.checkpoints import BEST, LAST, WEIGHTS, Epoch, Position, newest_checkpoint, owned
from nextvit.create import create_model, open_checkpoint
from nextvit.data.check import quick_check
from nextvit.data.folders import Split, read_split, with_unlabelled
from nextvit.data.loader import Batch, batches, eval_transform, loaders
from nextvit.data.seeds import generator, word
from nextvit.devices import DTYPES, pick_device, pick_precision, set_threads
from nextvit.errors import Diverged, Interrupted, LoaderDied, OutOfMemory, UserError, short_of_memory
from nextvit.evaluate import Evaluation, evaluate
from nextvit.files import sweep, write_rows, write_text
from nextvit.journal import Journal
from nextvit.metadata import Metadata
from nextvit.objective import Objective, Targets, objective
from nextvit.optimization import RunningMean, freeze, learning_rate, parameter_groups
from nextvit.processes import Agreement, Processes, joined, synchronise_batchnorm
from nextvit.profiling import Profile
from nextvit.progress import say, track
from nextvit.recipe import Recipe, changed, from_dict, override, to_dict
from nextvit.weights import PUBLISHED, WeightFile, read_weights, save_weights

IMAGES_TO_SEE, LEAST_EPOCHS, MOST_EPOCHS = 30_000, 10, 100  # where the recipe leaves the number of epochs to the data
SAVE_EVERY = 600.0  # seconds, in a long epoch
SAVE = 1  # what the processes tell each other: save and go on; a larger number is a signal's
LAG = {"cpu": 0, "cuda": 2, "mps": 0}  # steps that a GPU may be ahead of the look at its losses


@dataclass(frozen=True)
class Machine:
    """Where a run computes; none of it changes what it learns, but for rounding."""

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
    epochs: int
    data: str
    folder: Path
    processes: Processes
    training: Split
    validation: Split
    model: NextViT
    network: nn.Module  # the model as it is called: compiled, in step with other processes
    frozen: list[nn.Module]
    mean: RunningMean | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    objective: Objective
    normalise: Normalise
    device: torch.device
    precision: str
    workers: int
    position: Position
    outcomes: list[Outcome] = field(default_factory=list)  # of steps that were not looked at yet
    seen: np.ndarray = field(default_factory=lambda: np.zeros(2))  # on this process since the last save: images, losses
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Images a step, over all processes: as the recipe says, or all there are."""
        least = 2 * self.processes.count * self.recipe.accumulation
        return min(self.recipe.batch_size, len(self.training) // least * least if least > 2 else len(self.training))

    @property
    def steps(self) -> int:
        """Of an epoch; its last images are left out where the number does not divide."""
        return len(self.training) // self.batch_size


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(
    data: str | Path,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    changes: Sequence[str] = (),
    machine: Machine = Machine(),
) -> Evaluation:
    """Train a classifier on the images of `data` and keep everything in the run folder `folder`.

    resume: go on from the newest whole checkpoint in `folder`, with the recipe that it was started with, but for
    `changes` (`key=value`). Started by torchrun, all its processes train together.

    Returns the evaluation of the best epoch on `val`. Raises UserError for data or arguments that do not fit, Diverged
    when a loss is not finite (the last checkpoint is kept), Interrupted after a signal, once the state is saved.
    """
    with joined(machine.device) as processes, contextlib.ExitStack() as held:
        if processes.first:
            held.enter_context(owned(folder, new=not resume))
        processes.wait()
        run = _prepare(data, recipe, folder, resume, changes, machine, processes)
        journal = held.enter_context(Journal.opened(run.folder, run.recipe, run.position, machine.logs, processes))
        profile = held.enter_context(Profile.opened(folder if machine.profile and processes.first else None))
        received = held.enter_context(_signals())
        agreed = Agreement(processes)
        try:
            while run.position.epoch < run.epochs and not _ended(run):
                train_epoch(run, journal, profile, lambda due: agreed(max(received, default=due)))
                row = finish_epoch(run)
                journal.epoch(row)
                if received and processes.count == 1:
                    raise _interrupted(run, received[0])
        except (RuntimeError, MemoryError) as error:
            if "DataLoader worker" in str(error):  # torch raises it wherever the run is
                cause = str(error).partition("\n")[0].strip().rstrip(".")
                raise LoaderDied(f"{cause}: it loaded images; go on with --resume {folder}.") from error
            if not short_of_memory(error):
                raise
            raise OutOfMemory(
                f"memory is short for {run.batch_size // processes.count} images of {run.recipe.images.size} pixels at "
                f"once: --set accumulation={2 * run.recipe.accumulation} takes them in smaller parts; the last whole "
                f"checkpoint in {folder} is kept."
            ) from error
        _list_rejected(run)
        processes.wait()
        best = open_checkpoint(folder / WEIGHTS).to(run.device)
        return validate(best, run)


def train_epoch(run: Run, journal: Journal, profile: Profile, told: Callable[[int], int]) -> None:
    """The steps of the epoch that are not done yet. Told to stop, it saves after the step and raises Interrupted."""
    at, recipe = run.position, run.recipe
    parts = batches(
        run.training,
        sample_transform(recipe.images, run.model.metadata.preprocess),
        order=_parts(run),
        seed=(recipe.seed, at.epoch),
        workers=run.workers,
        pin_memory=run.device.type == "cuda",
    )
    batch = iter(lambda: list(islice(parts, recipe.accumulation)), [])
    label = f"epoch {at.epoch + 1} of {run.epochs}"
    run.network.train()
    for module in run.frozen:
        module.eval()
    saved = time.monotonic()
    for step in track(batch, total=run.steps, label=label, unit="images", per_item=run.batch_size, done=at.step):
        train_step(run, step, learning_rate(at.epoch + at.step / run.steps, run.epochs, recipe))
        settle(run, journal, LAG[run.device.type])
        at.step += 1
        at.steps += 1
        profile.step()
        number = told(SAVE if time.monotonic() - saved > SAVE_EVERY else 0)
        if number:
            settle(run, journal)
            save(run, LAST)
            saved = time.monotonic()
        if number > SAVE:
            raise _interrupted(run, number)
    settle(run, journal)


def _parts(run: Run) -> list[np.ndarray]:
    """The batches of the epoch that are not done yet: of each, in order, this process's share of each of its parts."""
    at, recipe = run.position, run.recipe
    order = run.training.order(recipe.seed, at.epoch)[: run.steps * run.batch_size]
    size = run.batch_size // recipe.accumulation
    whole = [order[step * run.batch_size :][: run.batch_size] for step in range(at.step, run.steps)]
    return [run.processes.share(batch[i * size :][:size]) for batch in whole for i in range(recipe.accumulation)]


def train_step(run: Run, parts: Sequence[Batch], rate: float) -> None:
    """Forward and backward of each part, clip, step; `run.outcomes` gets what it came to."""
    at = run.position
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    run.optimizer.zero_grad(set_to_none=True)
    total, seen = torch.zeros((), device=run.device), []
    for number, part in enumerate(parts):
        run.rejected |= {str(run.training.files[index]): why for index, why in part.rejected}
        counts = len(part.indices) >= 2  # BatchNorm cannot normalise a single value
        if not counts:
            if run.processes.count == 1:
                continue
            part = _nothing(run)  # the other processes wait for this one's gradient
        torch.manual_seed(word(run.recipe.seed, at.epoch, at.step, number, run.processes.rank))  # drop path
        with contextlib.nullcontext() if number + 1 == len(parts) else _not_yet(run.network):
            loss = part_loss(run, part, number) * counts
            run.scaler.scale(loss / len(parts)).backward()
        total += loss.detach() * len(part.indices)
        seen += part.indices.tolist()
    if not seen and run.processes.count == 1:
        return
    run.scaler.unscale_(run.optimizer)
    norm = checkpoints.whole(nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.optimizer.clip_norm))
    values = torch.stack([total, norm.to(total.device)])
    outcome = Outcome(at.epoch, at.step, rate, seen, values)
    if run.device.type == "cuda":
        outcome.values, outcome.ready = values.to("cpu", non_blocking=True), torch.cuda.Event()
        outcome.ready.record()
    elif not run.scaler.is_enabled():
        insist_on_finite(outcome, run)  # at once where looking costs nothing: no weight changes
    run.outcomes.append(outcome)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.mean is not None:
        run.mean.update(run.model, at.steps + 1)


def settle(run: Run, journal: Journal, lag: int = 0) -> None:
    """Count the steps but the last `lag` ones: a GPU is not waited for. Diverged where a number is not finite."""
    while len(run.outcomes) > lag:
        outcome = run.outcomes.pop(0)
        if outcome.ready is not None:
            outcome.ready.synchronize()
        insist_on_finite(outcome, run)
        run.seen += np.array([len(outcome.indices), float(outcome.values[0])])
        if outcome.indices:
            journal.step(float(outcome.values[0]) / len(outcome.indices), outcome.rate)


def insist_on_finite(outcome: Outcome, run: Run) -> None:
    """Raise Diverged, with the step, the rate and the files, where its loss or gradient is not finite."""
    loss, norm = outcome.values.tolist()
    if math.isfinite(loss) and (math.isfinite(norm) or run.scaler.is_enabled()):  # a scaler skips such steps itself
        return
    names = [str(run.training.files[index]) for index in outcome.indices]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    raise Diverged(
        f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite at epoch {outcome.epoch + 1}, step "
        f"{outcome.step}, learning rate {outcome.rate:.2g}, on {', '.join(names[:4])}{more}; what was saved before is "
        "kept. Lower the rate with --set optimizer.lr=..., in a new run."
    )


def part_loss(run: Run, part: Batch, number: int) -> Tensor:
    """The mean loss of a part of a batch: augmented, mixed, seen by the network and perhaps by a teacher."""
    at, recipe = run.position, run.recipe
    images = run.normalise(part.images)
    if recipe.images.erasing:
        erase(images, part.indices, recipe.images.erasing, (recipe.seed, at.epoch))
    labels = part.targets.to(run.device, non_blocking=True)
    targets = run.objective.targets(labels)
    if recipe.mixing.mixup or recipe.mixing.cutmix:
        targets = _mixed(run, images, targets, number)
    with torch.autocast(run.device.type, DTYPES[run.precision], enabled=run.precision != "fp32"):
        logits = run.network(images)
    return run.objective.loss(logits.float(), images, targets)


def _mixed(run: Run, images: Tensor, targets: Targets, number: int) -> Targets:
    """Images in place; a draw for every `mixing.images` of the whole batch, the same on every process."""
    at, recipe = run.position, run.recipe
    size = recipe.mixing.images
    here = len(images) if size is None else max(2, size // run.processes.count)
    mixed = []
    for group, start in enumerate(range(0, len(images), here)):
        rows = slice(start, start + here)
        draw = draw_mixing(recipe.mixing, generator(recipe.seed, at.epoch, at.step, number, group), *images.shape[2:])
        mixed.append(mix(images[rows], draw, *(t[rows] for t in targets)))
    return Targets(*(torch.cat(column) for column in zip(*mixed, strict=True)))


def _nothing(run: Run) -> Batch:
    """Two black images."""
    size = run.recipe.images.size
    none = torch.empty(0, dtype=torch.int64)
    return Batch(torch.zeros(2, size, size, 3, dtype=torch.uint8), none.new_full((2,), -1), none, ())


def _not_yet(network: nn.Module) -> Any:
    """Gradients stay on their process: more parts of the batch are to come."""
    return network.no_sync() if isinstance(network, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def finish_epoch(run: Run) -> Epoch:
    """Validate, and save what the epoch came to."""
    at = run.position
    gather(run)
    if not at.loss_images:
        why = next(iter(at.rejected.values()), "no batch has two images")
        raise UserError(f"no image of {run.training.name} could be trained on: {why}")
    validated = validate(run.model, run)
    at.rejected |= {str(run.validation.files[index]): why for index, why in validated.rejected}
    m, e = validated.metrics, validate(run.mean.model, run).metrics if run.mean is not None else None
    rate = learning_rate(at.epoch + 1 - 1 / run.steps, run.epochs, run.recipe)
    row = Epoch(
        epoch=at.epoch + 1,
        lr=rate,
        train_loss=at.loss_sum / at.loss_images,
        val_loss=m.loss,
        val_top1=m.top1,
        val_top5=m.top5,
        ema_loss=None if e is None else e.loss,
        ema_top1=None if e is None else e.top1,
        ema_top5=None if e is None else e.top5,
        images=at.images,
    )
    best = max((earlier.merit for earlier in at.history), default=(-1.0, 0.0))
    at.history.append(row)
    at.epoch, at.step, at.loss_sum, at.loss_images = at.epoch + 1, 0, 0.0, 0
    # last.ckpt comes last: what its history tells must be there already.
    if row.merit > best:
        save(run, BEST)
    if run.processes.first:
        write_rows(run.folder / "metrics.csv", checkpoints.rows(at.history))
    save(run, LAST)
    mean = "" if e is None else f" (running mean {e.top1:.1f} %)"
    say(
        f"epoch {at.epoch} of {run.epochs}: train loss {row.train_loss:.3f}, val loss {m.loss:.3f}, "
        f"val top-1 {m.top1:.1f} %{mean}"
    )
    return row


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
        "data": _fingerprint(run.training, run.validation),
        "recipe": to_dict(run.recipe),
        "scaler": run.scaler.state_dict(),
        "precision": run.precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    checkpoints.save_checkpoint(run.folder / name, tensors, run.model.metadata, state)
    if name == BEST:
        save_best(run.folder, WeightFile(str(run.folder / BEST), tensors, run.model.metadata, state))


def save_best(folder: Path, best: WeightFile) -> None:
    """model.safetensors: the weights of the best checkpoint, or their running mean where that was the better one."""
    position = checkpoints.read_position(best.state or {})
    prefix = "ema." if position.history[-1].by_mean else "model."
    tensors = {key.removeprefix(prefix): value for key, value in best.tensors.items() if key.startswith(prefix)}
    recipe = from_dict((best.state or {})["recipe"])
    metadata = replace(best.metadata or Metadata(recipe.model), recipe=recipe.sha256)
    save_weights(folder / WEIGHTS, tensors, metadata)


def validate(model: NextViT, run: Run) -> Evaluation:
    """Metrics of the model on the run's validation split, in fp32, with the model's own preprocessing."""
    model.eval()

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(run.device)).float().cpu().numpy()

    split, size = run.validation, max(1, 2 * run.batch_size // run.processes.count)
    mine = np.arange(run.processes.rank, len(split), run.processes.count)
    source = batches(split, eval_transform(model.metadata), batch_size=size, order=mine, workers=run.workers)
    total = -(-len(mine) // size)
    return evaluate(forward, source, split, total=total, label="validate", processes=run.processes)


# ---- before the first step -------------------------------------------------------------------------------------------


def _prepare(
    data: str | Path,
    recipe: Recipe,
    folder: Path,
    resume: bool,
    changes: Sequence[str],
    machine: Machine,
    processes: Processes,
) -> Run:
    """Check everything before anything is written, and build the run as it starts or as it was left."""
    device = pick_device(machine.device)
    set_threads(machine.threads)
    precision, deterministic = machine.precision, machine.deterministic
    saved = newest_checkpoint(folder) if resume else None
    training = read_split(data, "train")
    _insist_on_images(data, training, processes.count * recipe.accumulation)
    validation = read_split(data, "val", training.labels)
    if recipe.distillation.unlabelled is not None:
        training = with_unlabelled(training, recipe.distillation.unlabelled)
    told = recipe.weights is not None
    recipe = _resolved(recipe, training)
    if saved is not None:
        state = saved.state or {}
        _insist_on_same(state, recipe, training, validation, folder)
        recipe = override(recipe, changes)
        if precision not in ("auto", state["precision"]):
            say(f"note: {folder} was begun in {state['precision']} and goes on in {precision}.")
        precision = state["precision"] if precision == "auto" else precision
        deterministic = deterministic or state["deterministic"]
    _insist_on_parts(recipe.batch_size, processes.count * recipe.accumulation)
    chosen = pick_precision(precision, device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if saved is None:
        say(f"starting from {'random weights' if recipe.weights == 'none' else f'the weights {recipe.weights}'}.")
    if processes.first:
        checked = quick_check(training, validation, allow_bad=machine.allow_bad, strict=machine.strict_data)
        for note in [*training.notes, *validation.notes, *checked]:
            say(f"note: {note}.")
    torch.manual_seed(recipe.seed)
    try:
        model = _new_model(recipe, training.labels, saved).to(device)
    except UserError as error:
        if saved is None and not told and recipe.weights != "none":
            raise UserError(f"{error} To start from random weights: --weights none.") from error
        raise
    if recipe.sync_batchnorm and processes.count > 1:
        synchronise_batchnorm(model)
    frozen = freeze(model, recipe.optimizer.frozen_stages)
    mean = RunningMean(model, recipe.ema) if recipe.ema is not None else None
    if saved is not None and mean is not None:
        tensors = {k.removeprefix("ema."): t for k, t in saved.tensors.items() if k.startswith("ema.")}
        mean.model.load_state_dict(tensors or model.state_dict())
    network = processes.together(model, shard=machine.shard)
    if mean is not None and machine.shard:
        processes.together(mean.model, shard=True)
    if machine.compile:
        network.compile()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.optimizer), lr=recipe.optimizer.lr, fused=device.type != "mps"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=chosen == "fp16")
    position = Position()
    if saved is not None:
        state = saved.state or {}
        position = checkpoints.read_position(state)
        checkpoints.restore_optimizer(model, optimizer, saved.tensors)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        position.step = position.step * state["recipe"]["batch_size"] // recipe.batch_size
        if processes.first:
            sweep(folder)
            if not (folder / WEIGHTS).exists() and (folder / BEST).exists():
                save_best(folder, read_weights(folder / BEST))
    run = Run(
        recipe=recipe,
        epochs=recipe.schedule.epochs or 1,
        data=str(data),
        folder=folder,
        processes=processes,
        training=training,
        validation=validation,
        model=model,
        network=network,
        frozen=frozen,
        mean=mean,
        optimizer=optimizer,
        scaler=scaler,
        objective=objective(recipe, training, device),
        normalise=Normalise(model.metadata.preprocess, device),
        device=device,
        precision=chosen,
        workers=loaders(machine.workers, device, 3 * recipe.images.size**2 * recipe.batch_size),
        position=position,
    )
    if saved is not None:
        say(f"resuming {folder}: {position.epoch} of {run.epochs} epochs done, at step {position.step}.")
    if processes.first:
        write_text(folder / "recipe.yaml", recipe.to_yaml())
    parts = f" of {recipe.accumulation} parts" if recipe.accumulation > 1 else ""
    several = f", {processes.count} processes" if processes.count > 1 else ""
    say(
        f"{recipe.model} on {len(training)} images of {len(training.labels)} classes, {len(validation)} to "
        f"validate; {device}, {chosen}, {torch.get_num_threads()} threads{several}, batch {run.batch_size}{parts}, "
        f"{run.epochs} epochs."
    )
    return run


def _resolved(recipe: Recipe, training: Split) -> Recipe:
    """With what the recipe leaves to the run: the weights to start from, the number of epochs."""
    if recipe.weights is None:
        recipe = replace(recipe, weights="in1k" if recipe.model in PUBLISHED else "none")
    if recipe.schedule.epochs is None:
        epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, round(IMAGES_TO_SEE / len(training))))
        recipe = replace(recipe, schedule=replace(recipe.schedule, epochs=epochs))
    return recipe


def _insist_on_images(data: str | Path, training: Split, parts: int) -> None:
    if len(training.labels) < 2:
        raise UserError(f"{data} has one class only ({training.labels[0]}); a classifier needs two or more.")
    if len(training) < 2 * parts:
        count = "one training image" if len(training) == 1 else f"{len(training)} training images"
        several = " for each part of a batch" if parts > 1 else ""
        raise UserError(f"{data} has {count} only; a network with BatchNorm needs two or more{several}.")


def _insist_on_parts(batch_size: int, parts: int) -> None:
    if parts > 1 and batch_size % (2 * parts):
        raise UserError(
            f"a batch of {batch_size} does not divide into {parts} parts of an even number of images; take a multiple "
            f"of {2 * parts}."
        )


def _new_model(recipe: Recipe, labels: Sequence[str], saved: WeightFile | None) -> NextViT:
    """The network to start from or to go on with, with its metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the last layer is new is what training on other classes means
        model = create_model(
            recipe.model,
            weights=saved if saved is not None else None if recipe.weights == "none" else recipe.weights,
            num_classes=len(labels),
            drop_path_rate=recipe.drop_path,
            kv_pooling=recipe.kv_pooling,
        )
    r, p = recipe.images, model.metadata.preprocess
    p = replace(p, image_size=r.size, crop=r.crop, interpolation=r.interpolation)
    model.metadata = replace(model.metadata, labels=tuple(labels), preprocess=p)
    return model


def _fingerprint(training: Split, validation: Split) -> dict[str, Any]:
    return {
        "labels": list(training.labels),
        "images": [len(training), len(validation)],
        "files": [training.sha256, validation.sha256],
    }


def _insist_on_same(state: dict[str, Any], recipe: Recipe, training: Split, validation: Split, folder: Path) -> None:
    if "recipe" not in state:
        raise UserError(f"{folder} was begun by an older version; start a new run with --weights {folder / WEIGHTS}.")
    for key, now in _fingerprint(training, validation).items():
        before = state["data"][key]
        if before != now:
            raise UserError(
                f"{folder} was trained with other {key} ({before}, now {now}); give the same data, or start a new run "
                f"with --weights {folder / WEIGHTS}."
            )
    for key, (before, now) in changed(state["recipe"], to_dict(recipe)).items():
        raise UserError(
            f"{folder / 'recipe.yaml'} has {key} = {now!r} and the run was begun with {before!r}; put it back, or say "
            f"that you mean it: --set {key}={now}."
        )


# ---- the run folder and its end --------------------------------------------------------------------------------------


def new_run_folder(data: str | Path, recipe: Recipe) -> Path:
    """runs/DATA-MODEL, with a number where that is taken."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).resolve().name) if str(data) != "demo" else "demo"
    name = f"{stem}-{recipe.model.removeprefix('nextvit_')}"
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder = Path("runs") / f"{name}.{number}"
        number += 1
    return folder


def _ended(run: Run) -> bool:
    """Whether no epoch was better for as long as the recipe waits."""
    history = run.position.history
    if run.recipe.patience is None or not history:
        return False
    best = max(range(len(history)), key=lambda i: history[i].merit)
    ended = len(history) - 1 - best >= run.recipe.patience
    if ended:
        say(f"no epoch was better than {best + 1} for {run.recipe.patience} epochs: the run ends here.")
    return ended


def _interrupted(run: Run, number: int) -> Interrupted:
    return Interrupted(number, f"saved; go on with: nextvit train {run.data} --resume {run.folder}")


def _list_rejected(run: Run) -> None:
    if run.position.rejected and run.processes.first:
        rows = [{"file": file, "reason": why} for file, why in sorted(run.position.rejected.items())]
        write_rows(run.folder / "rejected.csv", rows)
        say(f"note: {len(rows)} images could not be read and were left out; {run.folder / 'rejected.csv'} names them.")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second signal ends the process at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
