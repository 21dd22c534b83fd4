"""An OpenVINO file on the OpenVINO runtime."""

from pathlib import Path

import numpy as np

from nextvit.devices import cpu_count
from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.files import check_seal
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup

METADATA_KEY = "nextvit"
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class OpenVINOSession:
    """Runs on the CPU plugin. The precision is always set: left alone, the plugin takes its own (bf16 where it can)."""

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None):
        ov = need("openvino", extra="openvino")
        if device not in ("auto", "cpu"):
            raise UserError(f"OpenVINO files run on the CPU here, not on {device!r}; leave --device out.")
        core = ov.Core()
        chosen = precision or "fp32"
        able = [p for p, name in CAPABILITIES.items() if name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
        if chosen not in able:
            raise UserError(f"this CPU does not compute in {chosen} under OpenVINO; take one of {', '.join(able)}.")
        sealed = check_seal(path)
        try:
            model = core.read_model(path)
            notes = model.get_rt_info([METADATA_KEY, "metadata"]).value if model.has_rt_info([METADATA_KEY]) else None
        except RuntimeError as error:
            raise UserError(f"{path} is no OpenVINO file, or is damaged; export it again.") from error
        if notes is None or not sealed:
            raise UserError(
                f"{path} has no nextvit metadata, so its preprocessing is unknown; make it with `nextvit export`."
            )
        self.metadata = Metadata.from_json(notes, str(path))
        config = {
            "INFERENCE_PRECISION_HINT": HINTS[chosen],
            "INFERENCE_NUM_THREADS": threads or cpu_count(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        batch = model.input(0).get_partial_shape()[0]
        self.fixed_batch = batch.get_length() if batch.is_static else None
        self._compiled = core.compile_model(model, "CPU", config)
        self._request = self._compiled.create_infer_request()
        in_force = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if in_force != HINTS[chosen]:
            raise UserError(
                f"OpenVINO computes in {in_force} here although {chosen} was asked for; take another --precision."
            )
        self.setup = Setup(
            f"openvino {ov.__version__.partition('-')[0]}",
            "cpu",
            chosen,
            int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
        )

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return next(iter(self._request.infer([batch]).values()))
