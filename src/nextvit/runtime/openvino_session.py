"""An OpenVINO file on the OpenVINO runtime."""

import os
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nextvit.devices import cpu_count
from nextvit.errors import NotHere, UserError
from nextvit.extras import need
from nextvit.files import check_seal
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup, as_named, insist_on_cpu, joined, no_metadata

METADATA_KEY = "nextvit"
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
KEPT = 4  # compiled sizes
HEADS_FORWARD = [0, 2, 1, 3]  # of a Transpose: (B, tokens, heads, channels) -> (B, heads, tokens, channels)


def confused(model: Any) -> bool:
    """Whether it has attention of as many tokens as heads: fused, it answers as if the two axes were the other one
    (OpenVINO 2026.4: 2e-4 to 5e-3 of the logits, with random weights).
    """
    for node in model.get_ops():
        if node.get_type_name() == "Transpose" and node.input_value(1).get_node().get_type_name() == "Constant":
            shape = node.get_input_partial_shape(0)
            order = node.input_value(1).get_node().get_data().tolist()
            if order == HEADS_FORWARD and shape.rank.is_static and shape[1].is_static and shape[1] == shape[2]:
                return True
    return False


@cache
def core() -> Any:
    """The one core of the process, which is never given up.

    Each has a signal stack that it puts in the place of the one before; of three cores that go in the order in which
    they came, the last restores one that is gone (OpenVINO 2026.4), and the next signal kills the process.
    """
    return need("openvino", extra="openvino").Core()


def computed_in() -> list[str]:
    """Precisions that this CPU has, by OpenVINO's word."""
    there = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [precision for precision, name in CAPABILITIES.items() if name in there]


def insist_on(precision: str) -> None:
    """Raise UserError where this CPU does not compute in it: OpenVINO would, several times slower."""
    able = computed_in()
    if precision not in able:
        raise NotHere(f"this CPU does not compute in {precision} under OpenVINO; take one of {', '.join(able)}.")


class OpenVINOSession:
    """Runs on the CPU plugin. The precision is always set: left alone, the plugin takes its own (bf16 where it can).

    Each size of input is compiled for itself, because free sizes cost time at every call, and the last few are kept.
    What an int8 file leaves in float is computed in fp32; fp16 weights too, where the CPU does not compute in fp16.

    hint: "latency", where all threads compute one batch; "throughput", where its parts are computed side by side, in as
    many streams as OpenVINO finds best. NEXTVIT_OPENVINO_CACHE names a folder that keeps compiled models.
    """

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None, hint: str = "latency"):
        ov = need("openvino", extra="openvino")
        insist_on_cpu(device, "OpenVINO files")
        sealed = check_seal(path)
        if kept := os.environ.get("NEXTVIT_OPENVINO_CACHE"):
            try:
                Path(kept).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"NEXTVIT_OPENVINO_CACHE is {kept}: {error.strerror}; name a folder.") from error
        try:
            self._model = core().read_model(path)
            known = self._model.has_rt_info([METADATA_KEY])
            notes = self._model.get_rt_info([METADATA_KEY, "metadata"]).value if known else None
        except RuntimeError as error:
            raise UserError(f"{path} is no OpenVINO file, or is damaged; export it again.") from error
        if notes is None or not sealed:
            raise no_metadata(path)
        self.metadata = Metadata.from_json(notes, str(path))
        if hint != "latency" and self.metadata.takes_pixels:
            raise NotHere("a file that prepares images takes them one at a time; leave --hint out.")
        float_part, shown = self._precisions(precision)
        self._config = {
            "INFERENCE_PRECISION_HINT": HINTS[float_part],
            "INFERENCE_NUM_THREADS": threads or cpu_count(),
            "PERFORMANCE_HINT": hint.upper(),
            "CACHE_DIR": kept or "",
        }
        self._free = self._model.is_dynamic()  # asked once: it looks at every node
        shape = self._model.input(0).get_partial_shape()
        self._part = shape[0].get_length() if shape[0].is_static else None
        self._kept: OrderedDict[tuple[int, ...], list[Any]] = OrderedDict()
        side = self.metadata.preprocess.image_size
        self._streams = 0  # as many as the first size is given
        requests = self._requests(self.metadata.input_shape(self._part or 1, side, side))
        self._streams, first = len(requests), requests[0].get_compiled_model()
        self.fixed_batch = self._part if hint == "latency" else None  # else it is cut into parts here
        in_force = first.get_property("INFERENCE_PRECISION_HINT").to_string()
        if in_force != HINTS[float_part]:
            raise UserError(
                f"OpenVINO computes in {in_force} here although {float_part} was asked for; take another --precision."
            )
        self.setup = Setup(
            f"openvino {ov.__version__.partition('-')[0]}{f', streams: {self._streams}' * (hint != 'latency')}",
            "cpu",
            shown,
            int(first.get_property("INFERENCE_NUM_THREADS")),
        )

    def _precisions(self, asked: str | None) -> tuple[str, str]:
        """The precision of the float layers, and how the whole is shown."""
        own = self.metadata.precision
        if own == "int8":
            if asked not in (None, "int8"):
                raise NotHere(f"this file is int8 and does not compute in {asked}; leave --precision out.")
            return "fp32", "int8"
        if asked is None and own == "fp16" and own not in computed_in():
            return "fp32", "fp32"
        chosen = asked or own
        insist_on(chosen)
        return chosen, chosen

    def _requests(self, shape: tuple[int, ...]) -> list[Any]:
        """For an input of this shape: one a stream."""
        if self.metadata.takes_pixels:
            shape = (shape[0], -1, -1, 3)  # preparing is quick; the network behind it has one size
        elif not self._free:
            shape = ()
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape]
        model = self._model
        if self._free:
            model = model.clone()
            model.reshape(list(shape))
        unfused = {"SNIPPETS_MODE": "DISABLE"} if confused(model) else {}
        compiled = core().compile_model(model, "CPU", self._config | unfused)
        streams = 1 if self._config["PERFORMANCE_HINT"] == "LATENCY" else compiled.get_property("NUM_STREAMS")
        self._kept[shape] = [compiled.create_infer_request() for _ in range(self._streams or max(1, streams))]
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[shape]

    def __call__(self, batch: np.ndarray) -> Any:
        if self._config["PERFORMANCE_HINT"] == "LATENCY":
            request = self._requests(batch.shape)[0]
            request.infer([batch])
            return self._outputs(request)
        size = self._part or -(-len(batch) // self._streams)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        outputs = []
        for start in range(0, len(parts), self._streams):
            running = []
            for number, part in enumerate(parts[start : start + self._streams]):
                running.append(self._requests(part.shape)[number])
                running[-1].start_async([part])
            for request in running:
                request.wait()
                outputs.append(self._outputs(request))
        return joined(outputs)

    def _outputs(self, request: Any) -> Any:
        count = len(self.metadata.outputs)
        return as_named([request.get_output_tensor(place).data.copy() for place in range(count)], self.metadata)
