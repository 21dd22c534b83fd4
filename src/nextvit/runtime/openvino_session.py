"""An OpenVINO file on the OpenVINO runtime."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from nextvit.devices import cpu_count
from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.files import check_seal
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup, insist_on_cpu, no_metadata

METADATA_KEY = "nextvit"
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
KEPT = 4  # compiled sizes


def computed_in() -> list[str]:
    """Precisions that this CPU has, by OpenVINO's word."""
    ov = need("openvino", extra="openvino")
    there = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [precision for precision, name in CAPABILITIES.items() if name in there]


def insist_on(precision: str) -> None:
    """Raise UserError where this CPU does not compute in it: OpenVINO would, several times slower."""
    able = computed_in()
    if precision not in able:
        raise UserError(f"this CPU does not compute in {precision} under OpenVINO; take one of {', '.join(able)}.")


class OpenVINOSession:
    """Runs on the CPU plugin. The precision is always set: left alone, the plugin takes its own (bf16 where it can).

    Each size of input is compiled for itself, because free sizes cost time at every call, and the last few are kept.
    What an int8 file leaves in float is computed in fp32; fp16 weights too, where the CPU does not compute in fp16.
    """

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None):
        ov = need("openvino", extra="openvino")
        insist_on_cpu(device, "OpenVINO files")
        sealed = check_seal(path)
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(path)
            known = self._model.has_rt_info([METADATA_KEY])
            notes = self._model.get_rt_info([METADATA_KEY, "metadata"]).value if known else None
        except RuntimeError as error:
            raise UserError(f"{path} is no OpenVINO file, or is damaged; export it again.") from error
        if notes is None or not sealed:
            raise no_metadata(path)
        self.metadata = Metadata.from_json(notes, str(path))
        float_part, shown = self._precisions(precision)
        self._config = {
            "INFERENCE_PRECISION_HINT": HINTS[float_part],
            "INFERENCE_NUM_THREADS": threads or cpu_count(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._free = self._model.is_dynamic()  # asked once: it looks at every node
        shape = self._model.input(0).get_partial_shape()
        self.fixed_batch = shape[0].get_length() if shape[0].is_static else None
        self._requests: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        side = self.metadata.preprocess.image_size
        shape = self.metadata.input_shape(self.fixed_batch or 1, side, side)
        first = self._request(shape).get_compiled_model()
        in_force = first.get_property("INFERENCE_PRECISION_HINT").to_string()
        if in_force != HINTS[float_part]:
            raise UserError(
                f"OpenVINO computes in {in_force} here although {float_part} was asked for; take another --precision."
            )
        self.setup = Setup(
            f"openvino {ov.__version__.partition('-')[0]}",
            "cpu",
            shown,
            int(first.get_property("INFERENCE_NUM_THREADS")),
        )

    def _precisions(self, asked: str | None) -> tuple[str, str]:
        """The precision of the float layers, and how the whole is shown."""
        own = self.metadata.precision
        if own == "int8":
            if asked not in (None, "int8"):
                raise UserError(f"this file is int8 and does not compute in {asked}; leave --precision out.")
            return "fp32", "int8"
        if asked is None and own == "fp16" and own not in computed_in():
            return "fp32", "fp32"
        chosen = asked or own
        insist_on(chosen)
        return chosen, chosen

    def _request(self, shape: tuple[int, ...]) -> Any:
        if self.metadata.takes_pixels:
            shape = (shape[0], -1, -1, 3)  # preparing is quick; the network behind it has one size
        elif not self._free:
            shape = ()
        if shape in self._requests:
            self._requests.move_to_end(shape)
            return self._requests[shape]
        model = self._model
        if self._free:
            model = model.clone()
            model.reshape(list(shape))
        request = self._core.compile_model(model, "CPU", self._config).create_infer_request()
        self._requests[shape] = request
        if len(self._requests) > KEPT:
            self._requests.popitem(last=False)
        return request

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        request = self._request(batch.shape)
        return next(iter(request.infer([batch]).values())).copy()
