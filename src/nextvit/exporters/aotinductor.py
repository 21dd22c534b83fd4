"""An AOTInductor package (`.aoti.pt2`): the network compiled to a library of machine code for this kind of CPU."""

import shutil

import torch

from nextvit.errors import UserError
from nextvit.exporters.job import Job, Written
from nextvit.exporters.program import converting
from nextvit.exporters.torch import add_metadata, program


def write(job: Job) -> Written:
    """Compile the model to a package. Takes minutes, and a C++ compiler."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise UserError("AOTInductor compiles C++, and there is no compiler here; install g++ or clang++.")
    with converting("aotinductor"):
        torch._inductor.aoti_compile_and_package(program(job), package_path=str(job.path))
    add_metadata(job.path, job.metadata)
    return Written(job.path)
