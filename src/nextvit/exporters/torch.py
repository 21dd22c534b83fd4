"""A torch.export program (`.pt2`): the network as a graph of torch's own operators, without our code."""

import zipfile
from pathlib import Path

import torch
from torch import nn

from nextvit.devices import DTYPES, pick_precision
from nextvit.exporters.calibration import Calibration
from nextvit.exporters.form import InDtype
from nextvit.exporters.program import quiet, torch_program
from nextvit.exporters.quantization import FASTEST, Plan
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.formats import Free
from nextvit.metadata import Metadata
from nextvit.runtime.torch_program_session import METADATA_ENTRY
from nextvit.trust import remember


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Write the program of an export form, in the precision that `metadata` names, to `path`."""
    with quiet():
        torch.export.save(program(form, metadata, free), path)
    add_metadata(path, metadata)
    return path


def program(form: nn.Module, metadata: Metadata, free: Free) -> torch.export.ExportedProgram:
    """The program in the precision that `metadata` names; refused where this CPU only emulates it."""
    pick_precision(metadata.precision, torch.device("cpu"))
    side = metadata.preprocess.image_size
    network = form if metadata.precision == "fp32" else InDtype(form, DTYPES[metadata.precision])
    return torch_program(network, (1, metadata.in_channels, side, side), free)


def add_metadata(path: Path, metadata: Metadata) -> None:
    """Put the metadata into the archive, and the seal over all of it into the archive's comment."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{METADATA_ENTRY}", metadata.to_json())
        archive.comment = OPEN_SEAL.encode()
    close_seal(path)
    remember(path)


def not_run() -> str | None:
    """Why the file cannot be run here."""
    return None
