"""Optional libraries: imported where they are used, and named with the extra that brings them when they are missing."""

import importlib
from functools import cache
from importlib import metadata, util
from types import ModuleType

from nextvit.errors import MissingExtra


def need(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or raise MissingExtra with the `pip install` line of the extra that has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f'{error.name} is not installed; run: pip install "nextvit[{extra}]"') from error


def installed(module: str) -> bool:
    """Whether `need` would find it."""
    return util.find_spec(module) is not None


def version(module: str) -> str:
    """The installed version of what has this module: onnxruntime may be onnxruntime-gpu's."""
    return metadata.version(_distributions().get(module, [module])[0]).partition("+")[0]


_distributions = cache(metadata.packages_distributions)  # it reads the records of all that is installed
