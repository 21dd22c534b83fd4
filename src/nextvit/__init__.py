"""nextvit: train, evaluate, fold, export, check and measure Next-ViT, from a folder of images to a deployed model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nextvit.create import create_model, list_models
    from nextvit.exporters.export import export
    from nextvit.folding import fold
    from nextvit.runtime.predictor import load

__all__ = ["__version__", "create_model", "export", "fold", "list_models", "load"]

_HOMES = {  # imported on first use, so that `nextvit --help` need not wait for torch
    "create_model": "nextvit.create",
    "list_models": "nextvit.create",
    "fold": "nextvit.folding",
    "export": "nextvit.exporters.export",
    "load": "nextvit.runtime.predictor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nextvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
