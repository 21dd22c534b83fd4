"""What is told about a run while it goes on: TensorBoard always, and the services that were asked for."""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextvit.checkpoints import Epoch, Position
from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.files import write_text
from nextvit.processes import Processes
from nextvit.recipe import Recipe, to_dict

EVERY = 50  # steps between two points of a curve

Write = Callable[[dict[str, float], int], None]  # name -> number, and the step


class Journal:
    """Numbers of steps and epochs, passed on to everyone who listens."""

    def __init__(self, writers: list[Write], position: Position):
        self.writers, self.position = writers, position

    def step(self, loss: float, rate: float) -> None:
        if self.position.steps % EVERY == 0:
            self._write({"train/loss": loss, "train/lr": rate})

    def epoch(self, row: Epoch) -> None:
        """Under its own names: val_top1 becomes val/top1."""
        numbers = {key: value for key, value in row.row().items() if key != "epoch"}
        self._write({key.replace("_", "/", 1): value for key, value in numbers.items()})

    def _write(self, numbers: dict[str, float]) -> None:
        for write in self.writers:
            write(numbers, self.position.steps)

    @staticmethod
    @contextmanager
    def opened(
        folder: Path, recipe: Recipe, position: Position, names: tuple[str, ...], processes: Processes
    ) -> Iterator["Journal"]:
        """names: of SERVICES. The first process writes; what lies after the position of a resumed run is dropped."""
        if unknown := [name for name in names if name not in SERVICES]:
            raise UserError(f"there is no log {unknown[0]!r}; take {' or '.join(SERVICES)}.")
        with contextlib.ExitStack() as stack:
            writers = []
            if processes.first:
                writers = [stack.enter_context(_tensorboard(folder, position))]
                writers += [stack.enter_context(SERVICES[name](folder, to_dict(recipe))) for name in names]
            yield Journal(writers, position)


@contextmanager
def _tensorboard(folder: Path, position: Position) -> Iterator[Write]:
    board = need("torch.utils.tensorboard", extra="train")
    with board.SummaryWriter(str(folder / "tensorboard"), purge_step=position.steps + 1) as writer:

        def write(numbers: dict[str, float], step: int) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        yield write


@contextmanager
def _wandb(folder: Path, recipe: dict[str, Any]) -> Iterator[Write]:
    wandb = need("wandb", extra="wandb")
    note = folder / "wandb.id"  # two run folders may have one name, and a resumed run goes on under its own
    if not note.exists():
        write_text(note, secrets.token_hex(4))
    number = note.read_text(encoding="utf-8")
    run = wandb.init(project="nextvit", name=folder.name, id=number, dir=folder, config=recipe, resume="allow")
    try:
        yield lambda numbers, step: run.log(numbers, step=step)
    finally:
        run.finish()


@contextmanager
def _mlflow(folder: Path, recipe: dict[str, Any]) -> Iterator[Write]:
    mlflow = need("mlflow", extra="mlflow")
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_dict(recipe, "recipe.yaml")
        yield lambda numbers, step: mlflow.log_metrics({k.replace("/", "."): v for k, v in numbers.items()}, step=step)


SERVICES = {"wandb": _wandb, "mlflow": _mlflow}
