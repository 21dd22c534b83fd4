"""What a writer of a format is given, and what it gives back."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from nextvit.exporters.calibration import Calibration
from nextvit.exporters.form import as_exported
from nextvit.exporters.quantization import FASTEST, Plan
from nextvit.formats import Free
from nextvit.metadata import Metadata


@dataclass(frozen=True)
class Job:
    """Write the export form of a model to `path`, in the precision that `metadata` names."""

    form: nn.Module  # (B, C, H, W) float32, normalised -> logits; see exporters.form
    path: Path
    metadata: Metadata
    free: Free  # what of the file's input stays open
    calibration: Calibration | None = None  # for int8
    plan: Plan = FASTEST  # of int8: what stays float

    @property
    def network(self) -> nn.Module:
        """The form, as what the file gives: of a segmenter perhaps classes, of a detector objects or maps."""
        return as_exported(self.form, self.metadata)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an input at the model's own size: 1, C, H, W; with pixels 1, H, W, 3."""
        side = self.metadata.preprocess.image_size
        return self.metadata.input_shape(1, side, side)

    def of_network(self) -> "Job":
        """The same without preprocessing in the file: what is prepared has one size."""
        if not self.metadata.takes_pixels:
            return self
        return replace(
            self, metadata=replace(self.metadata, takes_pixels=False), free=Free(self.free.batch, sides=False)
        )


@dataclass(frozen=True)
class Written:
    """What a writer leaves."""

    opened: Path | None  # what to open for the comparison; None: nothing that runs here
    not_run: str | None = None  # what was not run or built here, and why
