"""export: fold, write, open again, compare; only then the file takes its name."""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nextvit import __version__
from nextvit.backbone import NextViT
from nextvit.errors import ParityError, UserError
from nextvit.exporters.parity import Parity, compare
from nextvit.extras import need
from nextvit.files import companion, replacing
from nextvit.folding import fold
from nextvit.formats import FORMATS, format_named, format_of
from nextvit.metadata import Metadata
from nextvit.runtime.open import open_session
from nextvit.runtime.session import Setup


@dataclass(frozen=True)
class ExportReport:
    """What was written, how it was checked, and what came out."""

    path: str
    format: str
    bytes: int  # of all its files
    seconds: float
    setup: Setup  # of the check
    parity: Parity

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "parity": self.parity.to_dict()}


def export(
    model: NextViT, path: str | os.PathLike[str], *, image_size: int | None = None, dynamic: bool = True
) -> ExportReport:
    """Write a model in the format that the ending of `path` names, fp32, and prove that the file answers as the model.

    image_size: pixels a side, recorded as the size to preprocess to; None: the model's own (224 for a fresh one).
    dynamic: batch, height and width stay free; else batch 1 and image_size are fixed.

    Raises UserError for an ending that is no format or a model that cannot be exported, MissingExtra where a library is
    missing, ParityError where the file's outputs differ from the model's; then nothing is left under `path`.
    """
    path = Path(path)
    fmt = format_of(path)
    if fmt is None:
        endings = ", ".join(f"{f.suffix} ({f.name})" for f in FORMATS)
        raise UserError(f"{path} does not end as a format does; the endings are {endings}.")
    if not isinstance(model, NextViT):
        raise UserError(f"export takes a model of nextvit.create_model, not {type(model).__name__}.")
    if model.features_only:
        raise UserError("a features_only model gives four maps; export the classifier, which ends in logits.")
    writer = need(f"nextvit.exporters.{fmt.name}", extra=fmt.extra)
    metadata = replace(model.metadata.with_image_size(image_size), version=__version__)
    start = time.perf_counter()
    with replacing(path) as unfinished:
        writer.write(fold(model), unfinished, metadata, dynamic=dynamic)
        session = open_session(unfinished, device="cpu")
        parity = compare(model, session, dynamic=dynamic)
        if not parity.ok:
            raise ParityError(
                f"{path} was not written: its outputs differ from the model's by {parity.max_abs:.3g} "
                f"({parity.relative:.1e} of the largest, the bound is {parity.bound:.0e}; same first label for "
                f"{parity.top1_agreement:.1f} % of {parity.images} images); please report this."
            )
        second = companion(unfinished)
        size = unfinished.stat().st_size + (second.stat().st_size if second else 0)
    return ExportReport(str(path), fmt.name, size, time.perf_counter() - start, session.setup, parity)


def default_path(model: str | os.PathLike[str], metadata: Metadata, format_name: str) -> Path:
    """VARIANT-SIZE-fp32 with the format's ending: beside a weight file, else in the working folder."""
    name = f"{metadata.variant}-{metadata.preprocess.image_size}-fp32{format_named(format_name).suffix}"
    return Path(model).with_name(name) if Path(model).is_file() else Path(name)
