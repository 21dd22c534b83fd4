"""A torch.export program (`.pt2`): the network as a graph of torch's own operators, without our code."""

import zipfile
from pathlib import Path

import torch

from nextvit.devices import DTYPES, pick_precision
from nextvit.exporters.form import InDtype
from nextvit.exporters.job import Job, Written
from nextvit.exporters.program import quiet, torch_program
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.torch_program_session import METADATA_ENTRY


def write(job: Job) -> Written:
    """Write the program."""
    with quiet():
        torch.export.save(program(job), job.path)
    add_metadata(job.path, job.metadata)
    return Written(job.path)


def program(job: Job) -> torch.export.ExportedProgram:
    """The program in the precision that the metadata names; refused where this CPU only emulates it."""
    precision = job.metadata.precision
    pick_precision(precision, torch.device("cpu"))
    return torch_program(job, job.network if precision == "fp32" else InDtype(job.network, DTYPES[precision]))


def add_metadata(path: Path, metadata: Metadata) -> None:
    """Put the metadata into the archive, and the seal over all of it into the archive's comment."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{METADATA_ENTRY}", metadata.to_json())
        archive.comment = OPEN_SEAL.encode()
    close_seal(path)
