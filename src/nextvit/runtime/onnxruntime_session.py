"""An ONNX file on ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nextvit.devices import cpu_count
from nextvit.errors import UserError
from nextvit.extras import installed, need
from nextvit.files import check_seal
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup, as_named, no_metadata, own_precision

METADATA_KEY = "nextvit"
PROVIDERS = {  # by --device; all but the CPU come with other builds of ONNX Runtime
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


def providers_here() -> list[str]:
    """Of PROVIDERS those that this build of ONNX Runtime has."""
    there = need("onnxruntime", extra="onnx").get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in there]


def starts(place: str) -> bool:
    """Whether a provider really starts here: a build lists those whose libraries or device may be missing."""
    if place not in providers_here() or not installed("onnx"):
        return False
    ort, onnx = need("onnxruntime", extra="onnx"), need("onnx", extra="onnx")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS[place]])
    except Exception:  # the runtime's own exception types are not public
        return False
    return PROVIDERS[place] in session.get_providers()


class OnnxRuntimeSession:
    """Runs in the precision that the file was made in, on the provider of `device`; auto is the CPU."""

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None):
        ort = need("onnxruntime", extra="onnx")
        onnx = need("onnx", extra="onnx")
        place = "cpu" if device == "auto" else device
        there = providers_here()
        if place not in there:
            raise UserError(f"ONNX files run on {' or '.join(there)} here, not on {device!r}; leave --device out.")
        sealed = check_seal(path)
        content = path.read_bytes()
        try:
            model = onnx.load_model_from_string(content)
            notes = {entry.key: entry.value for entry in model.metadata_props}
            outside = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
        except Exception as error:  # protobuf and onnx raise many kinds on a damaged file
            raise UserError(f"{path} is no ONNX file, or is damaged; export it again.") from error
        if METADATA_KEY not in notes or not sealed:
            raise no_metadata(path)
        if outside:
            raise UserError(f"{path} keeps tensors in other files, which nextvit never writes; export it again.")
        self.metadata = Metadata.from_json(notes[METADATA_KEY], str(path))
        own = own_precision(self.metadata, precision, "ONNX Runtime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cpu_count()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # no thread spins on after a call is done
        try:
            self._session = ort.InferenceSession(content, options, providers=[PROVIDERS[place]])
        except Exception as error:  # the runtime's own exception types are not public
            raise UserError(f"{path} cannot be opened by ONNX Runtime {ort.__version__}; export it again.") from error
        if PROVIDERS[place] not in self._session.get_providers():  # it falls back to the CPU without a word
            raise UserError(
                f"ONNX Runtime cannot start {PROVIDERS[place]} here; its log says why, or take --device cpu."
            )
        self._input = self._session.get_inputs()[0].name
        batch = self._session.get_inputs()[0].shape[0]
        self.fixed_batch = batch if isinstance(batch, int) else None
        self.setup = Setup(f"onnxruntime {ort.__version__}", place, own, options.intra_op_num_threads)

    def __call__(self, batch: np.ndarray) -> Any:
        return as_named(self._session.run(list(self.metadata.outputs), {self._input: batch}), self.metadata)

    def resident(self, batch: np.ndarray) -> Callable[[], Any]:
        place = "cpu" if self.setup.device == "cpu" else "cuda"
        values = need("onnxruntime", extra="onnx").OrtValue
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, values.ortvalue_from_numpy(batch, place, 0))
        for name in self.metadata.outputs:
            binding.bind_output(name, place)

        def call() -> Any:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding.get_outputs()

        return call
