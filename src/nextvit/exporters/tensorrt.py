"""TensorRT: the ONNX made for it, the command that builds the engine, and where TensorRT is, the engine itself.

The network is strongly typed: every layer computes in the type that the ONNX gives it. int8 is symmetric, with explicit
Quantize and Dequantize.
"""

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nextvit.exporters.calibration import Images
from nextvit.exporters.graph import onnx_graph
from nextvit.exporters.job import Job, Written
from nextvit.exporters.onnx import save
from nextvit.exporters.program import converting, quiet
from nextvit.exporters.quantization import Int8, Plan, part_plans, parts_in_float
from nextvit.extras import need

BATCHES = (1, 8, 32)  # least, tuned for, largest
BUILDER = "trtexec"


def write(job: Job) -> Written:
    """Write PATH.onnx and PATH.sh, and run the second where TensorRT's trtexec is, which makes PATH."""
    graph = onnx_graph(job, half=job.metadata.precision == "fp16")
    if job.calibration is not None:
        graph = _quantize(graph, job.calibration.calibrate, job.plan)
    source = job.path.with_name(f"{job.path.name}.onnx")
    save(graph, source, job.metadata)
    command = build_command(job, source.name)
    script = f'#!/bin/sh\ncd "$(dirname "$0")" && {shlex.join(command)}\n'
    job.path.with_name(f"{job.path.name}.sh").write_text(script, encoding="utf-8")
    if shutil.which(BUILDER) is None:
        return Written(source, f"needs TensorRT: there is no {BUILDER} here")
    with converting("tensorrt"):
        done = subprocess.run(command, cwd=job.path.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr or done.stdout)
    return Written(source)


def build_command(job: Job, source: str) -> list[str]:
    """What builds the engine: sides from 32 pixels to twice the model's own size, where they are free."""
    _, channels, side, _ = job.shape
    command = [BUILDER, f"--onnx={source}", f"--saveEngine={job.path.name}", "--stronglyTyped"]
    if job.free.batch or job.free.sides:
        bounds = zip(("min", "opt", "max"), BATCHES, (32, side, 2 * side), strict=True)
        command += [f"--{what}Shapes=image:{batch}x{channels}x{pixels}x{pixels}" for what, batch, pixels in bounds]
    return command


def _quantize(graph: Any, images: Images, plan: Plan) -> Any:
    """ONNX Runtime's quantiser, held to what TensorRT takes: signed, symmetric, a scale a channel for weights."""
    onnx = need("onnx", extra="tensorrt")
    ort = need("onnxruntime.quantization", extra="tensorrt")

    class Reader(ort.CalibrationDataReader):  # type: ignore[name-defined]  # a base known at run time
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image}

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(graph, source)
        with quiet():
            ort.quantize_static(
                source,
                result,
                Reader(),
                quant_format=ort.QuantFormat.QDQ,
                per_channel=True,
                activation_type=ort.QuantType.QInt8,
                weight_type=ort.QuantType.QInt8,
                op_types_to_quantize=["Conv", "Gemm"],
                nodes_to_exclude=[
                    node.name
                    for node in graph.graph.node
                    if node.name.startswith(tuple(f"{p}." for p in plan.float_parts))
                ],
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
            )
        return onnx.load(result)


INT8 = Int8(("onnxruntime.quantization", "tensorrt"), part_plans, parts_in_float)
