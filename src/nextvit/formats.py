"""The table of formats that a model can be exported to."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from nextvit.errors import UserError


@dataclass(frozen=True)
class Free:
    """What of the input (B, C, H, W) is left open in an exported file; the rest is fixed when it is written."""

    batch: bool
    sides: bool


@dataclass(frozen=True)
class Format:
    """One format: `nextvit export --to NAME`; its writer is the module of that name in `exporters`."""

    name: str
    suffix: str
    extra: str  # of the package, with the libraries that write and run it; empty: torch does
    precisions: tuple[str, ...]
    free: Free  # what it can leave open
    pixels: Free | None = None  # the same of a file that prepares images itself; None: there is no such file
    open_from: int = 32  # sides, in pixels, that can be left open; a smaller size is fixed
    needs: tuple[str, ...] = ()  # modules of the extra without which nothing can be written
    program: bool = False  # opening the file runs it (see `trust`)
    detects: bool = False  # a whole detector; else backbone and feature pyramid of one
    elsewhere: str = ""  # why nextvit does not open its files; {path}: the file

    def check(self, precision: str, preprocess: bool) -> None:
        """Raise UserError for a precision, or preprocessing inside, that the format does not have."""
        if precision not in self.precisions:
            raise UserError(f"{self.name} files are {', '.join(self.precisions)}, not {precision!r}.")
        if preprocess and self.pixels is None:
            able = ", ".join(fmt.name for fmt in FORMATS if fmt.pixels is not None)
            raise UserError(f"{self.name} files do not prepare images themselves; --preprocess goes with {able}.")

    def left_open(self, image_size: int, dynamic: bool, preprocess: bool) -> Free:
        """What stays open in a file made for this size: all that can, or nothing; sides of whole images always do."""
        if preprocess and self.pixels is not None:
            return Free(dynamic and self.pixels.batch, sides=True)
        sides = self.free.sides and image_size >= self.open_from
        return Free(dynamic and self.free.batch, dynamic and sides)


BOTH = Free(batch=True, sides=True)
ONNX = ("onnx", "onnxscript", "onnxslim")  # the libraries that make an ONNX graph
FORMATS = (
    Format("onnx", ".onnx", "onnx", ("fp32", "fp16", "int8"), BOTH, BOTH, needs=(*ONNX, "onnxruntime"), detects=True),
    Format(
        "openvino",
        ".xml",
        "openvino",
        ("fp32", "fp16", "bf16", "int8"),
        BOTH,
        BOTH,
        needs=(*ONNX, "openvino"),
        detects=True,
    ),
    Format(
        "coreml",
        ".mlpackage",
        "coreml",
        ("fp32", "fp16", "int8"),
        Free(batch=False, sides=True),
        open_from=64,
        needs=("coremltools",),
    ),
    Format(
        "coreai",
        ".aimodel",
        "coreai",
        ("fp32", "fp16"),
        BOTH,
        open_from=64,
        needs=("coreai_torch",),
        elsewhere="nextvit writes Core AI files and does not run them yet; Xcode 27 opens {path}",
    ),
    Format(
        "tensorrt",
        ".engine",
        "tensorrt",
        ("fp32", "fp16", "int8"),
        BOTH,
        needs=(*ONNX, "onnxruntime"),
        elsewhere="engines are run by TensorRT's own tools; nextvit opens the ONNX written beside one, {path}.onnx",
    ),
    Format(
        "executorch",
        ".pte",
        "executorch",
        ("fp32", "int8"),
        BOTH,
        Free(batch=False, sides=True),
        open_from=64,
        needs=("executorch.exir",),
    ),
    Format("torch", ".pt2", "", ("fp32", "bf16"), BOTH, BOTH, open_from=64, program=True, detects=True),
    Format("aotinductor", ".aoti.pt2", "", ("fp32", "bf16"), BOTH, BOTH, open_from=64, program=True),
)
RUN = tuple(fmt.name for fmt in FORMATS if not fmt.elsewhere)


def format_named(name: str) -> Format:
    for fmt in FORMATS:
        if fmt.name == name:
            return fmt
    names = [fmt.name for fmt in FORMATS]
    near = difflib.get_close_matches(name, names, n=1)
    raise UserError(f"there is no format {name!r}; take {near[0] if near else ' or '.join(names)}.")


def format_of(path: Path) -> Format | None:
    """The format that a file's ending names, if any; of two that fit, the longer."""
    fitting = [fmt for fmt in FORMATS if path.name.endswith(fmt.suffix) and path.name != fmt.suffix]
    return max(fitting, key=lambda fmt: len(fmt.suffix), default=None)
