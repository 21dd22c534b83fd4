"""Accuracy of the tables' networks here: of short trainings on the images that ship with the package, of the paper's
recipes on real sets, or of weights that are there.
"""

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from nextvit.checkpoints import LAST, WEIGHTS
from nextvit.create import open_checkpoint
from nextvit.data.scenes import scenes_folder
from nextvit.data.sets import TASKS, default_eval_split, read_split, task_of
from nextvit.errors import OutOfMemory, UserError
from nextvit.evaluate import AnyEvaluation, prepared_for
from nextvit.files import write_rows
from nextvit.foreign import FAULTS
from nextvit.learning import LEARNING, Loading
from nextvit.metadata import HEADS
from nextvit.networks import Network, of_size
from nextvit.paper import SIZES, PaperRow
from nextvit.processes import ALONE
from nextvit.progress import say
from nextvit.recipe import Recipe, read_recipe
from nextvit.reproduce import read_records
from nextvit.runtime.open import open_network
from nextvit.runtime.torch_session import TorchSession
from nextvit.train import train
from nextvit.weights import PUBLISHED

DEMO = "demo"  # the images that ship with the package
PROXY = {"classify": "proxy", "segment": "proxy_segment", "detect": "proxy_detect"}  # recipes for them
REAL = {"classify": "in1k_300e", "segment": "fpn_80k", "detect": "maskrcnn_1x"}  # the paper's
PROXY_SEEDS, REAL_SEEDS = 3, 1
METRIC = {"classify": "top1", "segment": "miou", "detect": "box_ap"}  # among the numbers of an evaluation
TOLD = {"classify": "top-1, %", "segment": "mIoU, %", "detect": "box AP"}
AS_PRINTED = {  # columns of the tables that have the same, by task and head
    ("classify", ""): ("top1",),
    ("segment", "fpn"): ("seg_miou", "fpn_miou"),
    ("segment", "upernet"): ("upernet_miou_ms",),
    ("detect", "mask_rcnn"): ("det_box_ap", "box_ap_1x"),
}
SCENES = (800, 60)  # of the shipped ones, to train a detector on and to judge it by: it takes a second for each
BATCH = 32  # images, in evaluation
GIVEN = "weights"  # what a score is of, that is not of a training
RUNS = "runs"  # the folder of the trainings


@dataclass(frozen=True)
class Score:
    """Accuracy of a network in one task, on the images that its training did not see; or why there is none."""

    network: str  # a MODEL
    task: str
    data: str
    of: str  # the recipe, its name and what it is known by; or GIVEN
    seed: int = 0
    head: str = ""  # of a dense task
    image_size: int = 0  # pixels a side, of classification
    percent: float | None = None  # top-1, mIoU or box AP
    seconds: float | None = None  # of training and evaluation
    why: str = ""

    @property
    def key(self) -> "tuple[str, int, int, Kind]":
        return self.network, self.seed, self.image_size, self.kind

    @property
    def kind(self) -> "Kind":
        """What scores that can be compared have in common."""
        return Kind(self.task, self.head, self.data, self.of)


class Kind(NamedTuple):
    """Scores that can be compared: see Score."""

    task: str
    head: str
    data: str
    of: str

    @property
    def title(self) -> str:
        """Of a column."""
        name = TOLD[self.task] + f" with {self.head}" * (self.task == "segment")
        return f"{name}, a proxy" if self.data == DEMO and self.of != GIVEN else f"{name}, here"


@dataclass(frozen=True)
class Study:
    """What networks are trained on, by task in the order of TASKS, and how often, each time from another seed."""

    data: dict[str, str]
    seeds: int

    def recipe(self, task: str) -> Recipe:
        return read_recipe(self.name(task))

    def name(self, task: str) -> str:
        return (PROXY if self.data[task] == DEMO else REAL)[task]


def study_of(data: Sequence[str], tasks: Sequence[str], seeds: int | None) -> Study:
    """What `data` are for: folders for the task that they are laid out for, "demo" for `tasks`."""
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"there is no task {unknown[0]!r}; take of {', '.join(TASKS)}.")
    found: dict[str, str] = {}
    for place in data:
        for task in tasks if place == DEMO else [task_of(place)]:
            if task in found:
                raise UserError(f"{found[task]} and {place} are both for the task {task}; leave one of them out.")
            found[task] = place
    if DEMO in found.values() and set(found.values()) != {DEMO}:
        raise UserError("the shipped images are for proxies; train on them in a run of their own.")
    if DEMO in found.values() and "classify" not in found:
        found["classify"] = DEMO  # where the others start from
    usual = PROXY_SEEDS if DEMO in found.values() else REAL_SEEDS
    return Study({task: found[task] for task in TASKS if task in found}, seeds or usual)


# ---- trained ---------------------------------------------------------------------------------------------------------


def train_networks(rows: Sequence[PaperRow], study: Study, folder: Path) -> list[Score]:
    """Train the networks of these rows alike, keeping each score in accuracies.csv of `folder` when it is known.

    What is there is not trained again, and a training that was stopped goes on. A dense task starts from the network's
    own classifier of the same seed. Runs on real sets stay in runs/ of the folder; those of proxies go.
    """
    networks = list(dict.fromkeys(row.network for row in rows))
    wanted = [(network, seed) for network in networks for seed in range(study.seeds)]
    for number, (network, seed) in enumerate(wanted, 1):
        there = {score.key for score in read_scores(folder) if score.percent is not None}
        asked = {task: _named(network, seed, study, task).key for task in study.data}
        if all(key in there for key in asked.values()):
            continue
        say(f"{number} of {len(wanted)}: train {network}, seed {seed}")
        for score in _trained(network, seed, study, folder):
            _keep(score, folder)
    return read_scores(folder)


def _named(network: str, seed: int, study: Study, task: str) -> Score:
    """A score as yet unknown."""
    recipe = study.recipe(task)
    head = recipe.head or HEADS[task][0]
    size = recipe.side if task == "classify" else 0
    of = f"{study.name(task)} {recipe.sha256[:8]}"
    return Score(network, task, study.data[task], of, seed, head, size)


def _trained(network: str, seed: int, study: Study, folder: Path) -> Iterator[Score]:
    classifier = _run_folder(folder, network, "classify", seed) / WEIGHTS
    for task, data in study.data.items():
        run, score, begun = _run_folder(folder, network, task, seed), _named(network, seed, study, task), time.time()
        recipe = replace(study.recipe(task), model=network, seed=seed)
        if task != "classify":
            if not classifier.exists():
                why = f"it starts from a classifier of the same network and seed: --train IMAGENET --train {data}"
                yield replace(score, why=why)
                continue
            recipe = replace(recipe, weights=str(classifier))
        try:
            place = str(scenes_folder(*SCENES) / "coco") if (data, task) == (DEMO, "detect") else data
            validation = train(place, recipe, run, resume=(run / LAST).exists())
            unseen = default_eval_split(place, task)
            found = validation if unseen == "val" else evaluated(open_checkpoint(run / WEIGHTS), place)
            percent = found.numbers[METRIC[task]]
            yield replace(score, percent=round(percent, 3), seconds=round(time.time() - begun, 1))
        except (*FAULTS, OutOfMemory) as error:
            why = str(error).strip().splitlines()[0][:300]
            say(f"{network}, {task}: {why}")
            yield replace(score, why=why)
    if DEMO in study.data.values():
        for task in study.data:
            shutil.rmtree(_run_folder(folder, network, task, seed), ignore_errors=True)


def _run_folder(folder: Path, network: str, task: str, seed: int) -> Path:
    return folder / RUNS / f"{_file_name(network)}-{task}-{seed}"


def evaluated(network: Network, data: str, *, image_size: int | None = None) -> AnyEvaluation:
    """On the images that nothing was trained on: `test` of the data, else `val`."""
    m = network.metadata
    prepared = prepared_for(m, image_size, None)
    split = read_split(data, default_eval_split(data, m.task), m.labels, m.task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    session = TorchSession(network, device=device, threads=None, precision="fp32")
    return LEARNING[m.task].validate(session, split, prepared, Loading(BATCH, 0, ALONE))


# ---- of weights that are there ---------------------------------------------------------------------------------------


def evaluate_networks(rows: Sequence[PaperRow], data: str, weights: Path | None, folder: Path) -> list[Score]:
    """Evaluate the networks of these rows on `data` with weights of the folder `weights`: files named as MODELs are,
    nextvit_small.pth, timm-resnet101.safetensors; -384 behind it for another size than the table's, and -fpn, -upernet
    or -mask_rcnn of a dense network. Without a file, Next-ViT's published ones. Scores are kept as those of trainings.
    """
    task = task_of(data)
    for row in rows:
        for head in HEADS[task]:
            size = row.image_size if task == "classify" else 0
            score = Score(row.network, task, data, GIVEN, head=head, image_size=size)
            if any(known.key == score.key and known.percent is not None for known in read_scores(folder)):
                continue
            begun = time.time()
            try:
                network = _with_weights(row, task, head, weights)
                if network is None:
                    continue
                found = evaluated(of_size(network, size or None), data, image_size=size or None)
                percent = found.numbers[METRIC[task]]
                score = replace(score, percent=round(percent, 3), seconds=round(time.time() - begun, 1))
            except FAULTS as error:
                say(f"{row.name}: {error}")
                score = replace(score, why=str(error).strip().splitlines()[0][:300])
            _keep(score, folder)
    return read_scores(folder)


def _with_weights(row: PaperRow, task: str, head: str, weights: Path | None) -> Network | None:
    """The network with its weights; None: there are none."""
    usual = row.image_size == SIZES[row.table]
    stem = _file_name(row.network) + f"-{head}" * bool(head) + f"-{row.image_size}" * (not usual)
    files = sorted(weights.glob(f"{stem}.*")) if weights else []
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1].name} are both for {row.name}; leave one of them there.")
    if files:
        return open_network(row.network, str(files[0])) if task == "classify" else open_checkpoint(files[0])
    if task == "classify" and row.network in PUBLISHED:
        return open_network(row.network, "in1k" if usual else f"in1k_{row.image_size}")
    return None


def _file_name(network: str) -> str:
    return network.replace(":", "-")


# ---- kept and summed up ----------------------------------------------------------------------------------------------


def read_scores(folder: Path) -> list[Score]:
    """What a folder has; none where there is no file."""
    return read_records(folder / "accuracies.csv", Score)


def _keep(score: Score, folder: Path) -> None:
    known = {one.key: one for one in read_scores(folder)} | {score.key: score}
    write_rows(folder / "accuracies.csv", [asdict(one) for one in known.values()])


def of_row(row: PaperRow, scores: Sequence[Score], kind: Kind) -> list[float]:
    """Percent of a row's network, one a seed, of scores of one kind."""
    sized = kind.task == "classify" and kind.of == GIVEN  # of a table that has the network at several sizes
    return [
        one.percent
        for one in scores
        if one.percent is not None
        and (one.network, one.kind) == (row.network, kind)
        and (not sized or one.image_size == row.image_size)
    ]


def told(percents: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(percents) < 2:
        return f"{percents[0]:.1f}" if percents else "-"
    return f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f} ({len(percents)} seeds)"
