"""A torch.export program, or an AOTInductor package, on torch: files that are programs (see `trust`)."""

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextvit.data.images import ImageRejected
from nextvit.devices import set_threads
from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup, as_named, insist_on_cpu, insist_on_seal, own_precision
from nextvit.trust import read_trusted

METADATA_ENTRY = "extra/nextvit.json"


class TorchProgramSession:
    """Runs on torch's CPU operators. `trust`: open it whoever wrote it."""

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None, trust: bool = False):
        insist_on_cpu(device, "torch programs")
        insist_on_seal(path)
        data = read_trusted(path, trust)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                root = archive.namelist()[0].partition("/")[0]
                notes = archive.read(f"{root}/{METADATA_ENTRY}").decode()
        except (zipfile.BadZipFile, KeyError, IndexError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no program of nextvit, or is damaged; export it again.") from error
        compiled = path.name.endswith(".aoti.pt2")
        self.metadata = Metadata.from_json(notes, str(path))
        own = own_precision(self.metadata, precision, "torch")
        kind = "AOTInductor" if compiled else "program"
        self.setup = Setup(f"torch {torch.__version__.partition('+')[0]}, {kind}", "cpu", own, set_threads(threads))
        if self.metadata.task == "detect":
            need("torchvision", extra="detect")  # whose operators are in it
        try:
            self._run, self.fixed_batch = _open_package(data) if compiled else _open_program(data)
        except Exception as error:  # what torch raises on a program that it cannot read has no common kind
            raise UserError(
                f"{path} cannot be opened by torch {torch.__version__}; export it again, on this kind of machine."
            ) from error

    def __call__(self, batch: np.ndarray) -> Any:
        set_threads(self.setup.threads)  # they are the process's, and another session may have other ones
        with torch.inference_mode():
            try:
                found = self._run(torch.from_numpy(batch))
                arrays = [part.numpy() for part in (found if isinstance(found, list | tuple) else [found])]
                return as_named(arrays, self.metadata)
            except (AssertionError, RuntimeError) as error:
                shape = "x".join(map(str, batch.shape))
                kind = ImageRejected if self.metadata.takes_pixels else UserError  # one image, and others may do
                raise kind(f"this file does not take an input of {shape}: {str(error).splitlines()[0]}") from error


def _open_program(data: bytes) -> tuple[Any, int | None]:
    opened = torch.export.load(io.BytesIO(data))
    (name,) = opened.graph_signature.user_inputs
    (example,) = (node.meta["val"] for node in opened.graph.nodes if node.name == name)
    fixed = example.shape[0]
    return opened.module(), fixed if isinstance(fixed, int) else None


def _open_package(data: bytes) -> tuple[Any, int | None]:
    with tempfile.TemporaryDirectory() as folder:  # torch wants a path, and the bytes are those that were looked at
        path = Path(folder, "package.pt2")
        path.write_bytes(data)
        return torch._inductor.aoti_load_package(str(path)), None
