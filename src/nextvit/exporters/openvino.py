"""OpenVINO IR: an .xml with its metadata, and the weights in a .bin beside it."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nextvit.exporters.graph import onnx_graph
from nextvit.exporters.job import Job, Written
from nextvit.exporters.quantization import Int8, Plan, nncf_plans, quantize
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.openvino_session import METADATA_KEY, insist_on


def write(job: Job) -> Written:
    """Write an .xml and its .bin.

    fp16 halves the weights; in what a CPU computes then is the session's choice. bf16 has fp32 weights and is computed
    in bf16.
    """
    ov = need("openvino", extra="openvino")
    onnx = need("onnx", extra="openvino")
    if job.metadata.precision == "bf16":
        insist_on("bf16")  # else it could not be checked
    graph = onnx_graph(job)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        onnx.save(graph, source)
        ir = ov.Core().read_model(source)
        if job.calibration is not None:
            _make_group_weights_constant(ir, ov)
            ir = quantize(ir, job.calibration, _forward, job.plan)
        ir.set_rt_info(job.metadata.to_json(), [METADATA_KEY, "metadata"])
        ir.set_rt_info(OPEN_SEAL, [METADATA_KEY, "sha256"])
        ov.save_model(ir, job.path, compress_to_fp16=job.metadata.precision == "fp16")
    close_seal(job.path)
    return Written(job.path)


def _make_group_weights_constant(ir: Any, ov: Any) -> None:
    """Group convolutions read from ONNX have Reshape(Constant) for weights, which NNCF takes for an activation.

    They would be quantised as one, and run in float.
    """
    for node in ir.get_ops():
        if node.get_type_name() == "GroupConvolution":
            reshape = node.input_value(1).get_node()
            weights = reshape.input_value(0).get_node().get_data().reshape(reshape.get_output_shape(0))
            node.input(1).replace_source_output(ov.opset13.constant(weights).output(0))
    ir.validate_nodes_and_infer_types()


def _forward(compiled: Any, batch: np.ndarray) -> np.ndarray:
    logits: np.ndarray = compiled(batch)[0][0]
    return logits


def float_layers(path: Path, plan: Plan) -> list[str]:
    """Layers of an int8 file that the runtime computes in float, by its own report."""
    kinds = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
    return [name for name, kind, kernel in layers_run(path) if kind in kinds and "i8" not in kernel.lower()]


def layers_run(path: Path) -> list[tuple[str, str, str]]:
    """(layer, kind, kernel) of every node that OpenVINO's CPU plugin runs at the file's own size."""
    ov = need("openvino", extra="openvino")
    core = ov.Core()
    model = core.read_model(path)
    if model.is_dynamic():
        side = Metadata.from_json(model.get_rt_info([METADATA_KEY, "metadata"]).value, str(path)).preprocess.image_size
        model.reshape([1, model.input(0).get_partial_shape()[1].get_length(), side, side])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    notes = [(node.get_friendly_name(), node.get_rt_info()) for node in compiled.get_runtime_model().get_ops()]
    return [(name, info["layerType"].astype(str), info["primitiveType"].astype(str)) for name, info in notes]


INT8 = Int8(("nncf", "int8"), nncf_plans, float_layers)
