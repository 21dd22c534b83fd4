"""Training: it learns, a kill leaves a whole checkpoint, and resuming gives the run that was not killed."""

import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from nextvit.checkpoints import newest_checkpoint
from nextvit.create import open_checkpoint
from nextvit.errors import Diverged, UserError
from nextvit.metrics import kept_epoch
from nextvit.recipe import Recipe, parse_recipe, read_recipe
from nextvit.run import Machine
from nextvit.train import train
from nextvit.weights import read_weights, save_weights
from tests.conftest import nextvit, nextvit_here

SMALL = ["drop_path=0.2", "images.size=32", "schedule.epochs=3", "batch_size=8", "schedule.warmup_epochs=1"]


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_tensors(a: Path, b: Path) -> bool:
    first, second = read_weights(a).tensors, read_weights(b).tensors
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


FLAGS = ["--threads", "1", "--deterministic", *(flag for value in SMALL for flag in ("--set", value))]


@pytest.fixture(scope="module")
def whole(garment_folder, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = nextvit_here("train", garment_folder, "--output", run, *FLAGS)
    torch.use_deterministic_algorithms(False)
    assert done.returncode == 0, done.stderr
    return run


def start_and_signal(data: Path, run: Path, number: int, wait: float, *more: str) -> tuple[int, str]:
    """Begin the same run, send the signal `wait` seconds into its second epoch -> exit code, standard error.

    With more flags, to its whole process group, as `timeout` and a terminal do.
    """
    command = [sys.executable, "-m", "nextvit", "train", str(data), "--output", str(run), *FLAGS, *more]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **pipes)
    for line in process.stderr:
        if line.startswith("epoch 1 of 3"):
            time.sleep(wait)
            os.killpg(process.pid, number) if more else process.send_signal(number)
            break
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_run_folder_holds_what_the_contract_says(trained):
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    curves = {name for name in names if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(curves) == 1
    files = {"recipe.yaml", "metrics.csv", "last.ckpt", "last.prev.ckpt", "best.ckpt", "model.safetensors"}
    assert names - curves == files | {"plots/curves.png", "plots/confusion.png", "plots/confusion.csv"}
    assert [row["epoch"] for row in rows(trained)] == ["1", "2"]
    resolved = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert (resolved["schedule"]["epochs"], resolved["images"]["size"], resolved["seed"]) == (2, 32, 0)
    metadata = read_weights(trained / "model.safetensors").metadata
    assert (metadata.labels, metadata.preprocess.image_size) == (("bag", "sandal", "trouser"), 32)
    assert resolved["weights"] == "none", "nano has no published weights"
    assert metadata.recipe == read_recipe(str(trained / "recipe.yaml")).sha256


def test_training_learns_three_easy_classes(garment_folder, tmp_path):
    steps = ["schedule.epochs=5", "schedule.steps_per_epoch=30", "schedule.warmup_epochs=0.6"]
    recipe = read_recipe("default", ["images.size=32", "batch_size=8", "optimizer.lr=2e-3", *steps])
    result = train(garment_folder, recipe, tmp_path / "run", machine=Machine(threads=1, workers=0))
    assert result.metrics.top1 >= 75, "chance is 33 %"


@pytest.mark.slow
@pytest.mark.fault("T1", "SIGKILL in another process, and resumed in a third: the same run")
def test_resuming_after_sigkill_gives_the_same_run(whole, garment_folder, tmp_path):
    """Killed in mid-epoch, at a moment that the machine chooses, and resumed until it is done."""
    killed = tmp_path / "killed"
    code, _ = start_and_signal(garment_folder, killed, signal.SIGKILL, wait=0.3)
    assert code == -signal.SIGKILL
    assert read_weights(killed / "last.ckpt").state["epoch"] >= 1
    done = nextvit("train", garment_folder, "--resume", killed, "--threads", 1, "--deterministic")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert rows(killed) == rows(whole)
    assert same_tensors(killed / "model.safetensors", whole / "model.safetensors")
    assert same_tensors(killed / "last.ckpt", whole / "last.ckpt")
    assert not list(killed.glob(".*")), "no unfinished files are left"


@pytest.mark.slow  # signals in each phase of a run are in test_faults
@pytest.mark.parametrize("more", [(), ("--workers", "2")], ids=["alone", "with its loading processes"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resuming_gives_the_same_run(number, code, more, whole, garment_folder, tmp_path):
    stopped = tmp_path / "stopped"
    found, errors = start_and_signal(garment_folder, stopped, number, 0.1, *more)
    assert found == code, errors
    assert f"--resume {stopped}" in errors
    state = read_weights(stopped / "last.ckpt").state
    assert (1, 0) < (state["epoch"], state["step"]) < (3, 0)
    done = nextvit("train", garment_folder, "--resume", stopped, "--threads", 1, "--deterministic")
    assert done.returncode == 0, done.stderr
    assert rows(stopped) == rows(whole)
    assert same_tensors(stopped / "model.safetensors", whole / "model.safetensors")


@pytest.mark.slow  # one in mid-epoch is in test_faults
@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_stop_after_any_step_resumes_to_the_same_run(step, whole, garment_folder, tmp_path, monkeypatch):
    """In mid-epoch and after its last step (6 an epoch); the signal is raised by the step itself."""
    from nextvit import train as module

    honest, calls = module.train_step, []

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return honest(*arguments)

    recipe = read_recipe("default", SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", signalling)
        with pytest.raises(module.Interrupted):
            train(garment_folder, recipe, tmp_path / "run", machine=Machine(threads=1, workers=0, deterministic=True))
    state = read_weights(tmp_path / "run" / "last.ckpt").state
    assert (state["epoch"], state["step"]) == (0, step)
    train(
        garment_folder, recipe, tmp_path / "run", resume=True, machine=Machine(threads=1, workers=0, deterministic=True)
    )
    torch.use_deterministic_algorithms(False)
    assert rows(tmp_path / "run") == rows(whole)
    assert same_tensors(tmp_path / "run" / "model.safetensors", whole / "model.safetensors")


@pytest.mark.fault(
    "K3", "the newest is empty, cut, or random: the one before is taken, with a warning; given itself: exit 2"
)
@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "random"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(damage, trained, garment_folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    good = (run / "last.ckpt").read_bytes()
    bad = {"empty": b"", "half": good[: len(good) // 2], "last byte": good[:-1], "random": os.urandom(5000)}[damage]
    (run / "last.ckpt").write_bytes(bad)
    assert newest_checkpoint(run).state["epoch"] == 1
    assert f"warning: {run / 'last.ckpt'}" in capsys.readouterr().err
    if damage == "half":
        done = nextvit_here("train", garment_folder, "--resume", run)
        assert done.returncode == 0, done.stderr
        assert "resuming" in done.stderr
        assert "1 of 2 epochs done" in done.stderr
        (run / "last.ckpt").write_bytes(bad)
    explicit = nextvit_here("info", run / "last.ckpt")
    assert explicit.returncode == 2
    assert explicit.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_files_finite(garment_folder, tmp_path):
    recipe = read_recipe("default", [*SMALL, "optimizer.lr=1e30", "schedule.warmup_epochs=0.1"])
    with pytest.raises(Diverged, match=r"not finite at epoch 1, step \d+, learning rate"):
        train(garment_folder, recipe, tmp_path / "run", machine=Machine(threads=1, workers=0))
    assert not list((tmp_path / "run").glob("*.ckpt"))


@pytest.mark.fault("D3, D5", "over 1 % unreadable (cut JPEGs): exit 2 before epoch 1; else left out and listed")
def test_images_that_cannot_be_read_are_left_out_and_listed(garment_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(garment_folder, folder)
    planted = [
        folder / "bag" / "03.jpg",
        folder / "bag" / "04.jpg",
        folder / "trouser" / "11.jpg",
    ]  # the second is in val
    for path in planted:
        path.write_bytes(path.read_bytes()[:200])
    done = nextvit_here("train", folder, "--output", tmp_path / "run", *(f for s in SMALL for f in ("--set", s)))
    assert (done.returncode, "2 of 48 images of train cannot be read" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
    flags = ["--allow-bad", *(f for s in SMALL for f in ("--set", s))]
    done = nextvit_here("train", folder, "--output", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert read_weights(tmp_path / "run" / "last.ckpt").state["images"] == 3 * 46, "each good image once an epoch"
    with open(tmp_path / "run" / "rejected.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [str(path) for path in planted]


@pytest.mark.fault("D6", "one class, one image, none: exit 2 before anything is written")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 4}, "one class only"),
        ({"a": 0, "b": 0}, "no images"),
        ({}, "no class folders"),
        ({"a": 1, "b": 0}, "one training image"),
    ],
)
def test_data_that_cannot_train_is_refused_before_it_starts(files, message, tmp_path):
    for label, count in files.items():
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 40)).save(tmp_path / "data" / label / f"{index}.png")
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "data", Recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("T11", "a run that exists is never overwritten")
def test_an_existing_run_is_never_overwritten_and_other_data_are_refused(trained, garment_folder, tmp_path):
    before = (trained / "last.ckpt").read_bytes()
    done = nextvit_here("train", garment_folder, "--output", trained)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(3):
            Image.new("RGB", (40, 40)).save(tmp_path / label / f"{index}.png")
    done = nextvit_here("train", tmp_path, "--resume", trained)
    assert done.returncode == 2
    assert "trained with other labels" in done.stderr
    assert (trained / "last.ckpt").read_bytes() == before


@pytest.mark.fault("T12", "other files or classes on resuming: exit 2, named")
@pytest.mark.parametrize("change", ["a training image has another name", "a validation image is another", "a class is"])
def test_resuming_on_data_that_is_not_the_same_is_refused(change, trained, garment_folder, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(garment_folder, data)
    shutil.copytree(trained, run)
    if change == "a class is":
        assert nextvit_here("train", data, "--resume", run).returncode == 0, "where the folder lies does not matter"
    if change == "a training image has another name":
        (data / "bag" / "00.jpg").rename(data / "bag" / "000.jpg")
    elif change == "a validation image is another":
        (data / "bag" / "04.jpg").rename(data / "bag" / "04a.jpg")
    else:
        (data / "bag").rename(data / "sack")
    done = nextvit_here("train", data, "--resume", run)
    assert (done.returncode, "was trained with other" in done.stderr) == (2, True)


def test_a_run_goes_on_in_another_precision_if_told(trained, garment_folder, tmp_path):
    """As on a machine without the one it was begun in: what the checkpoint holds of a scaler is not the new one's."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    saved = read_weights(run / "last.ckpt")
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    state = {**saved.state, "precision": "fp16", "scaler": scaler, "epoch": 1, "history": saved.state["history"][:1]}
    save_weights(run / "last.ckpt", saved.tensors, saved.metadata, state)
    done = nextvit_here("train", garment_folder, "--resume", run)
    assert (done.returncode, "does not compute in fp16" in done.stderr) == (2, True), "never another one in silence"
    done = nextvit_here("train", garment_folder, "--resume", run, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert "begun in fp16 and goes on in fp32" in done.stderr


@pytest.mark.fault("K2", "the disk is full: the older checkpoint is whole, nothing unfinished stays, one sentence")
def test_a_full_disk_is_a_sentence_and_spoils_nothing(trained, garment_folder, tmp_path):
    """No file may grow beyond 1 MB in the process: the next checkpoint cannot be written."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path.name: path.read_bytes() for path in run.glob("*.ckpt")}
    done = nextvit(
        "train", garment_folder, "--resume", run, "--set", "schedule.epochs=3",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.search(rf"error: DiskFull: cannot write {run}/\S+: .*; it needs \d\d MB", done.stderr.splitlines()[-1])
    assert {path.name: path.read_bytes() for path in run.glob("*.ckpt")} == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.fault("K2", "a real disk runs full, then there is room: the older checkpoint was whole, the run goes on")
def test_a_run_goes_on_when_there_is_room_again(garment_folder, tmp_path):
    script = (
        'mount -t tmpfs -o size=130m none "$1" || exit 77\n'
        'train="$2 -m nextvit train $3"; run="$1/run"\n'
        '$train --image-size 32 --epochs 1 --output "$run" > "$1/told" || exit 78\n'
        'sha256sum "$run/last.ckpt"; $train --resume "$run" --set schedule.epochs=2; echo "ended with $?"\n'
        'sha256sum "$run/last.ckpt"; ls -A "$run"; mount -o remount,size=400m none "$1"\n'
        '$train --resume "$run" --set schedule.epochs=2 > "$1/told" && tail -n 1 "$run/metrics.csv"\n'
    )
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, str(garment_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("file systems cannot be mounted here")
    first, ended, second, *names, last = done.stdout.splitlines()
    assert ended == "ended with 1", done.stderr
    assert "No space left on device; it needs" in done.stderr
    assert first == second
    assert "last.ckpt" in names
    assert not [name for name in names if name.endswith(".tmp")]
    assert last.startswith("2,")


@pytest.mark.parametrize(
    ("scores", "images", "kept"),
    [
        ([50, 80, 75, 70], 20, 2),  # a standard error is 8.9 points
        ([50, 80, 75, 70], 2000, 1),  # and here 0.9
        ([50, 80, 79.5, 60], 2000, 2),
        ([100, 90, 100, 99], 10, 2),
        ([0, 0], 10, 1),
        ([30], 10, 0),
    ],
)
def test_the_last_epoch_within_a_standard_error_of_the_highest_is_kept(scores, images, kept):
    assert kept_epoch(scores, images) == kept


def test_the_best_checkpoint_is_of_that_epoch(trained):
    scores = [float(row["val_top1"]) for row in rows(trained)]
    assert read_weights(trained / "best.ckpt").state["epoch"] == kept_epoch(scores, 12) + 1


def test_a_run_without_its_weight_file_gets_it_back_from_the_best_checkpoint(trained, garment_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "model.safetensors").unlink()
    train(garment_folder, read_recipe(str(run / "recipe.yaml")), run, resume=True, machine=Machine(workers=0))
    assert same_tensors(run / "model.safetensors", trained / "model.safetensors")


def test_class_names_that_are_odd_do_not_spoil_a_run(tmp_path):
    for label in (b"nextvit-sha256:", b"\xff", "naïve 😀".encode()):
        folder = os.path.join(os.fsencode(tmp_path / "data"), label)
        os.makedirs(folder)
        for index in range(3):
            with open(os.path.join(folder, b"%d.png" % index), "wb") as file:
                Image.new("RGB", (40, 40), (index, 0, 0)).save(file, format="PNG")
    done = nextvit_here("train", tmp_path / "data", "--epochs", 1, "--image-size", 32, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    labels = read_weights(tmp_path / "run" / "model.safetensors").metadata.labels
    assert sorted(map(os.fsencode, labels)) == sorted((b"nextvit-sha256:", b"\xff", "naïve 😀".encode()))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", ["optimiser.lr=1"], "no key optimiser; did you mean optimizer"),
        ("", ["optimizer.lrr=1"], "no key optimizer.lrr; did you mean optimizer.lr"),
        ("", ["optimizer.lr=-1"], "optimizer.lr = -1 will not do"),
        ("", ["optimizer.lr=abc"], "optimizer.lr = 'abc' will not do"),
        ("", ["optimizer.lr"], "takes key=value"),
        ("model: !!python/object/apply:os.system ['touch /tmp/never']", [], "not plain YAML"),
        ("- 1", [], "must be a mapping"),
        ("images: {size: 16}", [], "images.size = 16 will not do"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_the_nearest_key(text, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        parse_recipe(text, "my.yaml", overrides)
    assert "\n" not in str(error.value)


def test_a_recipe_survives_its_own_yaml():
    recipe = read_recipe("demo", ["seed=7", "drop_path=0.05"])
    again = parse_recipe(recipe.to_yaml(), "again")
    assert again == recipe
    assert again.sha256 == recipe.sha256 != Recipe().sha256


def test_fine_tuning_starts_from_the_given_weights(trained, garment_folder, tmp_path):
    recipe = read_recipe("default", [*SMALL, "schedule.epochs=1", "optimizer.lr=1e-9", "schedule.min_lr=0"])
    recipe = replace(recipe, weights=str(trained / "model.safetensors"))
    train(garment_folder, recipe, tmp_path / "run", machine=Machine(threads=1, workers=0))
    before, after = (
        open_checkpoint(trained / "model.safetensors"),
        open_checkpoint(tmp_path / "run" / "model.safetensors"),
    )
    torch.testing.assert_close(after.stem[0].conv.weight, before.stem[0].conv.weight, rtol=0, atol=1e-6)
