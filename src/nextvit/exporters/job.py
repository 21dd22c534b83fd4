"""What a writer of a format is given, and what it gives back."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nextvit.exporters.calibration import Calibration
from nextvit.exporters.quantization import FASTEST, Plan
from nextvit.formats import Free
from nextvit.metadata import Metadata


@dataclass(frozen=True)
class Job:
    """Write the export form of a model to `path`, in the precision that `metadata` names."""

    form: nn.Module  # (B, C, H, W) float32, normalised -> (B, classes) logits; see exporters.form
    path: Path
    metadata: Metadata
    free: Free  # what of the input stays open
    calibration: Calibration | None = None  # for int8
    plan: Plan = FASTEST  # of int8: what stays float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an input at the model's own size: 1, C, H, W."""
        side = self.metadata.preprocess.image_size
        return 1, self.metadata.in_channels, side, side


@dataclass(frozen=True)
class Written:
    """What a writer leaves."""

    opened: Path | None  # what to open for the comparison; None: nothing that runs here
    not_run: str | None = None  # what was not run or built here, and why
