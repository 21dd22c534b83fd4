"""The table of formats that a model can be exported to."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from nextvit.errors import UserError


@dataclass(frozen=True)
class Format:
    """One format: `nextvit export --to NAME`; its writer is the module of that name in `exporters`."""

    name: str
    suffix: str
    extra: str  # of the package, with the libraries that write and run it
    precisions: tuple[str, ...]

    def check(self, precision: str) -> None:
        """Raise UserError for a precision that the format does not have."""
        if precision not in self.precisions:
            raise UserError(f"{self.name} files are {', '.join(self.precisions)}, not {precision!r}.")


FORMATS = (
    Format("onnx", ".onnx", "onnx", ("fp32", "fp16", "int8")),
    Format("openvino", ".xml", "openvino", ("fp32", "fp16", "bf16", "int8")),
)


def format_named(name: str) -> Format:
    for fmt in FORMATS:
        if fmt.name == name:
            return fmt
    names = [fmt.name for fmt in FORMATS]
    near = difflib.get_close_matches(name, names, n=1)
    raise UserError(f"there is no format {name!r}; take {near[0] if near else ' or '.join(names)}.")


def format_of(path: Path) -> Format | None:
    """The format that a file's ending names, if any."""
    return next((fmt for fmt in FORMATS if fmt.suffix == path.suffix), None)
