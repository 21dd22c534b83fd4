"""Weight files: read safely, told apart by their keys, mapped by name, and loaded whole or not at all."""

import argparse
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nextvit.errors import UserError
from nextvit.files import OPEN_SEAL, check_seal, close_seal, replacing
from nextvit.metadata import Metadata, Preprocess
from nextvit.spec import Variant

HEAD = "head.fc"
FIRST_FILTER = "stem.0.conv.weight"
BACKBONE = "backbone."  # before the backbone's names in the network of a dense task
LAST_LAYERS = {  # outputs a class, and outputs beside them
    HEAD: (1, 0),
    "decode_head.conv_seg": (1, 0),
    "auxiliary_head.conv_seg": (1, 0),
    "roi_head.bbox_head.fc_cls": (1, 1),  # the background
    "roi_head.bbox_head.fc_reg": (4, 0),
    "roi_head.mask_head.conv_logits": (1, 0),
}


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds: tensors by name, and the metadata and training state of the files that have them."""

    source: str
    tensors: dict[str, Tensor]
    metadata: Metadata | None = None
    state: dict[str, Any] | None = None  # training state of a checkpoint, its tensors under "optimizer." and the like


class WeightsDoNotFit(UserError):
    """Names all tensors that are missing, unexpected, or of another shape."""

    def __init__(self, source: str, target: str, missing: list[str], unexpected: list[str], misshapen: list[str]):
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        super().__init__(
            f"{source} does not fit {target}: tensors {'; '.join(parts)}; `nextvit info` shows a file's own."
        )


class NotFetched(UserError):
    """Published weights are wanted and cannot be had here."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> WeightFile:
    """Read a weight file of any kind that we know by its content, never by its name, and never run what is in it.

    Official `.pth` (bare, under "model" or "state_dict"), timm `.pth` and `.safetensors`, our own `.safetensors` and
    `.ckpt`. Raises UserError for a file that is missing, empty, damaged, or holds more than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path of the weights.") from error
    if size == 0:
        raise UserError(f"{path} is empty; copy or download it again.")
    header = int.from_bytes(start[:8], "little")
    if len(start) == 9 and header <= size and start[8:9] == b"{":
        return _read_safetensors(path)
    return WeightFile(str(path), _state_dict(_read_pickle(path, zipped=start.startswith(b"PK")), path))


def _read_safetensors(path: Path) -> WeightFile:
    sealed = check_seal(path)
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a handle, not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short; copy or download it again.") from error
    if "nextvit" not in notes:
        return WeightFile(str(path), _state_dict(tensors, path))
    if not sealed:
        raise UserError(f"{path} is damaged: its SHA-256 is gone; copy or make it again.")
    metadata = replace(Metadata.from_json(notes["nextvit"], str(path)), takes_pixels=False)  # weights take none
    state = json.loads(notes["state"]) if "state" in notes else None
    return WeightFile(str(path), tensors, metadata, state)


def _read_pickle(path: Path, *, zipped: bool) -> Any:
    """torch.load, weights only. Official files hold their command line as a Namespace: allowed, and ignored."""
    try:
        source = _checked_archive(path) if zipped else path
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise UserError(
                f"{path} was refused and nothing in it was run: it asks for `{wanted[1]}`, which is more than tensors; "
                "in a sandbox, load it with its own software and save only its state dict with safetensors."
            ) from error
        raise UserError(f"{path} is no weight file, or is damaged; copy or download it again.") from error
    except Exception as error:  # a crafted or torn file can make the unpickler raise anything
        raise UserError(f"{path} is no weight file, or is damaged; copy or download it again.") from error


def _checked_archive(path: Path) -> io.BytesIO:
    """The archive anew from what `zipfile` read: torch checks no sums, and reads a torn directory in its own way."""
    anew = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(anew, "w") as copy:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a bomb would
                raise zipfile.BadZipFile(f"{entry.filename} is compressed")
            copy.writestr(entry.filename, archive.read(entry))  # raises where the sum is not the one stored
    anew.seek(0)
    return anew


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    state = found
    for name in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            state = found[name]
    fits = isinstance(state, Mapping) and state and all(isinstance(k, str) for k in state)
    if not fits or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no weights: neither a state dict nor one under `model` or `state_dict`.")
    return dict(state)


# ---- origins: one table of renames each ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """How one origin names what we name as timm does."""

    name: str
    mark: str  # a beginning that some key has in this layout and in no other
    renames: tuple[tuple[str, str | Callable[[re.Match[str], Variant], str]], ...]


def _stage_and_block(match: re.Match[str], variant: Variant) -> str:
    """The released code numbers the blocks through all stages."""
    block = int(match[1])
    for stage, depth in enumerate(variant.depths):
        if block < depth:
            return f"stages.{stage}.blocks.{block}."
        block -= depth
    return match[0]  # no such block in this variant: stays as it is, and is reported as unexpected


ORIGINS = (
    Origin(
        "official",
        "features.",
        (
            (r"^features\.(\d+)\.", _stage_and_block),
            (r"\.mlp\.conv([12])\.", r".mlp.fc\1."),
            (r"^proj_head\.0\.", f"{HEAD}."),
            (r"^extra_norm_list\.", "stage_norms."),
        ),
    ),
    Origin("timm", "stages.", ()),
)


def rename(tensors: Mapping[str, Tensor], variant: Variant, source: str) -> dict[str, Tensor]:
    """Map the names of a file to ours, by its origin's table; every entry is kept."""
    origin = next((o for o in ORIGINS if any(key.startswith(o.mark) for key in tensors)), None)
    if origin is None:
        names = ", ".join(o.name for o in ORIGINS)
        first = next(iter(tensors))
        raise UserError(f"{source} is no Next-ViT in a layout that is known ({names}); its first tensor is {first!r}.")
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, target in origin.renames:
            key = re.sub(pattern, target if isinstance(target, str) else lambda m, t=target: t(m, variant), key)
        renamed[key] = tensor
    return renamed


UNREAD = {  # of a backbone, by task: no output depends on them, and files may have them or not
    "segment": (f"{HEAD}.", "stage_norms.3."),
    "detect": (f"{HEAD}.", "stage_norms.", "norm."),
}


def rename_dense(tensors: Mapping[str, Tensor], variant: Variant | None, task: str, source: str) -> dict[str, Tensor]:
    """The same for the network of a dense task, whose backbone lies below `backbone.`, or for a classifier alone.

    variant: None where the backbone is one of timm's, which keeps its names. UNREAD entries are left out.
    """
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    inner = {key.removeprefix(BACKBONE): tensor for key, tensor in tensors.items() if key.startswith(BACKBONE)}
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(BACKBONE)} if inner else {}
    if variant is not None:
        inner = rename(inner or tensors, variant, source)
        inner = {key: tensor for key, tensor in inner.items() if not key.startswith(UNREAD[task])}
    return {BACKBONE + key: tensor for key, tensor in inner.items()} | rest


# ---- published weights -----------------------------------------------------------------------------------------------

TAGS = {
    "in1k": "bd_in1k",
    "in1k_384": "bd_in1k_384",
    "in1k_6m": "bd_ssld_6m_in1k",
    "in1k_6m_384": "bd_ssld_6m_in1k_384",
}
PUBLISHED = ("nextvit_small", "nextvit_base", "nextvit_large")


def resolve(name: str, weights: str | Path) -> tuple[Path, Preprocess | None]:
    """The file behind `weights`: a path, a published tag or hub id (downloaded once); its preprocessing, if told."""
    text = str(weights)
    if text.startswith("hf-hub:"):
        return _download(text.removeprefix("hf-hub:"))
    if text not in TAGS:
        if isinstance(weights, str) and not Path(text).exists() and "/" not in text and "." not in text:
            raise UserError(f"{text!r} is neither a file nor a published tag; the tags are {', '.join(TAGS)}.")
        return Path(text), None
    if name not in PUBLISHED:
        raise UserError(f"{name} has no published weights; train it, or take one of {', '.join(PUBLISHED)}.")
    return _download(f"timm/{name}.{TAGS[text]}")


def _download(repository: str) -> tuple[Path, Preprocess]:
    """Fetch model.safetensors and config.json from the hub or its cache; fails fast without a network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(file: str, *, offline: bool) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=offline))

    try:
        try:
            paths = [fetch(file, offline=True) for file in ("model.safetensors", "config.json")]
        except LocalEntryNotFoundError:
            # The hub client retries for up to a minute; one short question first tells whether anybody answers.
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=4)
            paths = [fetch(file, offline=False) for file in ("model.safetensors", "config.json")]
    except Exception as error:  # the client's errors come from several libraries; each means: not to be had
        raise NotFetched(
            f"cannot get {repository} from the hub ({type(error).__name__}); check the name and the network, or "
            "download the file elsewhere and give its path as the weights."
        ) from error
    try:
        config = json.loads(paths[1].read_text(encoding="utf-8"))
        given = config.get("pretrained_cfg", config)
        preprocess = Preprocess(
            image_size=int(given["input_size"][-1]),
            crop=float(given["crop_pct"]),
            interpolation=given["interpolation"],
            mean=tuple(given["mean"]),
            std=tuple(given["std"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the config.json of {repository} does not say how images are prepared ({type(error).__name__}: {error}); "
            "download its weights and give the file instead."
        ) from error
    return paths[0], preprocess


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_into(model: nn.Module, found: Mapping[str, Tensor], source: str, target: str) -> None:
    """Load every tensor into its place, or none: names and shapes must agree one to one, all values must be finite."""
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    misshapen = sorted(key for key in wanted.keys() & found.keys() if wanted[key].shape != found[key].shape)
    if missing or unexpected or misshapen:
        raise WeightsDoNotFit(source, target, missing, unexpected, misshapen)
    for key, tensor in found.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{source} holds numbers that are not finite in {key}; it is of no use.")
    model.load_state_dict(dict(found))


Layers = Mapping[str, tuple[int, int]]


def class_count(found: Mapping[str, Tensor], layers: Layers) -> int | None:
    """How many classes these tensors are made for, by their last layers; None: they have none."""
    for layer, (each, beside) in layers.items():
        if f"{layer}.bias" in found:
            return (len(found[f"{layer}.bias"]) - beside) // each
    return None


def adapt_last_layers(found: dict[str, Tensor], model: nn.Module, source: str, layers: Layers) -> None:
    """Another class count: the new last layers of the model stay, and a warning says so."""
    own = model.state_dict()
    theirs, wanted = class_count(found, layers), class_count(own, layers)
    if theirs is None or wanted is None or theirs == wanted:
        return
    warnings.warn(f"{source} has {theirs} classes, {wanted} were asked for: the last layer is new.", stacklevel=3)
    last = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    found |= {key: own[key] for key in last if key in own and key in found}


def adapt_first_filter(found: dict[str, Tensor], key: str, in_channels: int, source: str) -> None:
    """Other input channels: the colours of the first filter are repeated and scaled, so that grey in is grey out."""
    weight = found.get(key)
    if weight is not None and weight.ndim == 4 and weight.shape[1] != in_channels:
        theirs = weight.shape[1]
        warnings.warn(
            f"{source} takes {theirs} input channels and {in_channels} were asked for: the first filter was adapted.",
            stacklevel=3,
        )
        repeats = -(-in_channels // theirs)
        if in_channels == 1:
            found[key] = weight.sum(1, keepdim=True)
        else:
            found[key] = weight.repeat(1, repeats, 1, 1)[:, :in_channels] * (theirs / in_channels)


def model_tensors(file: WeightFile) -> dict[str, Tensor]:
    """The network's tensors; in a training checkpoint they lie beside those of the optimiser."""
    if file.state is None:
        return file.tensors
    return {key.removeprefix("model."): value for key, value in file.tensors.items() if key.startswith("model.")}


def save_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    state: Mapping[str, Any] | None = None,
    *,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Write a sealed safetensors file with its metadata, whole or not at all; `state` makes it a checkpoint.

    before: is called when the file is written and has not taken its place yet.
    """
    from nextvit import __version__

    notes = {"format": "pt", "nextvit": replace(metadata, version=__version__).to_json(), "sha256": OPEN_SEAL}
    if state is not None:
        notes["state"] = json.dumps(state)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with replacing(path, size=size) as unfinished:
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, unfinished, notes)
        except SafetensorError as error:  # it tells an I/O error's number in its text alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from error
        close_seal(unfinished)
        before()
