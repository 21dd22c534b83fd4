"""A torch.export program, or an AOTInductor package, on torch.

Reading a `.pt2` runs what it says: torch evaluates its guards and its sizes as Python, unpickles its examples, and
loads libraries that lie in it. So a program is looked through first, and a package, which is machine code, is opened
only for one who trusts it.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextvit.devices import set_threads
from nextvit.errors import UserError
from nextvit.files import check_seal
from nextvit.metadata import Metadata
from nextvit.runtime.session import Setup

METADATA_ENTRY = "extra/nextvit.json"
ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|extra/nextvit\.json|"
    r"data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)|"
    r"data/sample_inputs/model\.pt"
)
# Names in expressions of sizes and in guards, which torch evaluates.
NAMES = re.compile(
    r"Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|Integer|Symbol|positive|integer|True|False|L|x|image|size|[su]\d+"
)
SIGNS = re.compile(r"[\w\s()\[\],.'=+\-*/%<>!]*")
OPERATORS = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|getitem|eq|ne|lt|le|gt|ge)")


class TorchProgramSession:
    """Runs on torch's CPU operators. `trust`: whether to open a package of machine code."""

    def __init__(self, path: Path, *, device: str, threads: int | None, precision: str | None, trust: bool = False):
        if device not in ("auto", "cpu"):
            raise UserError(f"{path.name} was made for the CPU, not for {device!r}; leave --device out.")
        if not check_seal(path):
            raise UserError(
                f"{path} has no nextvit metadata, so its preprocessing is unknown; make it with `nextvit export`."
            )
        compiled = path.name.endswith(".aoti.pt2")
        if compiled and not trust:
            raise UserError(
                f"{path} is machine code, and opening it runs it as a program; if you know who made it, add --trust "
                "(in Python: trust=True)."
            )
        try:
            with zipfile.ZipFile(path) as archive:
                root = archive.namelist()[0].partition("/")[0]
                notes = archive.read(f"{root}/{METADATA_ENTRY}").decode()
                if not compiled:
                    _insist_on_plain_program(archive, root, str(path))
        except (zipfile.BadZipFile, KeyError, IndexError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is no program of nextvit, or is damaged; export it again.") from error
        self.metadata = Metadata.from_json(notes, str(path))
        own = self.metadata.precision
        if precision not in (None, own):
            raise UserError(f"torch computes this file in {own}, not in {precision}; leave --precision out.")
        kind = "AOTInductor" if compiled else "program"
        self.setup = Setup(f"torch {torch.__version__.partition('+')[0]}, {kind}", "cpu", own, set_threads(threads))
        try:
            self._run, self.fixed_batch = _open_package(path) if compiled else _open_program(path)
        except RuntimeError as error:
            raise UserError(
                f"{path} cannot be opened by torch {torch.__version__}; export it again, on this kind of machine."
            ) from error

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        set_threads(self.setup.threads)  # they are the process's, and another session may have other ones
        with torch.inference_mode():
            try:
                return self._run(torch.from_numpy(batch)).numpy()
            except (AssertionError, RuntimeError) as error:
                shape = "x".join(map(str, batch.shape))
                raise UserError(f"this file does not take an input of {shape}: {str(error).splitlines()[0]}") from error


def _open_program(path: Path) -> tuple[Any, int | None]:
    opened = torch.export.load(path)
    (name,) = opened.graph_signature.user_inputs
    (example,) = (node.meta["val"] for node in opened.graph.nodes if node.name == name)
    fixed = example.shape[0]
    return opened.module(), fixed if isinstance(fixed, int) else None


def _open_package(path: Path) -> tuple[Any, int | None]:
    opened = torch._inductor.aoti_load_package(str(path))
    return opened, None


def _insist_on_plain_program(archive: zipfile.ZipFile, root: str, path: str) -> None:
    """Raise UserError unless loading the program can do nothing but build a graph of torch's own operators."""
    for entry in archive.namelist():
        if not ENTRIES.fullmatch(entry.removeprefix(f"{root}/")):
            raise UserError(f"{path} holds {entry!r}, which a program of nextvit never does; it was not opened.")
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(f"{root}/data/{kind}/model_{kind}_config.json"))["config"]
        if any(entry["use_pickle"] for entry in config.values()):
            raise UserError(f"{path} holds pickled {kind}, which could run anything; it was not opened.")
    try:
        torch.load(io.BytesIO(archive.read(f"{root}/data/sample_inputs/model.pt")), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} holds pickled examples that could run anything; it was not opened.") from error
    found = json.loads(archive.read(f"{root}/models/model.json"))
    for text in (*found.get("guards_code", ()), *_strings(found, "expr_str")):
        names = re.findall(r"[A-Za-z_]\w*", text)
        if not SIGNS.fullmatch(text) or not all(NAMES.fullmatch(name) for name in names):
            raise UserError(f"{path} has an expression that is no arithmetic of sizes; it was not opened.")
    for operator in _strings(found["graph_module"]["graph"], "target"):
        if not OPERATORS.fullmatch(operator):
            raise UserError(f"{path} calls {operator!r}, which a program of nextvit never does; it was not opened.")


def _strings(tree: Any, key: str) -> Iterator[str]:
    """All strings that stand under a key, anywhere in a JSON tree."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _strings(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)
