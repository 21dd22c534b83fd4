"""Variants on a CPU beside the best that timm offers, and beside a ResNet: one interleaved run a table.

    python benchmarks/cpu.py --model nextvit_small --output performance

Latency of one image: timm eager; timm's own way (reparameterize_model, ONNX, OpenVINO, NNCF as it comes); our files; a
ResNet on the same runtime. Then our files alone: batches, OpenVINO's hints, size, load time and memory. Weights are
random with calibrated BatchNorm, which changes no latency. All is compared to the first row. Without --model: every
variant. With `--image-size 512 --batch-size 1` they are backbones as the paper measures them for segmentation and
detection; the classifier that ends them takes no time there.
"""

import argparse
import copy
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import nextvit
from nextvit.benchmark import Row, benchmark
from nextvit.data.images import preprocess
from nextvit.devices import cpu_count
from nextvit.exporters.parity import real_images
from nextvit.metadata import Metadata, Preprocess
from nextvit.report import latency_lines, write_latency
from nextvit.runtime.open import open_session
from nextvit.runtime.openvino_session import core
from nextvit.runtime.session import Session, Setup

PEERS = {"nextvit_nano": "resnet18", "nextvit_tiny": "resnet18", "nextvit_large": "resnet152"}  # others: resnet101
CORE = core()
BF16 = "BF16" in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = ("fp32", "bf16", "int8") if BF16 else ("fp32", "int8")


class Call:
    """A session whose call is any function of a batch."""

    fixed_batch = None

    def __init__(self, runtime: str, precision: str, threads: int, function: Callable[[np.ndarray], np.ndarray]):
        self.metadata = Metadata("nextvit_small")
        self.setup = Setup(runtime, "cpu", precision, threads)
        self.function = function

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self.function(batch)


def eager(model: nn.Module, threads: int) -> Session:
    forward = torch.inference_mode()(model)
    return Call("torch, eager", "fp32", threads, lambda batch: forward(torch.from_numpy(batch)).numpy())


def on_openvino(model: ov.Model, precision: str, hint: str, threads: int) -> Session:
    config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = CORE.compile_model(model, "CPU", config).create_infer_request()
    return Call("openvino", precision, threads, lambda batch: next(iter(request.infer([batch]).values())))


def through_onnx(model: nn.Module, size: int) -> ov.Model:
    """The usual way: BatchNorm merged by timm, a file of fixed size, read by OpenVINO."""
    merged = reparameterize_model(copy.deepcopy(model).eval())
    program = torch.onnx.export(merged, (torch.zeros(1, 3, size, size),), dynamo=True, verbose=False)
    assert program is not None
    return CORE.read_model(program.model_proto.SerializeToString())


def calibrate(model: nn.Module, images: np.ndarray) -> None:
    """Give BatchNorm the statistics of real images, so that outputs depend on them."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.from_numpy(images))
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=nextvit.list_models(), choices=nextvit.list_models())
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", default="1,8,32", help="of the table of our files")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a folder for CSV files and plots")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    nncf.set_log_level(40)
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    policy, version = os.environ.get("OMP_WAIT_POLICY", "not set"), ov.__version__.partition("-")[0]
    print(f"OMP_WAIT_POLICY {policy}; OpenVINO {version}; torch {torch.__version__}")
    for model in given.model:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = beside_others(model, folder, given.image_size, given.threads, given.rounds)
            print("\n".join(["", *latency_lines(rows), ""]), flush=True)
            files = [f"{precision}.xml" for precision in PRECISIONS]
            flags = ["--hint", "latency,throughput", "--memory", "--output", "files.csv"]
            flags += ["--batch-size", given.batch_size, "--threads", str(given.threads)]
            command = [sys.executable, "-m", "nextvit", "benchmark", *files, *flags]
            subprocess.run([*command, "--rounds", str(max(8, given.rounds // 3))], cwd=folder, check=True)
            if given.output is not None:
                write_latency(rows, given.output / f"{model}.csv")
                for end in ("csv", "png"):
                    shutil.copy(folder / f"files.{end}", given.output / f"{model}-files.{end}")


def beside_others(name: str, folder: Path, size: int, threads: int, rounds: int) -> list[Row]:
    """Latency of our files, which are left in the folder, beside timm's and the peer's."""
    images = np.stack([preprocess(image, Preprocess(image_size=size)) for image in real_images()])
    samples = nncf.Dataset([image[None] for image in images])
    ours = nextvit.create_model(name)
    calibrate(ours, images)
    rows: list[tuple[str, Session]] = []

    def foreign(name: str, model: nn.Module) -> None:
        """A timm model, eager and by the usual way."""
        rows.append((f"timm {name}", eager(model, threads)))
        ir = through_onnx(model, size)
        rows.append((f"timm {name}", on_openvino(ir, "fp32", "f32", threads)))
        if BF16:
            rows.append((f"timm {name}", on_openvino(ir, "bf16", "bf16", threads)))
        quantised = nncf.quantize(ir, samples, subset_size=len(images))
        rows.append((f"timm {name}", on_openvino(quantised, "int8", "f32", threads)))
        if BF16:  # what OpenVINO does where nobody sets the precision
            rows.append((f"timm {name}", on_openvino(quantised, "int8, else bf16", "bf16", threads)))

    if timm.is_model(name):
        theirs = timm.create_model(name)
        theirs.load_state_dict(ours.state_dict())
        foreign(name, theirs.eval())
    else:  # nano and tiny are not in timm
        rows.append((name, eager(ours.eval(), threads)))
    for precision in PRECISIONS:
        path = folder / f"{precision}.xml"
        calibration = [image.rotate(90 * turn) for turn in range(4) for image in real_images()]
        given_images = calibration if precision == "int8" else None
        how = {"image_size": size, "calibration": given_images, "max_drop": None}
        nextvit.export(ours, path, precision=precision, **how)
        rows.append((name, open_session(path, device="cpu", threads=threads)))
    peer = PEERS.get(name, "resnet101")
    resnet = timm.create_model(peer)
    calibrate(resnet, images)
    foreign(peer, resnet)
    return benchmark(rows, image_size=size, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main())
