"""Training: one flat loop, a run folder that is whole at every moment, and resuming from it."""

import math
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit.backbone import NextViT
from nextvit.create import create_model, open_checkpoint
from nextvit.data.folders import Split, read_split
from nextvit.data.loader import Transform, batches, eval_transform, shuffled
from nextvit.devices import DTYPES, cpu_count, pick_device, pick_precision, set_threads
from nextvit.errors import Diverged, UserError
from nextvit.evaluate import Evaluation, evaluate
from nextvit.extras import need
from nextvit.files import replacing, write_rows, write_text
from nextvit.metadata import Metadata, Preprocess
from nextvit.progress import say, track
from nextvit.recipe import Recipe
from nextvit.tasks import classify
from nextvit.weights import PUBLISHED, WeightFile, read_weights, save_weights

LAST, PREVIOUS, BEST = "last.ckpt", "last.prev.ckpt", "best.ckpt"


@dataclass(frozen=True)
class Epoch:
    """A row of metrics.csv."""

    epoch: int  # from 1
    lr: float  # at the end of the epoch
    train_loss: float  # mean over the epoch's images, with label smoothing
    val_loss: float  # cross entropy
    val_top1: float  # percent
    val_top5: float
    images: int  # seen in training so far


class Interrupted(Exception):
    """A signal asked the run to end; everything is saved. Carries the signal's number."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by signal {number}")
        self.number = number


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(
    data: str | Path,
    recipe: Recipe,
    run: Path,
    *,
    weights: str | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    deterministic: bool = False,
) -> Evaluation:
    """Train a classifier on the folder `data` and keep everything in the folder `run`.

    weights: a file, a published tag, "none", or None: published weights where the variant has them, else from scratch.
    resume: go on from the newest whole checkpoint in `run`, with the recipe that it was started with.
    workers: processes that load images; None: one beside a CPU that trains, up to eight for a GPU.

    Returns the evaluation of the best epoch on `val`. Raises UserError for data or arguments that do not fit, Diverged
    when a loss is not finite (the last checkpoint is kept), Interrupted after a signal, once the state is saved.
    """
    place = pick_device(device)
    if workers is None:
        workers = min(8, cpu_count()) if place.type == "cuda" else 1
    chosen = pick_precision(precision, place)
    set_threads(threads)
    saved = _newest_checkpoint(run) if resume else None
    training = read_split(data, "train")
    if len(training.labels) < 2:
        raise UserError(f"{data} has one class only ({training.labels[0]}); a classifier needs two or more.")
    if len(training) < 2:
        raise UserError(f"{data} has one training image only; a network with BatchNorm needs two or more.")
    validation = read_split(data, "val", training.labels)
    for note in training.notes + validation.notes:
        say(f"note: {note}.")

    torch.manual_seed(recipe.seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
    model = _new_model(recipe, training.labels, weights, saved).to(place)
    groups = _parameter_groups(model, recipe.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.optimizer.lr, fused=place.type != "mps")
    scaler = torch.amp.GradScaler(place.type, enabled=chosen == "fp16")
    batch_size = min(recipe.batch_size, len(training))
    steps = len(training) // batch_size  # an epoch's; its last images are left out where the number does not divide
    history: list[Epoch] = []
    rejected: dict[str, str] = {}  # file -> why
    first_epoch = first_step = 0
    seen, loss_sum, loss_count = 0, 0.0, 0
    best_merit = (-1.0, 0.0)
    if saved is not None and saved.state is not None:
        state = saved.state
        _check_same_data(state, training, run)
        load_training_state(saved, optimizer, scaler, place)
        history = [Epoch(**row) for row in state["history"]]
        rejected = state["rejected"]
        first_epoch, first_step = state["epoch"], state["step"]
        seen, loss_sum, loss_count = state["seen"], state["loss_sum"], state["loss_count"]
        best_merit = max((_merit(row) for row in history), default=best_merit)
        say(f"resuming {run}: {first_epoch} of {recipe.schedule.epochs} epochs done, at step {first_step}.")

    write_text(run / "recipe.yaml", recipe.to_yaml())
    transform = train_transform(recipe, model.metadata.preprocess)
    say(
        f"{recipe.model} on {len(training)} images of {len(training.labels)} classes, {len(validation)} to validate; "
        f"{place}, {chosen}, {torch.get_num_threads()} threads, batch {batch_size}."
    )

    def save(name: str, epoch: int, step: int) -> None:
        state = {
            "epoch": epoch,
            "step": step,
            "seen": seen,
            "loss_sum": loss_sum,
            "loss_count": loss_count,
            "history": [asdict(row) for row in history],
            "rejected": rejected,
            "data": _fingerprint(training),
            "scaler": scaler.state_dict(),
        }
        _save_checkpoint(run / name, model, optimizer, state, place)

    with _signals() as stop:
        for epoch in range(first_epoch, recipe.schedule.epochs):
            model.train()
            order = shuffled(len(training), recipe.seed, epoch)[first_step * batch_size : steps * batch_size]
            source = batches(
                training,
                transform,
                batch_size=batch_size,
                order=order,
                seed=recipe.seed * 100_003 + epoch,
                workers=workers,
                pin_memory=place.type == "cuda",
            )
            label = f"epoch {epoch + 1} of {recipe.schedule.epochs}"
            numbered = enumerate(source, first_step)
            for step, batch in track(
                numbered, total=steps, label=label, unit="images", per_item=batch_size, done=first_step
            ):
                for index, why in batch.rejected:
                    rejected[str(training.files[index])] = why
                if len(batch.indices) >= 2:  # BatchNorm cannot normalise a single value
                    lr = learning_rate(epoch + step / steps, recipe)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    images = batch.images.to(place, non_blocking=True, memory_format=torch.channels_last)
                    targets = batch.targets.to(place, non_blocking=True)
                    with torch.autocast(place.type, DTYPES[chosen], enabled=chosen != "fp32"):
                        logits = model(images)
                    loss = classify.loss(logits.float(), targets, label_smoothing=recipe.label_smoothing)
                    if not torch.isfinite(loss):
                        raise Diverged(
                            f"the loss is not finite at epoch {epoch + 1}, step {step}, learning rate {lr:.2g}; lower "
                            f"it with --set optimizer.lr=..., and resume from {run} or start again."
                        )
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
                    scaler.step(optimizer)
                    scaler.update()
                    seen += len(targets)
                    loss_sum += loss.item() * len(targets)
                    loss_count += len(targets)
                if stop:
                    save(LAST, epoch, step + 1)
                    raise Interrupted(stop[0])
            if not loss_count:
                raise UserError(
                    f"no image of {data} could be trained on: {next(iter(rejected.values()), 'none is there')}"
                )

            result = validate(model, validation, place, batch_size)
            m = result.metrics
            row = Epoch(epoch + 1, lr, loss_sum / loss_count, m.loss, m.top1, m.top5, seen)
            history.append(row)
            first_step, loss_sum, loss_count = 0, 0.0, 0
            write_rows(run / "metrics.csv", [asdict(r) for r in history])
            save(LAST, epoch + 1, 0)
            if _merit(row) > best_merit:
                best_merit = _merit(row)
                save(BEST, epoch + 1, 0)
                save_weights(run / "model.safetensors", model.state_dict(), _trained(model, recipe))
            say(f"{label}: train loss {row.train_loss:.3f}, val loss {m.loss:.3f}, val top-1 {m.top1:.1f} %")
            if stop:
                raise Interrupted(stop[0])

    if rejected:
        write_rows(run / "rejected.csv", [{"file": file, "reason": why} for file, why in sorted(rejected.items())])
        say(f"note: {len(rejected)} images could not be read and were left out; {run / 'rejected.csv'} names them.")
    best = open_checkpoint(run / "model.safetensors").to(place)
    return validate(best, validation, place, batch_size)


def _merit(row: Epoch) -> tuple[float, float]:
    """The best epoch has the highest top-1 on `val`, and of equal ones the lowest loss."""
    return row.val_top1, -row.val_loss


def learning_rate(epoch: float, recipe: Recipe) -> float:
    """Rate at a point of the run, in epochs done."""
    peak, s = recipe.optimizer.lr, recipe.schedule
    if epoch < s.warmup_epochs:  # 1. linear warm-up
        return s.min_lr + (peak - s.min_lr) * epoch / s.warmup_epochs
    share = (epoch - s.warmup_epochs) / max(s.epochs - s.warmup_epochs, 1e-9)  # 2. cosine to the minimum
    return s.min_lr + 0.5 * (peak - s.min_lr) * (1 + math.cos(math.pi * share))


def validate(model: NextViT, split: Split, place: torch.device, batch_size: int) -> Evaluation:
    """Metrics of the model on a split, in fp32, with the model's own preprocessing."""
    model.eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(place)).float().cpu().numpy()

    size = 2 * batch_size
    source = batches(split, eval_transform(model.metadata.preprocess), batch_size=size)
    return evaluate(run, source, split, total=-(-len(split) // size), label="validate")


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


def _new_model(recipe: Recipe, labels: Sequence[str], weights: str | None, saved: WeightFile | None) -> NextViT:
    """The network to start from, with its metadata; the first line printed says where its weights come from."""
    source: str | None
    if saved is not None:
        source = saved.source
    elif weights is None:
        source = "in1k" if recipe.model in PUBLISHED else None
    else:
        source = None if weights == "none" else weights
    if saved is None:
        say(f"starting from {'random weights' if source is None else f'the weights {source}'}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the last layer is new is what training on other classes means
            model = create_model(
                recipe.model,
                weights=source,
                num_classes=len(labels),
                drop_path_rate=recipe.drop_path,
                kv_pooling=recipe.kv_pooling,
            )
    except UserError as error:
        if saved is None and weights is None and source is not None:
            raise UserError(f"{error} To start from random weights: --weights none.") from error
        raise
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
    folder = Path("runs") / f"{stem}-{recipe.model.removeprefix('nextvit_')}"
    number = 2
    while folder.exists():
        folder = folder.with_name(f"{folder.name.partition('.')[0]}.{number}")
        number += 1
    return folder


def _trained(model: NextViT, recipe: Recipe) -> Metadata:
    return replace(model.metadata, recipe=recipe.sha256)


def _fingerprint(split: Split) -> dict[str, Any]:
    return {"images": len(split), "labels": list(split.labels)}


def _check_same_data(state: dict[str, Any], training: Split, run: Path) -> None:
    for key, value in _fingerprint(training).items():
        if state["data"][key] != value:
            raise UserError(
                f"{run} was trained with other {key} ({state['data'][key]}, now {value}); give the same data, or start "
                "a new run with --weights."
            )


def _save_checkpoint(
    path: Path, model: NextViT, optimizer: torch.optim.Optimizer, state: dict[str, Any], place: torch.device
) -> None:
    """Model, optimiser and generators as tensors, the rest as JSON; the last checkpoint becomes the one before it."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    tensors["generator.cpu"] = torch.get_rng_state()
    if place.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(place)
    with replacing(path) as unfinished:
        save_weights(unfinished, tensors, model.metadata, state)
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))


def load_training_state(
    saved: WeightFile, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, place: torch.device
) -> None:
    """Put the optimiser, the loss scale and the generators back as they were."""
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
    scaler.load_state_dict((saved.state or {})["scaler"])
    torch.set_rng_state(saved.tensors["generator.cpu"])
    if place.type == "cuda" and "generator.cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors["generator.cuda"], place)


def _newest_checkpoint(run: Path) -> WeightFile:
    """last.ckpt, or the one before it where that is damaged."""
    problems = []
    for name in (LAST, PREVIOUS):
        if (run / name).exists():
            try:
                saved = read_weights(run / name)
                if saved.state is not None:
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
