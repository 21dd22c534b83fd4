"""OpenVINO IR: an .xml with its metadata, and the weights in a .bin beside it."""

from pathlib import Path
from typing import Any

from nextvit.exporters.graph import PREFIX, onnx_graph, preprocessing_graph
from nextvit.exporters.job import Job, Written
from nextvit.exporters.quantization import Int8, Plan, nncf_plans, quantize
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.openvino_session import METADATA_KEY, core, insist_on


def write(job: Job) -> Written:
    """Write an .xml and its .bin.

    fp16 halves the weights; in what a CPU computes then is the session's choice. bf16 has fp32 weights and is computed
    in bf16.
    """
    ov = need("openvino", extra="openvino")
    if job.metadata.precision == "bf16":
        insist_on("bf16")  # else it could not be checked
    ir = core().read_model(onnx_graph(job).SerializeToString())
    if job.calibration is not None:
        _make_group_weights_constant(ir, ov)
        ir = quantize(ir, job.calibration, job.plan)
    if job.metadata.takes_pixels:
        ir = _behind(core().read_model(preprocessing_graph(job).SerializeToString()), ir, ov)
    ir.set_rt_info(job.metadata.to_json(), [METADATA_KEY, "metadata"])
    ir.set_rt_info(OPEN_SEAL, [METADATA_KEY, "sha256"])
    ov.save_model(ir, job.path, compress_to_fp16=job.metadata.precision == "fp16")
    close_seal(job.path)
    return Written(job.path)


def _behind(first: Any, second: Any, ov: Any) -> Any:
    """One model of two: what the first gives, the second takes."""
    given = first.output(0).get_node().input_value(0)
    for target in second.input(0).get_node().output(0).get_target_inputs():
        target.replace_source_output(given)
    return ov.Model(second.get_results(), first.get_parameters(), "nextvit")


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


def float_layers(path: Path, plan: Plan) -> list[str]:
    """Layers of an int8 file that the runtime computes in float, by its own report."""
    kinds = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
    return [
        name
        for name, kind, kernel in layers_run(path)
        if kind in kinds and "i8" not in kernel.lower() and not name.startswith(PREFIX)
    ]


def layers_run(path: Path) -> list[tuple[str, str, str]]:
    """(layer, kind, kernel) of every node that OpenVINO's CPU plugin runs at the file's own size."""
    model = core().read_model(path)
    if model.is_dynamic():
        metadata = Metadata.from_json(model.get_rt_info([METADATA_KEY, "metadata"]).value, str(path))
        side = metadata.preprocess.image_size
        model.reshape(list(metadata.input_shape(1, side, side)))
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    notes = [(node.get_friendly_name(), node.get_rt_info()) for node in compiled.get_runtime_model().get_ops()]
    return [(name, info["layerType"].astype(str), info["primitiveType"].astype(str)) for name, info in notes]


INT8 = Int8(("nncf", "int8"), nncf_plans, float_layers)
