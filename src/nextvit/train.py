"""Training: one flat loop, a run folder that is whole at every moment, and resuming from it."""

import math
import os
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit.backbone import NextViT
from nextvit.create import create_model, open_checkpoint
from nextvit.data.folders import Split, read_split
from nextvit.data.loader import Batch, Transform, batches, eval_transform, shuffled
from nextvit.devices import DTYPES, cpu_count, pick_device, pick_precision, set_threads
from nextvit.errors import Diverged, Interrupted, UserError
from nextvit.evaluate import Evaluation, evaluate
from nextvit.extras import need
from nextvit.files import replacing, sweep, write_rows, write_text
from nextvit.metadata import Metadata, Preprocess
from nextvit.progress import say, track
from nextvit.recipe import Recipe
from nextvit.tasks import classify
from nextvit.weights import PUBLISHED, WeightFile, model_tensors, read_weights, save_weights

LAST, PREVIOUS, BEST, WEIGHTS = "last.ckpt", "last.prev.ckpt", "best.ckpt", "model.safetensors"


@dataclass(frozen=True)
class Epoch:
    """A row of metrics.csv."""

    epoch: int  # from 1
    lr: float  # at the last step of the epoch
    train_loss: float  # mean over the epoch's images, with label smoothing
    val_loss: float  # cross entropy
    val_top1: float  # percent
    val_top5: float
    images: int  # seen in training so far


@dataclass
class Position:
    """Where a run is; with the tensors it is all that a checkpoint holds."""

    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done in the next one
    images: int = 0  # seen so far
    loss_sum: float = 0.0  # over the images of the epoch that has begun
    loss_images: int = 0
    history: list[Epoch] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # file -> why


@dataclass
class Run:
    """Everything that the loop works on."""

    recipe: Recipe
    data: str
    folder: Path
    training: Split
    validation: Split
    model: NextViT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    precision: str
    workers: int
    position: Position

    @property
    def batch_size(self) -> int:
        return min(self.recipe.batch_size, len(self.training))

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
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    deterministic: bool = False,
) -> Evaluation:
    """Train a classifier on the images of `data` and keep everything in the run folder `folder`.

    resume: go on from the newest whole checkpoint in `folder`, with the recipe that it was started with.
    workers: processes that load images; None: one beside a CPU that trains, up to eight for a GPU.

    Returns the evaluation of the best epoch on `val`. Raises UserError for data or arguments that do not fit, Diverged
    when a loss is not finite (the last checkpoint is kept), Interrupted after a signal, once the state is saved.
    """
    run = _prepare(data, recipe, folder, resume, device, precision, threads, workers, deterministic)
    recipe = run.recipe
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    say(
        f"{recipe.model} on {len(run.training)} images of {len(run.training.labels)} classes, {len(run.validation)} to "
        f"validate; {run.device}, {run.precision}, {torch.get_num_threads()} threads, batch {run.batch_size}."
    )
    with _signals() as received:
        while run.position.epoch < recipe.schedule.epochs:
            train_epoch(run, received)
            finish_epoch(run)
            if received:
                raise _interrupted(run, received[0])
    if run.position.rejected:
        rows = [{"file": file, "reason": why} for file, why in sorted(run.position.rejected.items())]
        write_rows(folder / "rejected.csv", rows)
        say(f"note: {len(rows)} images could not be read and were left out; {folder / 'rejected.csv'} names them.")
    best = open_checkpoint(folder / WEIGHTS).to(run.device)
    return validate(best, run)


def _interrupted(run: Run, number: int) -> Interrupted:
    return Interrupted(number, f"saved; go on with: nextvit train {run.data} --resume {run.folder}")


def train_epoch(run: Run, received: Sequence[int]) -> None:
    """The steps of the epoch that are not done yet. After a signal it saves at the next step and raises Interrupted."""
    at, recipe = run.position, run.recipe
    order = shuffled(len(run.training), recipe.seed, at.epoch)[at.step * run.batch_size : run.steps * run.batch_size]
    loaded = batches(
        run.training,
        train_transform(recipe, run.model.metadata.preprocess),
        batch_size=run.batch_size,
        order=order,
        seed=(recipe.seed, at.epoch),
        workers=run.workers,
        pin_memory=run.device.type == "cuda",
    )
    label = f"epoch {at.epoch + 1} of {recipe.schedule.epochs}"
    run.model.train()
    for batch in track(loaded, total=run.steps, label=label, unit="images", per_item=run.batch_size, done=at.step):
        at.rejected |= {str(run.training.files[index]): why for index, why in batch.rejected}
        count = len(batch.indices)
        if count >= 2:  # BatchNorm cannot normalise a single value
            loss = train_step(run, batch, learning_rate(at.epoch + at.step / run.steps, recipe))
            at.images += count
            at.loss_sum += loss * count
            at.loss_images += count
        at.step += 1
        if received:
            save_checkpoint(run, LAST)
            raise _interrupted(run, received[0])


def train_step(run: Run, batch: Batch, lr: float) -> float:
    """Forward, backward, clip, step; returns the loss. Diverged, before any weight changes, if it is not finite."""

    def diverged(what: str) -> Diverged:
        at = run.position
        return Diverged(
            f"the {what} is not finite at epoch {at.epoch + 1}, step {at.step}, learning rate {lr:.2g}; lower it with "
            "--set optimizer.lr=..., in a new run."
        )

    for group in run.optimizer.param_groups:
        group["lr"] = lr
    images = batch.images.to(run.device, non_blocking=True)
    targets = batch.targets.to(run.device, non_blocking=True)
    with torch.autocast(run.device.type, DTYPES[run.precision], enabled=run.precision != "fp32"):
        logits = run.model(images)
    loss = classify.loss(logits.float(), targets, label_smoothing=run.recipe.label_smoothing)
    if not torch.isfinite(loss):
        raise diverged("loss")
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.optimizer.clip_norm)
    if not run.scaler.is_enabled() and not torch.isfinite(norm):  # a scaler skips such a step by itself
        raise diverged("gradient")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.item()


def finish_epoch(run: Run) -> None:
    """Validate, and save what the epoch came to."""
    at, recipe = run.position, run.recipe
    if not at.loss_images:
        why = next(iter(at.rejected.values()), "no batch has two images")
        raise UserError(f"no image of {run.training.name} could be trained on: {why}")
    validated = validate(run.model, run)
    at.rejected |= {str(run.validation.files[index]): why for index, why in validated.rejected}
    m = validated.metrics
    lr = learning_rate(at.epoch + 1 - 1 / run.steps, recipe)
    row = Epoch(at.epoch + 1, lr, at.loss_sum / at.loss_images, m.loss, m.top1, m.top5, at.images)
    best = max(map(_merit, at.history), default=(-1.0, 0.0))
    at.history.append(row)
    at.epoch, at.step, at.loss_sum, at.loss_images = at.epoch + 1, 0, 0.0, 0
    # last.ckpt comes last: what its history tells must be there already.
    if _merit(row) > best:
        save_checkpoint(run, BEST)
        metadata = replace(run.model.metadata, recipe=recipe.sha256)
        save_weights(run.folder / WEIGHTS, run.model.state_dict(), metadata)
    write_rows(run.folder / "metrics.csv", [asdict(row) for row in at.history])
    save_checkpoint(run, LAST)
    say(
        f"epoch {at.epoch} of {recipe.schedule.epochs}: train loss {row.train_loss:.3f}, val loss {m.loss:.3f}, "
        f"val top-1 {m.top1:.1f} %"
    )


def _merit(row: Epoch) -> tuple[float, float]:
    """The best epoch has the highest top-1 on `val`, and of equal ones the lowest loss."""
    return row.val_top1, -row.val_loss


def learning_rate(epoch: float, recipe: Recipe) -> float:
    """Rate at a point of the run, in epochs done."""
    peak, s = recipe.optimizer.lr, recipe.schedule
    least = min(s.min_lr, peak)
    warmup = min(s.warmup_epochs, 0.5 * s.epochs)  # of a short run at most half
    if epoch < warmup:  # 1. linear warm-up
        return least + (peak - least) * epoch / warmup
    share = (epoch - warmup) / (s.epochs - warmup)  # 2. cosine to the minimum
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * share))


def validate(model: NextViT, run: Run) -> Evaluation:
    """Metrics of the model on the run's validation split, in fp32, with the model's own preprocessing."""
    model.eval()

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(run.device)).float().cpu().numpy()

    split, size = run.validation, 2 * run.batch_size
    source = batches(split, eval_transform(model.metadata), batch_size=size, workers=run.workers)
    return evaluate(forward, source, split, total=-(-len(split) // size), label="validate")


def train_transform(recipe: Recipe, p: Preprocess) -> Transform:
    """Random crop, resize and flip of a PIL image, then the scaling and normalisation of evaluation."""
    v2 = need("torchvision.transforms.v2", extra="train")
    mode = v2.InterpolationMode(p.interpolation)
    r = recipe.images
    return v2.Compose(
        [
            v2.RandomResizedCrop(r.size, (r.crop_area, 1.0), (1 / r.crop_aspect, r.crop_aspect), interpolation=mode),
            v2.RandomHorizontalFlip(r.flip),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(p.mean, p.std),
        ]
    )


def _prepare(
    data: str | Path,
    recipe: Recipe,
    folder: Path,
    resume: bool,
    device: str,
    precision: str,
    threads: int | None,
    workers: int | None,
    deterministic: bool,
) -> Run:
    """Check everything before anything is written, and build the run as it starts or as it was left."""
    place = pick_device(device)
    set_threads(threads)
    if workers is None:
        workers = min(8, cpu_count()) if place.type == "cuda" else 1
    saved = _newest_checkpoint(folder) if resume else None
    training = read_split(data, "train")
    if len(training.labels) < 2:
        raise UserError(f"{data} has one class only ({training.labels[0]}); a classifier needs two or more.")
    if len(training) < 2:
        raise UserError(f"{data} has one training image only; a network with BatchNorm needs two or more.")
    validation = read_split(data, "val", training.labels)
    if saved is not None:
        _check_same_data(saved, training, validation, folder)
        sweep(folder)
        state = saved.state or {}
        if precision not in ("auto", state["precision"]):
            say(f"note: {folder} was begun in {state['precision']} and goes on in {precision}.")
        precision = state["precision"] if precision == "auto" else precision
        deterministic = deterministic or state["deterministic"]
        if not (folder / WEIGHTS).exists() and (folder / BEST).exists():
            best = read_weights(folder / BEST)
            save_weights(folder / WEIGHTS, model_tensors(best), best.metadata or Metadata(recipe.model))
    chosen = pick_precision(precision, place)
    torch.manual_seed(recipe.seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    told = recipe.weights is not None
    if not told:
        recipe = replace(recipe, weights="in1k" if recipe.model in PUBLISHED else "none")
    if saved is None:
        say(f"starting from {'random weights' if recipe.weights == 'none' else f'the weights {recipe.weights}'}.")
    for note in training.notes + validation.notes:
        say(f"note: {note}.")
    try:
        model = _new_model(recipe, training.labels, saved).to(place)
    except UserError as error:
        if saved is None and not told and recipe.weights != "none":
            raise UserError(f"{error} To start from random weights: --weights none.") from error
        raise
    groups = _parameter_groups(model, recipe.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.optimizer.lr, fused=place.type != "mps")
    scaler = torch.amp.GradScaler(place.type, enabled=chosen == "fp16")
    position = Position()
    if saved is not None:
        position = load_training_state(saved, optimizer, scaler, place)
        say(f"resuming {folder}: {position.epoch} of {recipe.schedule.epochs} epochs done, at step {position.step}.")
    return Run(
        recipe, str(data), folder, training, validation, model, optimizer, scaler, place, chosen, workers, position
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


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms are the 1-d tensors; they do not decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


# ---- the run folder --------------------------------------------------------------------------------------------------


def new_run_folder(data: str | Path, recipe: Recipe) -> Path:
    """runs/DATA-MODEL, with a number where that is taken."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).resolve().name) if str(data) != "demo" else "demo"
    name = f"{stem}-{recipe.model.removeprefix('nextvit_')}"
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder = Path("runs") / f"{name}.{number}"
        number += 1
    return folder


def _fingerprint(training: Split, validation: Split) -> dict[str, Any]:
    return {
        "labels": list(training.labels),
        "images": [len(training), len(validation)],
        "files": [training.sha256, validation.sha256],
    }


def _check_same_data(saved: WeightFile, training: Split, validation: Split, folder: Path) -> None:
    for key, now in _fingerprint(training, validation).items():
        before = (saved.state or {})["data"][key]
        if before != now:
            raise UserError(
                f"{folder} was trained with other {key} ({before}, now {now}); give the same data, or start a new run "
                f"with --weights {folder / WEIGHTS}."
            )


def save_checkpoint(run: Run, name: str) -> None:
    """Model, optimiser and generators as tensors, the rest as JSON; a last checkpoint becomes the one before it."""
    path = run.folder / name
    tensors = {f"model.{key}": value for key, value in run.model.state_dict().items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    tensors["generator.cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(run.device)
    state = {**asdict(run.position), "data": _fingerprint(run.training, run.validation)}
    state |= {"scaler": run.scaler.state_dict(), "precision": run.precision}
    state |= {"deterministic": torch.are_deterministic_algorithms_enabled()}
    with replacing(path) as unfinished:
        save_weights(unfinished, tensors, run.model.metadata, state)
        if name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))


def load_training_state(
    saved: WeightFile, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, place: torch.device
) -> Position:
    """Put the optimiser, the loss scale and the generators back as they were; returns where the run was."""
    state = saved.state or {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in saved.tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:  # the fused optimiser walks both in memory order: it must be the same
                tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(saved.tensors["generator.cpu"])
    if place.type == "cuda" and "generator.cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors["generator.cuda"], place)
    known = {f.name: state[f.name] for f in fields(Position)}
    return Position(**{**known, "history": [Epoch(**row) for row in state["history"]]})


def _newest_checkpoint(run: Path) -> WeightFile:
    """last.ckpt, or the one before it where that is damaged."""
    problems = []
    for name in (LAST, PREVIOUS):
        if (run / name).exists():
            try:
                saved = read_weights(run / name)
                if saved.state is not None:
                    if name == PREVIOUS:  # else the next save would move the damaged one over the good one
                        (run / LAST).unlink(missing_ok=True)
                    return saved
                problems.append(f"{run / name} is no training checkpoint")
            except UserError as error:
                problems.append(str(error))
                say(f"warning: {error}")
    raise UserError(f"there is nothing to resume in {run}: {'; '.join(problems) or 'it has no checkpoint'}.")


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
