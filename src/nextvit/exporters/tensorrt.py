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
from torch import nn

from nextvit.exporters.calibration import Calibration, Images
from nextvit.exporters.graph import onnx_graph
from nextvit.exporters.onnx import save
from nextvit.exporters.program import quiet, refuse
from nextvit.exporters.quantization import FASTEST, Plan, part_plans
from nextvit.extras import need
from nextvit.formats import Free
from nextvit.metadata import Metadata

int8_plans = part_plans
BATCHES = (1, 8, 32)  # least, tuned for, largest
BUILDER = "trtexec"


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Write PATH.onnx and PATH.sh, and run the second where TensorRT's trtexec is, which makes `path`."""
    graph = onnx_graph(
        form,
        metadata,
        free=free,
        half=metadata.precision == "fp16",
        extra="tensorrt",
    )
    if calibration is not None:
        graph = _quantize(graph, calibration.calibrate, plan)
    source, script = onnx_beside(path), path.with_name(f"{path.name}.sh")
    save(graph, source, metadata)
    command = build_command(path.name, source.name, metadata, free)
    script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")" && {shlex.join(command)}\n', encoding="utf-8")
    if not_run() is None:
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
        if done.returncode:
            raise refuse("tensorrt", RuntimeError(done.stderr or done.stdout))
    return source


def build_command(engine: str, source: str, metadata: Metadata, free: Free) -> list[str]:
    """What builds the engine: sides from 32 pixels to twice the model's own size, where they are free."""
    side, channels = metadata.preprocess.image_size, metadata.in_channels
    command = [BUILDER, f"--onnx={source}", f"--saveEngine={engine}", "--stronglyTyped"]
    if free.batch or free.sides:
        bounds = zip(("min", "opt", "max"), BATCHES, (32, side, 2 * side), strict=True)
        command += [f"--{what}Shapes=image:{batch}x{channels}x{pixels}x{pixels}" for what, batch, pixels in bounds]
    return command


def onnx_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.onnx")


def _quantize(graph: Any, images: Images, plan: Plan) -> Any:
    """ONNX Runtime's quantiser, held to what TensorRT takes: signed, symmetric, a scale a channel for weights."""
    onnx = need("onnx", extra="tensorrt")
    ort = need("onnxruntime.quantization", extra="tensorrt")

    class Reader(ort.CalibrationDataReader):  # type: ignore[name-defined]
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


def float_layers(path: Path, plan: Plan) -> list[str]:
    """Parts of an int8 file that are left in float."""
    return list(plan.float_parts)


def not_run() -> str | None:
    """Why the engine is not built here; its ONNX is compared in any case."""
    return None if shutil.which(BUILDER) else f"needs TensorRT: there is no {BUILDER} here"
