"""ExecuTorch: a `.pte` for phones and boards, its layers handed to XNNPACK. fp32; int8 by PT2E."""

from pathlib import Path
from typing import Any

from torch import fx, nn

from nextvit.exporters.calibration import Calibration
from nextvit.exporters.program import quantized_network, quiet, refuse, torch_program
from nextvit.exporters.quantization import FASTEST, Plan, part_plans
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.formats import Free
from nextvit.metadata import Metadata
from nextvit.runtime.executorch_session import LARGEST_BATCH, METADATA_METHOD, SEAL_METHOD

int8_plans = part_plans


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Write the export form of a model to `path`.

    Free sides go up to twice the model's own size: the memory for them is planned now.
    """
    exir = need("executorch.exir", extra="executorch")
    partitioner = need("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch")
    side = metadata.preprocess.image_size
    shape = (1, metadata.in_channels, side, side)
    largest = {"batch": LARGEST_BATCH, "side": 2 * side}
    if calibration is not None:
        form = quantized_network(form, shape, free, largest, _quantizer(plan), calibration)
    try:
        with quiet():
            lowered = exir.to_edge_transform_and_lower(
                torch_program(form, shape, free, largest),
                partitioner=[partitioner.XnnpackPartitioner()],
                constant_methods={METADATA_METHOD: metadata.to_json(), SEAL_METHOD: OPEN_SEAL},
            ).to_executorch()
    except Exception as error:  # its passes raise bare exceptions
        raise refuse("executorch", error) from error
    path.write_bytes(lowered.buffer)
    close_seal(path)
    return path


def _quantizer(plan: Plan) -> Any:
    module = need("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", extra="executorch")
    quantizer = module.XNNPACKQuantizer()
    quantizer.set_global(module.get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: not _within(node, plan.float_parts))
    return quantizer


def _within(node: fx.Node, names: tuple[str, ...]) -> bool:
    """Whether a node comes from one of the modules."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return any(f".{name}." in f".{path.removeprefix('L__self___')}." for path in paths for name in names)


def float_layers(path: Path, plan: Plan) -> list[str]:
    """Parts of an int8 file that are left in float."""
    return list(plan.float_parts)


def not_run() -> str | None:
    """Why the file cannot be run here."""
    return None
