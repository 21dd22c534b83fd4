"""Several processes train as one does: the same images, the same losses to rounding, one run folder."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nextvit.processes import Processes, SyncedBatchNorm
from nextvit.weights import read_weights
from tests.conftest import nextvit_here
from tests.test_objects import coco, content

SETTINGS = ["drop_path=0", "images.size=32", "schedule.epochs=1", "batch_size=16", "sync_batchnorm=true", "ema=0.9",
            "images.erasing=0.5", "images.randaugment=rand-m9-mstd0.5-inc1", "mixing.mixup=0.8",
            "mixing.cutmix=1.0", "schedule.kind=constant", "schedule.warmup_epochs=0"]  # fmt: skip
FLAGS = [*(flag for value in SETTINGS for flag in ("--set", value)), "--threads", "1", "--workers", "0"]


def torchrun(count: int, *arguments: object, prefix: tuple[str, ...] = (), how: tuple[str, ...] = ()) -> list[str]:
    if not how:
        how = ("--standalone",)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *how]
    return [*prefix, *launch, "-m", "nextvit", *map(str, arguments)]


def run(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def row(folder: Path) -> dict[str, float]:
    with open(folder / "metrics.csv", newline="") as file:
        (only,) = csv.DictReader(file)
    return {key: float(value) for key, value in only.items()}


@pytest.fixture(scope="module")
def alone(garment_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "alone"
    done = nextvit_here("train", garment_folder, "--output", folder, *FLAGS)
    assert done.returncode == 0, done.stderr
    return folder


def assert_the_same_to_rounding(folder: Path, alone: Path) -> None:
    found, expected = row(folder), row(alone)
    for key in {"val_miou", "val_accuracy"} & found.keys():  # in percent; rounding decides some pixels
        assert found.pop(key) == pytest.approx(expected.pop(key), abs=0.5)
    # Rounding, after three steps of Adam; 2.5e-5 was seen.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    weights, reference = (read_weights(f / "last.ckpt").tensors for f in (folder, alone))
    assert weights.keys() == reference.keys()
    apart = [
        (weights[key] - tensor).abs().flatten()
        for key, tensor in reference.items()
        if key.startswith("model.") and tensor.is_floating_point()
    ]
    far = float((torch.cat(apart) > 1e-4).float().mean())
    assert far < 0.005, "where a gradient is nothing but rounding, Adam makes a whole step of it"


@pytest.mark.parametrize(
    ("count", "more"),
    [(2, []), pytest.param(4, [], marks=pytest.mark.slow), pytest.param(2, ["--shard"], marks=pytest.mark.slow)],
    ids=["2", "4", "2, in shards"],
)
def test_processes_together_compute_what_one_does(count, more, alone, garment_folder, tmp_path):
    done = run(torchrun(count, "train", garment_folder, "--output", tmp_path / "run", *FLAGS, *more))
    assert f"{count} processes, batch 16" in done.stderr
    assert done.stderr.count("epoch 1 of 1") == 1, "the first process speaks"
    assert_the_same_to_rounding(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_processes_together_train_a_segmenter_as_one_does(head, tmp_path):
    """One step, because more amplify rounding; without the head's dropout, which is each process's own."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for index in range(9):
            image = np.kron(rng.integers(0, 255, (5, 6, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
            mask = np.kron(rng.integers(0, 3, (5, 6)), np.ones((10, 10), int)).astype(np.uint8)
            for kind, array in (("images", image), ("masks", mask)):
                path = tmp_path / "data" / part / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (tmp_path / "data" / "labels.txt").write_text("a\nb\nc")
    script = tmp_path / "without_dropout.py"
    script.write_text(
        "import sys\nfrom torch import nn\nfrom nextvit.cli import main\n"
        "nn.Dropout2d.forward = lambda self, x: x\nsys.exit(main(sys.argv[1:]))\n"
    )
    settings = ["drop_path=0", "sync_batchnorm=true", "batch_size=8", "model=nextvit_nano", "weights=none",
                "schedule.epochs=1", "schedule.kind=constant", "schedule.warmup_epochs=0", f"head={head}"]  # fmt: skip
    flags = [*(flag for value in settings for flag in ("--set", value)), "--threads", "1", "--workers", "0"]
    command = ["train", tmp_path / "data", "--task", "segment", "--image-size", "96", *flags, "--output"]
    run([sys.executable, str(script), *map(str, command), str(tmp_path / "alone")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    run([*launch, *map(str, command), str(tmp_path / "two")])
    assert_the_same_to_rounding(tmp_path / "two", tmp_path / "alone")


@pytest.mark.slow
def test_processes_together_train_a_detector(tmp_path):
    """One of them sees an image without an object, and has every gradient all the same; boxes are drawn by each."""
    whole = content(6)
    whole["annotations"] = whole["annotations"][:3]
    coco(tmp_path / "data", whole, images=6)
    settings = ["batch_size=4", "model=nextvit_nano", "weights=none", "schedule.epochs=1", "sampling.boxes=16",
                "sampling.masks=2"]  # fmt: skip
    flags = [*(flag for value in settings for flag in ("--set", value)), "--threads", "1", "--workers", "0"]
    command = ["train", tmp_path / "data", "--task", "detect", "--image-size", "64", *flags, "--output"]
    run(torchrun(2, *command, tmp_path / "two"))
    assert row(tmp_path / "two")["images"] == 8, "upright and lying images apart, each kind filled to whole batches"
    assert read_weights(tmp_path / "two" / "model.safetensors").metadata.task == "detect"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, garment_folder, tmp_path):
    """Two epochs: the first by two processes, the second by one, and the other way round, as by one."""
    more = ("--set", "schedule.epochs=2")
    whole = tmp_path / "whole"
    assert nextvit_here("train", garment_folder, "--output", whole, *FLAGS, *more).returncode == 0
    for first in (1, 2):
        folder = tmp_path / f"first-{first}"
        command = ("train", garment_folder, "--output", folder, *FLAGS)
        run(torchrun(first, *command)) if first > 1 else nextvit_here(*command)
        command = ("train", garment_folder, "--resume", folder, "--threads", 1, *more)
        done = run(torchrun(3 - first, *command)) if first == 1 else nextvit_here(*command)
        assert "resuming" in done.stderr
        with open(folder / "metrics.csv") as found, open(whole / "metrics.csv") as expected:
            for a, b in zip(csv.DictReader(found), csv.DictReader(expected), strict=True):
                assert {k: float(v) for k, v in a.items()} == pytest.approx(
                    {k: float(v) for k, v in b.items()}, rel=1e-2, abs=1e-6
                )


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="makes network namespaces, which needs root")
def test_separate_hosts_compute_what_one_does(alone, garment_folder, tmp_path):
    """Two hosts, each a network namespace of its own, joined by one cable."""
    names = [f"nextvit{os.getpid()}{side}" for side in "ab"]
    cables = [f"nv{os.getpid() % 10**6}{side}" for side in "ab"]
    made = []
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("no network namespaces here")
            made.append(name)
        subprocess.run(["ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1]], check=True)
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            for command in (
                f"ip link set {cable} netns {name}",
                f"ip -n {name} addr add 10.77.0.{number}/24 dev {cable}",
                f"ip -n {name} link set {cable} up",
                f"ip -n {name} link set lo up",
            ):
                subprocess.run(command.split(), check=True)
        hosts = []
        for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
            how = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", "10.77.0.1", "--master-port", "29511")
            command = torchrun(
                1, "train", garment_folder, "--output", tmp_path / "run", *FLAGS,
                prefix=("ip", "netns", "exec", name), how=how,
            )  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable}
            hosts.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        for host in hosts:
            _, errors = host.communicate(timeout=280)
            assert host.returncode == 0, errors[-3000:]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    assert_the_same_to_rounding(tmp_path / "run", alone)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shares_of_a_batch_are_all_of_it_and_partners_stay_together(count):
    batch = np.arange(100, 116)
    shares = [Processes(rank, count).share(batch) for rank in range(count)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    for share in shares:
        partners = share[::-1]
        assert all(a - 100 + b - 100 == 15 for a, b in zip(share, partners, strict=True))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_synchronised_batchnorm_of_one_process_is_torch_s(kind, tmp_path):
    """Output, gradients and running statistics, in a group of one."""
    torch.manual_seed(0)
    reference = kind(6)
    with torch.no_grad():
        reference.weight.uniform_(0.5, 2)
        reference.bias.uniform_(-1, 1)
    own = kind(6)
    own.load_state_dict(reference.state_dict())
    own.__class__ = SyncedBatchNorm
    x = torch.randn(4, 6, *((5,) if kind is nn.BatchNorm1d else (5, 3)))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        results = []
        for layer in (reference, own):
            given = x.clone().requires_grad_()
            out = layer(given)
            (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
            results.append((out, given.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert int(own.num_batches_tracked) == 1
        torch.testing.assert_close(own.eval()(x), reference.eval()(x))
    finally:
        torch.distributed.destroy_process_group()
