"""Accuracy of the tables' networks here: of short trainings on the images that ship with the package, of the paper's
recipes on real sets, or of weights that are there.
"""

import hashlib
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from nextvit.checkpoints import BEST, LAST, PREVIOUS, WEIGHTS, owned
from nextvit.create import open_checkpoint
from nextvit.data.scenes import scenes_folder
from nextvit.data.sets import TASKS, default_eval_split, read_split, split_names, task_of
from nextvit.data.shards import are_urls
from nextvit.devices import pick_device, pick_precision
from nextvit.errors import DiskFull, Interrupted, UserError
from nextvit.evaluate import AnyEvaluation, prepared_for
from nextvit.files import write_rows
from nextvit.foreign import FAULTS, is_foreign
from nextvit.learning import LEARNING, Loading
from nextvit.metadata import HEADS
from nextvit.networks import Network, of_size
from nextvit.paper import ACCURACY, SIZES, PaperRow
from nextvit.processes import ALONE
from nextvit.progress import say
from nextvit.recipe import Recipe, read_recipe, with_image_size
from nextvit.reproduce import first_line, read_records, today
from nextvit.run import Machine
from nextvit.runtime.open import open_network
from nextvit.runtime.torch_session import TorchSession
from nextvit.train import train
from nextvit.weights import PUBLISHED

DEMO = "demo"  # the images that ship with the package
PROXY = {"classify": "proxy", "segment": "proxy_segment", "detect": "proxy_detect"}  # recipes for them
REAL = {"classify": "in1k_300e", "segment": "fpn_80k", "detect": "maskrcnn_1x"}  # the paper's
PROXY_SEEDS, REAL_SEEDS = 3, 1
SCENES = (800, 60)  # of the shipped ones, to train a detector on and to judge it by: it takes a second for each
METRIC = {"classify": "top1", "segment": "miou", "detect": "box_ap"}  # among the numbers of an evaluation
TOLD = {"classify": "top-1, %", "segment": "mIoU, %", "detect": "box AP"}
AS_PRINTED = {  # columns of the tables that have the same, by task and head
    ("classify", ""): ("top1",),
    ("segment", "fpn"): ("seg_miou", "fpn_miou"),
    ("segment", "upernet"): (),  # the paper's accuracies are of several scales
    ("detect", "mask_rcnn"): ("det_box_ap", "box_ap_1x"),
}
BATCH = 32  # images, in evaluation
GIVEN = "weights"  # what a score is of, that is not of a training
RUNS = "runs"  # the folder of the trainings


class Kind(NamedTuple):
    """Scores that can be compared: see Score."""

    task: str
    head: str
    data: str
    of: str
    on: str = ""

    @property
    def proxy(self) -> bool:
        return self.data == DEMO and self.of != GIVEN

    @property
    def title(self) -> str:
        """Of a column, where no other kind has the same."""
        name = TOLD[self.task] + f" with {self.head}" * (self.task == "segment")
        if self.proxy:
            return f"{name}, a proxy"
        return f"{name}, {'of weights' if self.of == GIVEN else 'trained'} on {Path(self.data).name}"


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
    source: str = ""  # of GIVEN: the file, or the published tag
    why: str = ""
    on: str = ""  # of a proxy: the device that it was trained on, and the precision
    day: str = ""  # that it was found, YYYY-MM-DD

    @property
    def kind(self) -> Kind:
        return Kind(self.task, self.head, self.data, self.of, self.on)

    @property
    def key(self) -> tuple[str, int, int, Kind]:
        return self.network, self.seed, self.image_size, self.kind


@dataclass(frozen=True)
class Study:
    """What networks are trained on, by task in the order of TASKS, and how often, each time from another seed."""

    data: dict[str, str]
    seeds: int
    overrides: tuple[str, ...] = ()  # of the recipes, key=value

    def recipe(self, task: str) -> Recipe:
        return read_recipe(self.name(task), self.overrides)

    def name(self, task: str) -> str:
        return (PROXY if self.data[task] == DEMO else REAL)[task]

    def unknown(self, network: str, image_size: int, seed: int, task: str) -> Score:
        """A score that there is not yet."""
        recipe = self.recipe(task)
        of, head = f"{Path(self.name(task)).stem} {recipe.sha256[:8]}", recipe.head or HEADS[task][0]
        size, on = image_size if task == "classify" else 0, trained_on() if self.data[task] == DEMO else ""
        return Score(network, task, self.data[task], of, seed, head, size, on=on)

    def size_of(self, row: PaperRow) -> int:
        """Pixels that a row is trained at as a classifier: its own, but in proxies and before dense tasks."""
        own = self.data.get("classify") != DEMO and "top1" in ACCURACY[row.table]
        return row.image_size if own or "classify" not in self.data else self.recipe("classify").side


def study_of(
    data: Sequence[str], tasks: Sequence[str] = (), seeds: int | None = None, overrides: Sequence[str] = ()
) -> Study:
    """What `data` are for: folders for the task that they are laid out for, "demo" for `tasks`, or classification."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "reproduce trains in one process; let torchrun start `nextvit train`, and give the weights to --evaluate."
        )
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"there is no task {unknown[0]!r}; take of {', '.join(TASKS)}.")
    if tasks and DEMO not in data:
        raise UserError("a folder is for the task that it is laid out for; leave --task out.")
    found: dict[str, str] = {}
    for place in data:
        for task in (tasks or ["classify"]) if place == DEMO else [task_of(place)]:
            if task in found:
                raise UserError(f"{found[task]} and {place} are both for the task {task}; leave one of them out.")
            found[task] = place_of(place, task)
    if DEMO in found.values():
        if set(found.values()) != {DEMO}:
            raise UserError("the shipped images are for proxies; train on them in a run of their own.")
        found["classify"] = DEMO  # where the others start from
    usual = PROXY_SEEDS if DEMO in found.values() else REAL_SEEDS
    study = Study({task: found[task] for task in TASKS if task in found}, seeds or usual, tuple(overrides))
    for task in study.data:
        study.recipe(task)  # refused before anything is done
    return study


def trained_on() -> str:
    """Device and precision of trainings here."""
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {pick_precision('auto', device)}"


def place_of(data: str, task: str) -> str:
    """DATA by its whole path; UserError where there is nothing of it."""
    if data == DEMO:
        return data
    split_names(data, task)
    return data if are_urls(data) else str(Path(data).resolve())


# ---- trained ---------------------------------------------------------------------------------------------------------


def train_networks(rows: Sequence[PaperRow], study: Study, folder: Path, threads: int | None = None) -> list[Score]:
    """Train the networks of these rows alike, keeping each score in accuracies.csv of `folder` when it is known.

    What is there is not trained again, and a training that was stopped goes on. A dense task starts from the network's
    own classifier of the same seed. Runs on real sets stay in runs/ of the folder; those of proxies go.
    """
    folder = folder.resolve()  # a dense run knows its start by the whole path
    networks = list(dict.fromkeys((row.network, study.size_of(row)) for row in rows if not _tuned_further(row)))
    wanted = [(network, size, seed) for network, size in networks for seed in range(study.seeds)]
    for number, (network, size, seed) in enumerate(wanted, 1):
        if all(study.unknown(network, size, seed, task).key in _known(folder) for task in study.data):
            continue
        say(f"{number} of {len(wanted)}: train {network}, seed {seed}")
        try:
            for score in _trained(network, size, seed, study, folder, threads):
                _keep(score, folder)
        except Interrupted as stopped:
            raise Interrupted(stopped.number, "saved; go on with the same command.") from stopped
    return read_scores(folder)


def _tuned_further(row: PaperRow) -> bool:
    """Whether it is a network of another row, trained further at another size: `in1k_384` does that, from weights."""
    return row.image_size != SIZES[row.table] and not is_foreign(row.network)


def _trained(network: str, size: int, seed: int, study: Study, folder: Path, threads: int | None) -> Iterator[Score]:
    """A score a task that is not known. Of a proxy what is known is trained again where another task starts from it."""
    proxy = DEMO in study.data.values()
    begun = []
    for task, data in study.data.items():
        score, recipe = study.unknown(network, size, seed, task), replace(study.recipe(task), model=network, seed=seed)
        if score.key in _known(folder) and not (proxy and task == "classify"):
            continue
        run = run_folder(score, folder)
        try:
            if task == "classify":
                recipe = with_image_size(recipe, size)
            else:
                recipe = replace(recipe, weights=str(_classifier(score, size, study, folder)))
            if is_foreign(network):  # what only ours have
                recipe = replace(recipe, drop_path=None, optimizer=replace(recipe.optimizer, frozen_stages=0))
            place = str(scenes_folder(*SCENES) / "coco") if (data, task) == (DEMO, "detect") else data
            with owned(run, new=False):  # by no other process
                begun += [run] * proxy
            resumed = any((run / name).exists() for name in (LAST, PREVIOUS, BEST))
            if run.exists() and not resumed:
                shutil.rmtree(run)  # it was stopped before it came to anything
            validation = train(place, recipe, run, resume=resumed, machine=Machine(threads=threads))
            unseen = default_eval_split(place, task)
            found = validation if unseen == "val" else evaluated(open_checkpoint(run / WEIGHTS), place, threads)
            yield replace(score, percent=round(found.numbers[METRIC[task]], 3))
        except FAULTS as error:
            if isinstance(error, DiskFull):
                raise
            say(f"{network}, {task}: {first_line(error)}")
            yield replace(score, why=first_line(error))
    for run in begun:
        shutil.rmtree(run, ignore_errors=True)


def _classifier(score: Score, size: int, study: Study, folder: Path) -> Path:
    """The weights that a dense task starts from: the finished training of the same network and seed in this study, or
    where it trains no classifiers the only one that the folder has.
    """
    known = [one for one in read_scores(folder) if one.percent is not None]
    if "classify" in study.data:
        own = study.unknown(score.network, size, score.seed, "classify").key
        begun, why = [one for one in known if one.key == own], "which could not be trained"
    else:
        recipe, same = Path(REAL["classify"]).stem, (score.network, score.seed, "classify")
        begun = [one for one in known if (one.network, one.seed, one.task) == same and one.of.split()[0] == recipe]
        why = f"--train IMAGENET --train {score.data}"
    files = [run_folder(one, folder) / WEIGHTS for one in begun]
    there = [file for file in files if file.exists()]
    if len(there) == 1:
        return there[0]
    if there:
        why = f"{' and '.join(map(str, there))} are such, so name its images too: {why}"
    elif files:
        why = f"and {files[0]} is gone"
    raise UserError(f"it starts from a classifier of the same network and seed: {why}.")


def run_folder(score: Score, folder: Path) -> Path:
    """Where its training lies: runs/NETWORK-RECIPE-DIGEST-SEED, and behind it the size of a classifier, and which
    images, where they are not the shipped ones.
    """
    size = f"-{score.image_size}" * bool(score.image_size)
    data = "" if score.data == DEMO else f"-{hashlib.sha256(score.data.encode()).hexdigest()[:8]}"
    return folder / RUNS / f"{_file_name(score.network)}-{score.of.replace(' ', '-')}-{score.seed}{size}{data}"


def evaluated(
    network: Network, data: str, threads: int | None = None, *, image_size: int | None = None
) -> AnyEvaluation:
    """On the images that nothing was trained on: `test` of the data, else `val`. All of them must be readable."""
    m = network.metadata
    prepared = prepared_for(m, image_size, None)
    numbers = [str(number) for number in range(m.num_classes)] if m.task == "classify" else None
    split = read_split(data, default_eval_split(data, m.task), m.labels or numbers, m.task)
    if len(split.labels) != m.num_classes:
        raise UserError(f"{data} has {len(split.labels)} classes and the network {m.num_classes}.")
    if faults := getattr(split, "faults", ()):
        raise UserError(f"{data}: {faults[0]}")
    session = TorchSession(network, device="auto", threads=threads, precision="fp32")
    found = LEARNING[m.task].validate(session, split, prepared, Loading(BATCH, 0, ALONE))
    if found.rejected:
        raise UserError(f"{len(found.rejected)} images of {data} cannot be read: {found.rejected[0][1]}")
    return found


# ---- of weights that are there ---------------------------------------------------------------------------------------


def evaluate_networks(
    rows: Sequence[PaperRow], data: str, weights: Path | None, folder: Path, threads: int | None = None
) -> list[Score]:
    """Evaluate the networks of these rows on `data` with weights of the folder `weights`: files named as MODELs are,
    nextvit_small.pth, timm-resnet101.safetensors; -384 behind it for another size than the table's, and -fpn, -upernet
    or -mask_rcnn of a dense network. Without a file, Next-ViT's published ones. Scores are kept as those of trainings.
    """
    task = task_of(data)
    place = place_of(data, task)
    tried = 0
    if task == "classify":
        rows = [row for row in rows if "top1" in ACCURACY[row.table]]
        if not rows:
            say(f"note: {data} is for classification, and the table has none; see --evaluate in docs/reproduce.md.")
    else:  # what was tuned further as a classifier is not another network here
        rows = [row for row in rows if not _tuned_further(row)]
    for row in rows:
        for head in HEADS[task]:
            size = row.image_size if task == "classify" else 0
            score = Score(row.network, task, place, GIVEN, head=head, image_size=size)
            try:
                file = _weights_of(row, task, head, weights)
                tried += file is not None
                if file is None:
                    continue
                score = replace(score, source=file if isinstance(file, str) else f"{file.name} {_digest(file)}")
                network = _opened(row, task, head, str(file))
                found = evaluated(of_size(network, size or None), place, threads, image_size=size or None)
                score = replace(score, percent=round(found.numbers[METRIC[task]], 3))
            except (*FAULTS, OSError) as error:
                tried += 1
                say(f"{row.name}: {first_line(error)}")
                score = replace(score, why=first_line(error))
            _keep(score, folder, anew=True)
    if rows and not tried:
        say(f"note: none of these rows has weights for the task {task}; docs/reproduce.md tells how files are named.")
    return read_scores(folder)


def _weights_of(row: PaperRow, task: str, head: str, weights: Path | None) -> Path | str | None:
    """The file, or the tag of published ones; None: there are none."""
    usual = row.image_size == SIZES[row.table]
    stem = _file_name(row.network) + f"-{head}" * bool(head) + f"-{row.image_size}" * (not usual)
    files = sorted(weights.glob(f"{stem}.*")) if weights else []
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1].name} are both for {row.name}; leave one of them there.")
    if files:
        return files[0]
    published = task == "classify" and row.network in PUBLISHED
    return ("in1k" if usual else f"in1k_{row.image_size}") if published else None


def _opened(row: PaperRow, task: str, head: str, weights: str) -> Network:
    """The network with these weights; UserError where they are of another one."""
    if task == "classify":
        return open_network(row.network, weights)
    network = open_checkpoint(weights)
    m = network.metadata
    if (m.variant, m.task, m.head) != (row.network, task, head):
        raise UserError(f"{weights} is {m.variant} with {m.head or 'no head'}, not {row.network} with {head}.")
    return network


def _file_name(network: str) -> str:
    return network.replace(":", "-")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


# ---- kept and summed up ----------------------------------------------------------------------------------------------


def read_scores(folder: Path) -> list[Score]:
    """What a folder has; none where there is no file."""
    return read_records(folder / "accuracies.csv", Score)


def _known(folder: Path) -> set[tuple[str, int, int, Kind]]:
    return {score.key for score in read_scores(folder) if score.percent is not None}


def _keep(score: Score, folder: Path, *, anew: bool = False) -> None:
    """Add it to what the folder has; a failure does not take the place of a figure, unless it was asked for `anew`."""
    if score.percent is None and score.key in _known(folder) and not anew:
        return
    known = {one.key: one for one in read_scores(folder)} | {score.key: replace(score, day=today())}
    write_rows(folder / "accuracies.csv", [asdict(one) for one in known.values()])


def of_row(row: PaperRow, scores: Sequence[Score], kind: Kind) -> list[Score]:
    """Of a row's network, one a seed, of one kind. A classifier's are of the row's size; those of proxies and of dense
    tasks are of no size, and of the row that is the network's own.
    """
    if (kind.of != GIVEN or kind.task != "classify") and _tuned_further(row):
        return []
    return [
        one
        for one in scores
        if (one.network, one.kind) == (row.network, kind)
        and (kind.task != "classify" or kind.proxy or one.image_size == row.image_size)
    ]


def kinds_of(rows: Sequence[PaperRow], scores: Sequence[Score]) -> dict[Kind, str]:
    """The kinds of scores that these rows have, each with a title of its own."""
    kinds = [k for k in dict.fromkeys(one.kind for one in scores) if any(of_row(row, scores, k) for row in rows)]
    titles = [kind.title for kind in kinds]
    return {
        kind: kind.title + f" ({', '.join(filter(None, kind[2:]))})" * (titles.count(kind.title) > 1) for kind in kinds
    }


def mean_of(scores: Sequence[Score]) -> float | None:
    """Percent, over the seeds."""
    percents = [one.percent for one in scores if one.percent is not None]
    return statistics.mean(percents) if percents else None


def summed_up(scores: Sequence[Score]) -> str:
    """Mean and standard deviation over the seeds, in percent; or why there is none."""
    percents = [one.percent for one in scores if one.percent is not None]
    if len(percents) > 1:
        return f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f} ({len(percents)} seeds)"
    if percents:
        return f"{percents[0]:.1f}"
    return f"not known: {scores[0].why}" if scores else "-"
