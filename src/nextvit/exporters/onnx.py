"""ONNX: one file, its metadata inside. fp32; fp16 weights and arithmetic; int8 by pairs of Quantize and Dequantize."""

import tempfile
from pathlib import Path
from typing import Any

from nextvit.exporters.graph import PREFIX, onnx_graph, with_preprocessing
from nextvit.exporters.job import Job, Written
from nextvit.exporters.quantization import Int8, Plan, onnx_plans, quantize
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.onnxruntime_session import METADATA_KEY


def write(job: Job) -> Written:
    """Write an ONNX file."""
    graph = onnx_graph(job, half=job.metadata.precision == "fp16")
    if job.calibration is not None:
        graph = quantize(graph, job.calibration, job.plan)
    if job.metadata.takes_pixels:
        graph = with_preprocessing(graph, job)
    save(graph, job.path, job.metadata)
    return Written(job.path)


def save(graph: Any, path: Path, metadata: Metadata) -> None:
    """Write an onnx.ModelProto with its metadata, sealed."""
    onnx = need("onnx", extra="onnx")
    onnx.helper.set_model_props(graph, {METADATA_KEY: metadata.to_json(), "sha256": OPEN_SEAL})
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
    close_seal(path)


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
    kinds = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")
    return [node.name for node in nodes if node.op_type in kinds and not node.name.startswith(PREFIX)]


INT8 = Int8(("nncf", "int8"), onnx_plans, float_layers)
