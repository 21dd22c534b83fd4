"""From any MODEL to a session: a variant's name, a weight file, a checkpoint, or an exported file."""

from collections.abc import Callable
from pathlib import Path

from nextvit.create import create_model, is_variant, list_models, open_checkpoint
from nextvit.errors import UserError
from nextvit.foreign import TIMM, is_foreign
from nextvit.formats import format_of
from nextvit.networks import Network
from nextvit.runtime.coreml_session import CoreMLSession
from nextvit.runtime.executorch_session import ExecuTorchSession
from nextvit.runtime.onnxruntime_session import OnnxRuntimeSession
from nextvit.runtime.openvino_session import OpenVINOSession
from nextvit.runtime.session import Session, insist_on_latency
from nextvit.runtime.torch_program_session import TorchProgramSession
from nextvit.runtime.torch_session import TorchSession

HINTS = ("latency", "throughput")
EXPORTED: dict[str, Callable[..., Session]] = {
    "onnx": OnnxRuntimeSession,
    "openvino": OpenVINOSession,
    "coreml": CoreMLSession,
    "executorch": ExecuTorchSession,
    "torch": TorchProgramSession,
    "aotinductor": TorchProgramSession,
}


def open_network(model: str | Path, weights: str | None = None) -> Network:
    """The network of a name (with `weights`, or random ones), a classifier, or of a weight file."""
    if is_variant(str(model)) or is_foreign(str(model)):
        return create_model(str(model), weights=weights, task="classify")
    if weights is not None:
        raise UserError(f"--weights goes with a variant's name ({', '.join(list_models())}), not with {model}.")
    path = Path(model)
    if format_of(path) is not None:
        raise UserError(f"{path} is an exported file; this needs a variant's name or a weight file.")
    if not path.exists():
        names = ", ".join(list_models())
        raise UserError(
            f"there is no file {model}, and no variant of that name; the variants are {names}, and {TIMM}NAME is any "
            "network of timm's."
        )
    return open_checkpoint(path)


def open_session(
    model: str | Path,
    *,
    weights: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    hint: str = "latency",
    trust: bool = False,
) -> Session:
    """Open any MODEL on the runtime that its kind asks for: exported files on their own, weights on torch, folded.

    precision: None is the file's own, fp32 for weights; another only where the device computes in it. hint: "latency",
    or with OpenVINO "throughput", which runs parts of a batch side by side. trust: open files that are programs,
    whoever wrote them.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads must be 1 or more, not {threads}.")
    if hint not in HINTS:
        raise UserError(f"there is no hint {hint!r}; take of {', '.join(HINTS)}.")
    path = Path(model)
    fmt = format_of(path)
    if fmt is None or fmt.name != "openvino":
        insist_on_latency(hint, fmt.name if fmt else "torch")
    if fmt is None:
        return TorchSession(open_network(model, weights), device=device, threads=threads, precision=precision)
    if weights is not None:
        raise UserError(f"--weights goes with a variant's name ({', '.join(list_models())}), not with {model}.")
    if fmt.elsewhere:
        raise UserError(f"{fmt.elsewhere.format(path=path)}.")
    if not path.exists():
        raise UserError(f"there is no file {path}; `nextvit export` makes one.")
    only: dict[str, bool | str] = {"trust": trust} if fmt.program else {}
    if fmt.name == "openvino":
        only = {"hint": hint}
    return EXPORTED[fmt.name](path, device=device, threads=threads, precision=precision, **only)
