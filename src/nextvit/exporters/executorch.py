"""ExecuTorch: a `.pte` for phones and boards, its layers handed to XNNPACK. fp32; int8 by PT2E."""

from typing import Any

from torch import fx

from nextvit.exporters.job import Job, Written
from nextvit.exporters.program import converting, quantized, torch_program
from nextvit.exporters.quantization import Int8, Plan, part_plans, parts_in_float
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.runtime.executorch_session import LARGEST_BATCH, METADATA_METHOD, SEAL_METHOD

LARGEST_IMAGE = 2048  # pixels a side, of a file that prepares images itself


def write(job: Job) -> Written:
    """Write a `.pte`. Memory for free sides is planned now: for twice the model's own size, for the longest side that
    images are resized to, or for LARGEST_IMAGE.
    """
    exir = need("executorch.exir", extra="executorch")
    partitioner = need("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch")
    p = job.metadata.preprocess
    side = max(2 * p.image_size, p.long_side or 0, LARGEST_IMAGE * job.metadata.takes_pixels)
    largest = {"batch": LARGEST_BATCH, "side": side}
    network = job.network if job.calibration is None else quantized(job, largest, _quantizer(job.plan))
    with converting("executorch"):
        lowered = exir.to_edge_transform_and_lower(
            torch_program(job, network, largest),
            partitioner=[partitioner.XnnpackPartitioner()],
            constant_methods={METADATA_METHOD: job.metadata.to_json(), SEAL_METHOD: OPEN_SEAL},
        ).to_executorch()
    job.path.write_bytes(lowered.buffer)
    close_seal(job.path)
    return Written(job.path)


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


INT8 = Int8(("torchao", "executorch"), part_plans, parts_in_float)
