"""ONNX: one file, its metadata inside. fp32; fp16 weights and arithmetic; int8 by pairs of Quantize and Dequantize."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nextvit.exporters.calibration import Calibration
from nextvit.exporters.graph import onnx_graph
from nextvit.exporters.quantization import FASTEST, Plan, nncf_plans, quantize
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.formats import Free
from nextvit.metadata import Metadata
from nextvit.runtime.onnxruntime_session import METADATA_KEY

int8_plans = nncf_plans


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Write the export form of a model to `path` in the precision that `metadata` names."""
    graph = onnx_graph(
        form,
        metadata,
        free=free,
        half=metadata.precision == "fp16",
        extra="onnx",
    )
    if calibration is not None:
        graph = quantize(graph, calibration, _forward, plan)
    save(graph, path, metadata)
    return path


def save(graph: Any, path: Path, metadata: Metadata) -> None:
    """Write an onnx.ModelProto with its metadata, sealed."""
    onnx = need("onnx", extra="onnx")
    onnx.helper.set_model_props(graph, {METADATA_KEY: metadata.to_json(), "sha256": OPEN_SEAL})
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
    close_seal(path)


def _forward(session: Any, batch: np.ndarray) -> np.ndarray:
    logits: np.ndarray = session.run(None, {"image": batch})[0][0]
    return logits


def float_layers(path: Path, plan: Plan) -> list[str]:
    """Layers of an int8 file that ONNX Runtime computes in float, by the graph that it makes of it."""
    onnx = need("onnx", extra="onnx")
    ort = need("onnxruntime", extra="onnx")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return [node.name for node in nodes if node.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")]


def not_run() -> str | None:
    """Why the file cannot be run here."""
    return None
