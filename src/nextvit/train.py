"""Training: one flat loop, a run folder that is whole at every moment, and resuming from it."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvit import checkpoints
from nextvit.checkpoints import BEST, LAST, WEIGHTS, Epoch, owned
from nextvit.create import open_checkpoint
from nextvit.data.loader import NOT_PREPARED, Batch, batches, together
from nextvit.data.seeds import word
from nextvit.data.split import UNLABELLED
from nextvit.devices import DTYPES
from nextvit.errors import Diverged, Interrupted, LoaderDied, OutOfMemory, UserError, short_of_memory
from nextvit.evaluate import AnyEvaluation
from nextvit.files import write_rows
from nextvit.journal import Journal
from nextvit.learning import Loading
from nextvit.metrics import kept_epoch
from nextvit.networks import Network, as_arrays, as_asked
from nextvit.objective import Moment
from nextvit.optimization import learning_rate
from nextvit.processes import Agreement, joined
from nextvit.profiling import Profile
from nextvit.progress import say, track
from nextvit.recipe import Recipe
from nextvit.run import AUTOMATIC, Machine, Outcome, Run, gather, prepare, save

SAVE_EVERY = 600.0  # seconds, in a long epoch
SAVE = 1  # what the processes tell each other: save and go on; a larger number is a signal's
LAG = {"cpu": 0, "cuda": 2, "mps": 0}  # steps that a GPU may be ahead of the look at its losses

# ---- the loop --------------------------------------------------------------------------------------------------------


def train(
    data: str | Path,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    changes: Sequence[str] = (),
    machine: Machine = AUTOMATIC,
) -> AnyEvaluation:
    """Train the network of a recipe on the images of `data` and keep everything in the run folder `folder`.

    resume: go on from the newest whole checkpoint in `folder`, with the recipe that it was started with, but for
    `changes` (`key=value`). Started by torchrun, all its processes train together.

    Returns the evaluation of the best epoch on `val`. Raises UserError for data or arguments that do not fit, Diverged
    when a loss is not finite (the last checkpoint is kept), Interrupted after a signal, once the state is saved.
    """
    with joined(machine.device) as processes, contextlib.ExitStack() as held:
        if processes.first:
            held.enter_context(owned(folder, new=not resume))
        processes.wait()
        run = prepare(data, recipe, folder, machine, processes, resume=resume, changes=changes)
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
            if "DataLoader worker (pid" in str(error):  # torch raises it wherever the run is
                cause = str(error).partition("\n")[0].strip().rstrip(".")
                go_on = f"go on with --resume {folder}" if (folder / LAST).exists() else "start the run again"
                raise LoaderDied(f"{cause}: it loaded images; {go_on}.") from error
            if NOT_PREPARED in str(error):  # from a loading process, with its traceback before it
                raise RuntimeError(str(error).strip().splitlines()[-1]) from error
            if not short_of_memory(error):
                raise
            raise OutOfMemory(
                f"memory is short for {run.batch_size // processes.count} images of {run.recipe.side} pixels at "
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
        run.learning.transform(recipe, run.model.metadata.preprocess),
        order=_parts(run),
        seed=(recipe.seed,),
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
    """The batches of the epoch that are not done yet: of each, in order, this process's share of each of its parts.

    Images are shuffled for each pass over all of them, whatever an epoch is.
    """
    at, recipe, size = run.position, run.recipe, run.batch_size // run.recipe.accumulation
    start, end = (at.epoch * run.steps + step for step in (at.step, run.steps))
    whole: list[np.ndarray] = []
    for number in range(start // run.pass_steps, -(-end // run.pass_steps)):
        found = number * len(run.training) + run.training.batches(run.batch_size, recipe.seed, number)
        first = number * run.pass_steps
        whole += list(found[max(start - first, 0) : end - first])
    return [run.processes.share(batch[i * size :][:size]) for batch in whole for i in range(recipe.accumulation)]


def train_step(run: Run, parts: Sequence[Batch], rate: float) -> None:
    """Forward and backward of each part, clip, step; `run.outcomes` gets what it came to."""
    at = run.position
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    run.optimizer.zero_grad(set_to_none=True)

    def forward(*inputs: Tensor) -> Any:
        with torch.autocast(run.device.type, DTYPES[run.precision], enabled=run.precision != "fp32"):
            return run.network(*inputs)

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
            loss = run.objective(forward, part, Moment(run.recipe.seed, at.epoch, at.step, number)) * counts
            run.scaler.scale(loss / len(parts)).backward()
        total += loss.detach() * len(part.indices)
        seen += part.indices.tolist()
    if not seen and run.processes.count == 1:
        return
    run.scaler.unscale_(run.optimizer)
    most = math.inf if run.recipe.optimizer.clip_norm is None else run.recipe.optimizer.clip_norm
    norm = checkpoints.whole(nn.utils.clip_grad_norm_(run.model.parameters(), most))
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


def _nothing(run: Run) -> Batch:
    """Two samples that teach nothing."""
    none = torch.empty(0, dtype=torch.int64)
    return Batch(together([run.learning.blank(run.recipe)] * 2), none.new_full((2,), UNLABELLED), none, ())


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
    of_mean = validate(run.mean.model, run) if run.mean is not None else None
    rate = learning_rate(at.epoch + 1 - 1 / run.steps, run.epochs, run.recipe)
    row = Epoch(
        epoch=at.epoch + 1,
        lr=rate,
        train_loss=at.loss_sum / at.loss_images,
        val=validated.numbers,
        ema=None if of_mean is None else of_mean.numbers,
        images=at.images,
    )
    at.history.append(row)
    at.epoch, at.step, at.loss_sum, at.loss_images = at.epoch + 1, 0, 0.0, 0
    # last.ckpt comes last: what its history tells must be there already.
    if kept_epoch([epoch.merit[0] for epoch in at.history], len(run.validation)) == len(at.history) - 1:
        save(run, BEST)
    if run.processes.first:
        write_rows(run.folder / "metrics.csv", [epoch.row() for epoch in at.history])
    save(run, LAST)
    mean = "" if of_mean is None else f" (running mean: {of_mean.told})"
    say(f"epoch {at.epoch} of {run.epochs}: train loss {row.train_loss:.3f}; val {validated.told}{mean}")
    return row


def validate(model: Network, run: Run) -> AnyEvaluation:
    """Metrics of the model on the run's validation split, in fp32, with the model's own preprocessing."""
    model.eval()

    asked = as_asked(model)

    def forward(images: np.ndarray) -> Any:
        with torch.inference_mode():
            return as_arrays(asked(torch.from_numpy(images).to(run.device)))

    how = Loading(max(1, 2 * run.batch_size // run.processes.count), run.workers, run.processes)
    return run.learning.validate(forward, run.validation, model.metadata, how)


# ---- the end of a run ------------------------------------------------------------------------------------------------


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
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
