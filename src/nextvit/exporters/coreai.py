"""Core AI, Apple's newer format: an `.aimodel` from `image` (normalised floats) to `logits`. fp32, fp16."""

from pathlib import Path

import torch
from torch import nn

from nextvit.exporters.calibration import Calibration
from nextvit.exporters.form import InDtype
from nextvit.exporters.program import quiet, refuse, torch_program
from nextvit.exporters.quantization import FASTEST, Plan
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.formats import Free
from nextvit.metadata import Metadata


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Write an asset for macOS 27, iOS 27 or later to the folder `path`."""
    with quiet():
        coreai = need("coreai_torch", extra="coreai")
        runtime = need("coreai.runtime", extra="coreai")
    side = metadata.preprocess.image_size
    network = InDtype(form, torch.float16) if metadata.precision == "fp16" else form
    program = torch_program(network, (1, metadata.in_channels, side, side), free)
    try:
        with quiet():
            converter = coreai.TorchConverter()
            converter.add_exported_program(
                program.run_decompositions(coreai.get_decomp_table()), input_names=["image"], output_names=["logits"]
            )
            asset = converter.to_coreai()
    except (ValueError, NotImplementedError, RuntimeError, IndexError) as error:
        raise refuse("coreai", error) from error
    notes = runtime.AIModelAssetMetadata()
    notes.set_custom("nextvit", metadata.to_json())
    notes.set_custom("sha256", OPEN_SEAL)
    asset.save_asset(path, notes)
    close_seal(path)
    return None


def not_run() -> str | None:
    """Why the file cannot be run here."""
    return "needs macOS 27, and nextvit does not open Core AI files yet"
