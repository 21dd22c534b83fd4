"""A CoreML package on macOS."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextvit.data.images import pixels
from nextvit.errors import UserError
from nextvit.extras import need, version
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup, as_named, insist_on_seal, joined, own_precision

METADATA_KEY = "nextvit"
UNITS = {"auto": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}


def not_here() -> str | None:
    """Why CoreML files cannot be run on this machine."""
    return None if sys.platform == "darwin" else "needs macOS"


class CoreMLSession:
    """Runs on the compute units that `device` names: auto (all), cpu, gpu or ane (the Neural Engine)."""

    fixed_batch: int | None = 1

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None):
        if not_here() is not None:
            raise UserError(f"{path} needs macOS to run; here it can only be written.")
        ct = need("coremltools", extra="coreml")
        if device not in UNITS:
            raise UserError(f"CoreML has no device {device!r}; take one of {', '.join(UNITS)}.")
        insist_on_seal(path)
        try:
            self._model = ct.models.MLModel(str(path), compute_units=getattr(ct.ComputeUnit, UNITS[device]))
            notes = self._model.user_defined_metadata[METADATA_KEY]
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path} cannot be opened by CoreML; export it again.") from error
        self.metadata = Metadata.from_json(notes, str(path))
        own = own_precision(self.metadata, precision, "CoreML")
        self.setup = Setup(f"coreml, coremltools {version('coremltools')}", UNITS[device].lower(), own, threads or 0)

    def __call__(self, batch: np.ndarray) -> Any:
        answers = []
        for image in batch:
            given = image[None]
            if self.metadata.in_channels == 3:
                given = Image.fromarray(pixels(image, self.metadata.preprocess))
            found = self._model.predict({"image": given})
            dtype = np.int32 if self.metadata.gives_classes else np.float32
            answers.append(as_named([found[name].astype(dtype) for name in self.metadata.outputs], self.metadata))
        return joined(answers)
