"""An AOTInductor package (`.aoti.pt2`): the network compiled to a library of machine code for this kind of CPU."""

import torch

from nextvit.devices import insist_on_compiler
from nextvit.exporters.job import Job, Written
from nextvit.exporters.program import converting
from nextvit.exporters.torch import add_metadata, program


def write(job: Job) -> Written:
    """Compile the model to a package. Takes minutes, and a C++ compiler."""
    insist_on_compiler()
    with converting("aotinductor"):
        torch._inductor.aoti_compile_and_package(program(job), package_path=str(job.path))
    add_metadata(job.path, job.metadata)
    return Written(job.path)
