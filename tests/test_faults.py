"""What goes wrong in training, done on purpose: each row has what is expected, and records what was found.

`make faults` runs these and the rows that stand in other files, and prints both side by side.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nextvit.checkpoints import Position, newest_checkpoint, save_checkpoint
from nextvit.errors import Diverged, UserError
from nextvit.metadata import Metadata
from nextvit.recipe import Recipe, read_recipe
from nextvit.run import Machine
from nextvit.train import train
from nextvit.weights import read_weights
from tests.conftest import nextvit_here

RECIPE = ["drop_path=0.2", "images.size=32", "schedule.epochs=2", "batch_size=8", "schedule.warmup_epochs=1",
          "ema=0.9", "images.erasing=0.5", "mixing.mixup=0.8", "mixing.cutmix=1.0"]  # fmt: skip
MACHINE = Machine(threads=1, workers=0, deterministic=True)


def recipe(*more: str) -> Recipe:
    return read_recipe("default", [*RECIPE, *more])


FRESH = multiprocessing.get_context("forkserver")  # a fork of this process, with the threads of its libraries, may hang
FRESH.set_forkserver_preload(["nextvit.train", "torch._dynamo", "torchvision", "torch.utils.tensorboard"])


def start(work: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """Do the work in a process of its own: forked from one that has loaded torch and done nothing else."""
    process = FRESH.Process(target=_worked, args=(work, arguments))
    process.start()
    return process


def _worked(work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        work(*arguments)
    except UserError:
        os._exit(2)


def ended(process: multiprocessing.Process) -> int:
    """Its exit code: -N after signal N."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def trained(data: Path, run: Path, resumed: bool, machine: Machine = MACHINE) -> None:
    train(data, recipe(), run, resume=resumed, machine=machine)


def state_of(run: Path) -> tuple[dict, dict, str]:
    """All that a finished run leaves: tensors of the weights, of the last checkpoint, and its metrics."""
    last = read_weights(run / "last.ckpt").tensors
    return read_weights(run / "model.safetensors").tensors, last, (run / "metrics.csv").read_text()


def assert_same(run: Path, whole: Path) -> None:
    (weights, last, rows), (weights_whole, last_whole, rows_whole) = state_of(run), state_of(whole)
    assert rows == rows_whole
    for found, expected in ((weights, weights_whole), (last, last_whole)):
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    assert any(key.startswith("ema.") for key in last)
    assert any(key.startswith("optimizer.") for key in last)


@pytest.fixture(scope="module")
def whole(garment_folder, tmp_path_factory) -> Iterator[tuple[Path, float]]:
    """A run that nothing stops, and the seconds that it takes."""
    run = tmp_path_factory.mktemp("faults") / "whole"
    assert ended(start(abs, 1)) == 0  # what processes are forked from has loaded its libraries
    begin = time.monotonic()
    assert ended(start(trained, garment_folder, run, False)) == 0
    yield run, time.monotonic() - begin
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.fault("T1", "SIGKILL at random moments: bit-identical ends")
def test_a_run_killed_at_a_random_moment_ends_as_one_that_was_not(kills, whole, garment_folder, tmp_path, found):
    reference, seconds = whole
    same, resumed, rng = 0, 0, random.Random(kills)
    for number in range(kills):
        run = tmp_path / str(number)
        child = start(trained, garment_folder, run, False)
        time.sleep(rng.uniform(0.05, 1.0) * seconds)
        child.kill()
        ended(child)
        if (run / "last.ckpt").exists():
            resumed += 1
            assert ended(start(trained, garment_folder, run, True)) == 0
        else:  # before the first save: begun anew in the same place
            shutil.rmtree(run, ignore_errors=True)
            assert ended(start(trained, garment_folder, run, False)) == 0
        assert_same(run, reference)
        assert not [p for p in run.glob(".*") if p.is_dir()], "no unfinished files are left"
        same += 1
        shutil.rmtree(run)
    found(f"{same} of {kills} bit-identical, {resumed} resumed from a checkpoint")
    assert resumed >= kills // 4


@pytest.mark.fault("T4", "resume with workers 0 -> 2 -> 1: weights bit-identical")
def test_other_numbers_of_workers_give_the_same_weights(whole, garment_folder, tmp_path, monkeypatch, found):
    from nextvit import train as module

    run = tmp_path / "run"
    for workers, stop in ((0, 4), (2, 5), (1, 99)):
        honest, steps = module.train_step, []

        def step(*arguments, honest=honest, steps=steps, stop=stop):
            steps.append(1)
            if len(steps) == stop:
                signal.raise_signal(signal.SIGTERM)
            return honest(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, "train_step", step)
            machine = Machine(threads=1, workers=workers, deterministic=True)
            try:
                train(garment_folder, recipe(), run, resume=run.exists(), machine=machine)
            except module.Interrupted:
                assert workers != 1
    assert_same(run, whole[0])
    found("bit-identical after stops at steps 4 and 9")


def test_another_batch_size_goes_on_at_the_same_image(garment_folder, tmp_path, monkeypatch):
    """Stopped after 4 steps of 8 images; with 4 a step, 8 of the epoch's 12 are done."""
    from nextvit import train as module

    honest, steps = module.train_step, []

    def step(*arguments):
        steps.append(arguments[0].position.step)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(module, "train_step", step)
    with pytest.raises(module.Interrupted):
        train(garment_folder, recipe(), tmp_path / "run", machine=MACHINE)
    steps.clear()
    with pytest.raises(module.Interrupted):
        train(garment_folder, recipe(), tmp_path / "run", resume=True, changes=["batch_size=4"], machine=MACHINE)
    torch.use_deterministic_algorithms(False)
    assert steps == [8, 9, 10, 11]
    assert newest_checkpoint(tmp_path / "run").state["images"] == 48


@pytest.mark.parametrize("phase", [pytest.param("train_step", marks=pytest.mark.slow), "validate", "save"])
@pytest.mark.fault(
    "T2", "SIGTERM in a step, in validation, in a save: saved within the step, exit 143; resumed: the same"
)
def test_a_signal_in_any_phase_saves_and_resumes_to_the_same_run(
    phase, whole, garment_folder, tmp_path, monkeypatch, found
):
    from nextvit import train as module

    honest, calls = getattr(module, phase), []

    def signalling(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return honest(*arguments, **named)

    machine = Machine(threads=1, workers=2, deterministic=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, phase, signalling)
        with pytest.raises(module.Interrupted) as error:
            train(garment_folder, recipe(), tmp_path / "run", machine=machine)
    assert error.value.number == signal.SIGTERM
    state = newest_checkpoint(tmp_path / "run").state
    assert (state["epoch"], state["step"]) == ((0, 1) if phase == "train_step" else (1, 0))
    train(garment_folder, recipe(), tmp_path / "run", resume=True, machine=machine)
    assert_same(tmp_path / "run", whole[0])
    found(f"in {phase}: saved at epoch {state['epoch']}, step {state['step']}; bit-identical")


@pytest.mark.parametrize("fault", ["rate", "weight"])
@pytest.mark.fault("T5", "stops within 3 steps, exit 2, names step, rate and files; nothing saved is not finite")
def test_a_number_that_is_not_finite_stops_the_run(fault, garment_folder, tmp_path, monkeypatch, found):
    from nextvit import train as module

    honest, steps = module.train_step, []

    def step(run, parts, rate):
        steps.append(1)
        if fault == "weight" and len(steps) == 8:
            with torch.no_grad():
                run.model.stages[1].blocks[0].mlp.fc1.weight[0, 0] = torch.inf
        return honest(run, parts, rate)

    monkeypatch.setattr(module, "train_step", step)
    more = ["optimizer.lr=1e30", "schedule.warmup_epochs=0"] if fault == "rate" else []
    with pytest.raises(Diverged) as error:
        train(garment_folder, recipe(*more), tmp_path / "run", machine=MACHINE)
    assert len(steps) <= (3 if fault == "rate" else 10)
    assert "step" in str(error.value)
    assert "learning rate" in str(error.value)
    assert str(garment_folder) in str(error.value)
    saved = [*(tmp_path / "run").glob("*.ckpt"), *(tmp_path / "run").glob("*.safetensors")]
    assert bool(saved) == (fault == "weight"), "the first epoch was whole"
    for path in saved:
        assert all(bool(torch.isfinite(t).all()) for t in read_weights(path).tensors.values())
    found(f"{fault}: {str(error.value).partition(', on')[0]}")


def train_with(step: str, *arguments: object) -> subprocess.CompletedProcess:
    """`nextvit train` in a process of its own, with these lines before each training step; `steps` counts them."""
    script = (
        "import multiprocessing, os, resource, signal, sys, time\n"
        "from nextvit import train as module\n"
        "from nextvit.cli import main\n"
        "honest, steps = module.train_step, []\n"
        "def step(*a):\n"
        "    steps.append(1)\n"
        f"{textwrap.indent(step, '    ')}\n"
        "    return honest(*a)\n"
        "module.train_step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.fault("T6", "a loading process is killed: one sentence, exit 1, within 15 s, the checkpoint loads")
def test_a_killed_loading_process_is_a_sentence(garment_folder, tmp_path, found):
    kill = (
        "if len(steps) == 8:\n"
        "    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "time.sleep(0.3 * (len(steps) >= 8))"
    )
    flags = [flag for value in RECIPE for flag in ("--set", value)]
    run = tmp_path / "run"
    done = train_with(kill, garment_folder, "--output", run, "--workers", 1, *flags)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "it loaded images; go on with --resume" in last
    assert newest_checkpoint(run).state["epoch"] >= 1
    found(last[:90])


@pytest.mark.slow
def test_a_fault_in_a_loading_process_is_told_as_what_it_is(garment_folder, tmp_path):
    """With the image, and not as a process that died, which resuming would mend."""
    fail = (
        "from nextvit import learning\n"
        "def transform(*sample):\n"
        "    raise ZeroDivisionError('by an honest mistake')\n"
        "learning.sample_transform = lambda *a: transform"
    )
    script_flags = ["--output", tmp_path / "run", "--workers", 1, "--image-size", 32, "--epochs", 2]
    done = train_with(fail, garment_folder, *script_flags)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "could not be prepared (ZeroDivisionError: by an honest mistake)" in last
    assert str(garment_folder) in last
    assert "--resume" not in last


@pytest.mark.fault("T3", "a second SIGINT quits at once: exit 130, the older checkpoint loads")
def test_a_second_signal_ends_the_process_at_once(garment_folder, tmp_path, found):
    twice = (
        "if len(steps) == 8:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(0.1)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(60)"
    )
    flags = [flag for value in RECIPE for flag in ("--set", value)]
    run = tmp_path / "run"
    begun = time.monotonic()
    done = train_with(twice, garment_folder, "--output", run, "--workers", 0, *flags)
    assert done.returncode == 130, done.stderr
    assert time.monotonic() - begun < 60
    state = newest_checkpoint(run).state
    assert (state["epoch"], state["step"]) == (1, 0)
    found("exit 130; the checkpoint of the epoch before loads")


@pytest.mark.fault("T7", "shared memory too small: falls back to no workers and says so, or exit 2")
def test_little_shared_memory_is_told(monkeypatch, capsys, found):
    from nextvit.data import loader

    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6))
    assert loader.loaders(2, torch.device("cpu"), 64 * 224 * 224 * 3) == 0
    told = capsys.readouterr().err
    assert "1 MB free" in told
    found(told.strip()[:90])


@pytest.mark.fault("T8", "memory too short: a sentence with the batch and the size to try, exit 1")
def test_too_little_memory_is_a_sentence(garment_folder, tmp_path, found):
    shrink = (
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 10**7, now + 2 * 10**7))"
    )
    flags = ["--workers", 0, "--batch-size", 48, "--image-size", 224, "--threads", 1]
    done = train_with(shrink, garment_folder, "--output", tmp_path / "run", *flags)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "48 images of 224 pixels" in last
    assert "accumulation=2" in last
    found(last[:100])


@pytest.mark.fault("T9", "--device cuda without one: exit 2; auto says what it took")
def test_a_device_that_is_not_there_is_refused(garment_folder, tmp_path, found):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = nextvit_here("train", garment_folder, "--device", "cuda", "--output", tmp_path / "run")
    assert (done.returncode, "there is no device 'cuda' here" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
    found(done.stderr.strip())


@pytest.mark.fault(
    "T10", "two runs into one folder: the second is refused and names the pid; a dead one's lock is free"
)
def test_a_second_run_into_the_same_folder_is_refused(whole, garment_folder, tmp_path, found):
    run = tmp_path / "run"
    child = start(trained, garment_folder, run, False)
    while not (run / "metrics.csv").exists():
        assert child.is_alive()
        time.sleep(0.02)
    for resumed in (False, True):
        with pytest.raises(UserError, match=f"process {child.pid} is writing to") as error:
            train(garment_folder, recipe(), run, resume=resumed, machine=MACHINE)
    child.kill()
    ended(child)
    assert ended(start(trained, garment_folder, run, True)) == 0
    assert_same(run, whole[0])
    found(str(error.value))


@pytest.mark.fault("T12", "the recipe was changed since: exit 2 names the key; --set says that it is meant")
def test_a_recipe_that_was_changed_is_told(whole, garment_folder, tmp_path, found):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("batch_size: 8", "batch_size: 16").replace("epochs: 2", "epochs: 3"))
    done = nextvit_here("train", garment_folder, "--resume", run)
    assert done.returncode == 2
    assert "batch_size = 16 and the run was begun with 8" in done.stderr
    shutil.copy(whole[0] / "recipe.yaml", path)
    more = nextvit_here("train", garment_folder, "--resume", run, "--set", "schedule.epochs=3", "--threads", 1)
    assert more.returncode == 0, more.stderr
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    refused = nextvit_here("train", garment_folder, "--resume", run, "--set", "model=nextvit_tiny")
    assert (refused.returncode, "nextvit_nano" in refused.stderr) == (2, True)
    torch.use_deterministic_algorithms(False)
    found(done.stderr.strip()[-110:])


@pytest.mark.parametrize("batch", [8, 500])
@pytest.mark.fault("T13", "a batch larger than the data trains at least one step an epoch, never none")
def test_a_batch_larger_than_the_data_trains_all_the_same(batch, tmp_path, found):
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 40), (80 * index, 0, 0)).save(tmp_path / "data" / label / f"{index}.png")
    flags = ["--batch-size", batch, "--image-size", 32, "--epochs", 1, "--workers", 0, "--json"]
    done = nextvit_here("train", tmp_path / "data", "--output", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val"]["images"] == 2
    images = int((tmp_path / "run" / "metrics.csv").read_text().splitlines()[1].split(",")[-1])
    assert images == 4
    found(f"batch {batch}: {images} of 4 images trained on")


SYSCALLS = ("write", "pwrite64", "fsync", "rename", "renameat2", "ftruncate", "mkdir", "rmdir", "unlinkat", "chmod")


def save_three(folder: Path, told: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)  # until strace is there
    for step in (1, 2, 3):
        tensors = {"model.x": torch.full((5000,), float(step)), "optimizer.x.step": torch.tensor(float(step))}
        state = {**asdict(Position(step=step)), "recipe": {}}
        save_checkpoint(folder / "last.ckpt", tensors, Metadata("nextvit_nano"), state)
        told.value = step


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.fault(
    "K1", "SIGKILL before every write, fsync and rename of a save (strace): a whole checkpoint each time"
)
def test_a_save_killed_at_any_system_call_leaves_a_whole_checkpoint(tmp_path, found):
    """A process that saves three checkpoints; each dies at another call of one kind, until one lives."""
    killed = 0
    for call in SYSCALLS:
        for number in range(1, 1000):
            folder = tmp_path / f"{call}-{number}"
            folder.mkdir()
            told = FRESH.Value("i", 0)
            child = start(save_three, folder, told)
            while "State:\tT" not in Path(f"/proc/{child.pid}/status").read_text():
                time.sleep(0.01)
            log = tmp_path / "log"
            inject = f"inject={call}:signal=SIGKILL:when={number}"
            tracer = subprocess.Popen(
                ["strace", "-f", "-p", str(child.pid), "-e", inject, "-o", log], stderr=subprocess.PIPE, text=True
            )
            assert "attached" in tracer.stderr.readline()
            os.kill(child.pid, signal.SIGCONT)
            code = ended(child)
            tracer.communicate(timeout=30)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
            if told.value:
                newest = newest_checkpoint(folder)
                step = newest.state["step"]
                assert step >= told.value, log.read_text()[-2000:]
                assert torch.equal(newest.tensors["model.x"], torch.full((5000,), float(step)))
            shutil.rmtree(folder)
    found(f"{killed} of {killed} kills left a whole checkpoint, none older than the last finished save")
    assert killed >= 20
