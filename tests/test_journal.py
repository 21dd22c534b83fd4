"""What is told while a run goes on, read back from where it was written."""

import csv
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import nextvit_here

FLAGS = ["--image-size", 32, "--epochs", 2, "--workers", 0, "--threads", 1, "--batch-size", 16]


def test_tensorboard_has_the_numbers_of_metrics_csv(garment_folder, tmp_path):
    run = tmp_path / "run"
    assert nextvit_here("train", garment_folder, "--output", run, *FLAGS, "--set", "ema=0.9").returncode == 0
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for column in ("train_loss", "val_top1", "val_loss", "ema_top1", "ema_loss"):
        points = events.Scalars(column.replace("_", "/", 1))
        epochs = [point for point in points if point.step in (3, 6)]
        assert [point.step for point in epochs][-2:] == [3, 6]
        assert [p.value for p in epochs[-2:]] == pytest.approx([float(row[column]) for row in rows], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_services_get_the_numbers(service, garment_folder, tmp_path):
    run = tmp_path / "run"
    environment = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}",
                   "MLFLOW_ALLOW_FILE_STORE": "true"}  # fmt: skip
    command = [sys.executable, "-m", "nextvit", "train", garment_folder, "--output", run, "--log", service, *FLAGS]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    if service == "wandb":
        assert list(run.glob("wandb/offline-run-*/*.wandb"))
    else:
        (metric,) = (tmp_path / "mlruns").glob("*/*/metrics/val.top1")
        with open(run / "metrics.csv", newline="") as file:
            expected = [float(row["val_top1"]) for row in csv.DictReader(file)]
        assert [float(line.split()[1]) for line in metric.read_text().splitlines()] == pytest.approx(expected)


def test_a_log_that_is_not_known_is_refused(garment_folder, tmp_path):
    done = nextvit_here("train", garment_folder, "--output", tmp_path / "run", "--log", "papyrus")
    assert (done.returncode, "there is no log 'papyrus'; take wandb or mlflow" in done.stderr) == (2, True)


def test_the_profile_is_a_table_and_a_trace(garment_folder, tmp_path):
    run = tmp_path / "run"
    done = nextvit_here("train", garment_folder, "--output", run, "--profile", *FLAGS, "--set", "batch_size=4")
    assert done.returncode == 0, done.stderr
    assert "aten::" in (run / "profile" / "table.txt").read_text()
    assert (run / "profile" / "trace.json").stat().st_size > 10_000
