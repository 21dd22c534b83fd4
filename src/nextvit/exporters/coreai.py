"""Core AI, Apple's newer format: an `.aimodel` from `image` (normalised floats) to `logits`. fp32, fp16."""

import torch

from nextvit.exporters.form import InDtype
from nextvit.exporters.job import Job, Written
from nextvit.exporters.program import converting, quiet, torch_program
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal


def write(job: Job) -> Written:
    """Write an asset for macOS 27, iOS 27 or later, a folder."""
    with quiet():
        coreai = need("coreai_torch", extra="coreai")
        runtime = need("coreai.runtime", extra="coreai")
    network = InDtype(job.network, torch.float16) if job.metadata.precision == "fp16" else job.network
    notes = runtime.AIModelAssetMetadata()
    notes.set_custom("nextvit", job.metadata.to_json())
    notes.set_custom("sha256", OPEN_SEAL)
    with converting("coreai"):
        program = torch_program(job, network).run_decompositions(coreai.get_decomp_table())
        converter = coreai.TorchConverter()
        converter.add_exported_program(program, input_names=["image"], output_names=list(job.metadata.outputs))
        converter.to_coreai().save_asset(job.path, notes)
    close_seal(job.path)
    return Written(None, "needs macOS 27, and nextvit does not open Core AI files yet")
