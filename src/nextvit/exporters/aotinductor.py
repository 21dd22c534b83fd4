"""An AOTInductor package (`.aoti.pt2`): the network compiled to a library of machine code for this kind of CPU."""

import shutil
from pathlib import Path

import torch
from torch import nn

from nextvit.errors import UserError
from nextvit.exporters.calibration import Calibration
from nextvit.exporters.program import quiet, refuse
from nextvit.exporters.quantization import FASTEST, Plan
from nextvit.exporters.torch import add_metadata, not_run, program
from nextvit.formats import Free
from nextvit.metadata import Metadata

__all__ = ["not_run", "write"]


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Compile an export form, in the precision that `metadata` names, to `path`. Takes minutes, and a C++ compiler."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise UserError("AOTInductor compiles C++, and there is no compiler here; install g++ or clang++.")
    with quiet():
        try:
            torch._inductor.aoti_compile_and_package(program(form, metadata, free), package_path=str(path))
        except RuntimeError as error:
            raise refuse("aotinductor", error) from error
    add_metadata(path, metadata)
    return path
