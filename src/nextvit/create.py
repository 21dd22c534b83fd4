"""create_model and list_models: from a name, and perhaps a weight file, to a network with its metadata."""

import difflib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from nextvit import class_names
from nextvit.ablations import ablation_variant
from nextvit.backbone import NextViT
from nextvit.compared import KINDS
from nextvit.detector import Detector
from nextvit.errors import UserError
from nextvit.foreign import (
    ForeignClassifier,
    ForeignMaps,
    ends_of,
    from_classifier,
    is_foreign,
    preprocess_of,
    renamed_foreign,
)
from nextvit.metadata import DENSE, HEADS, Metadata, Preprocess
from nextvit.networks import Classifier, Dense, Network
from nextvit.segmenter import Segmenter
from nextvit.spec import KV_POOLINGS, VARIANTS, KvPooling, Variant, configured
from nextvit.weights import (
    BACKBONE,
    FIRST_FILTER,
    LAST_LAYERS,
    PUBLISHED,
    WeightFile,
    adapt_first_filter,
    adapt_last_layers,
    class_count,
    load_into,
    model_tensors,
    read_weights,
    rename,
    rename_dense,
    resolve,
)

DENSE_DROP_PATH = {  # of the published variants, whatever they have as classifiers
    "segment": dict.fromkeys(PUBLISHED, 0.2),
    "detect": dict(zip(PUBLISHED, (0.1, 0.2, 0.2), strict=True)),
}
AROUND = ("neck.", "decode_head.", "auxiliary_head.", "rpn_head.", "roi_head.")  # the backbone of a dense network
MARKS = {"psp_modules": "upernet", "scale_heads": "fpn", "roi_head": "mask_rcnn"}  # in names of tensors
CLASSES = {"classify": 1000, "segment": 150, "detect": 80}


def list_models() -> list[str]:
    """Names of the variants, smallest first."""
    return [variant.name for variant in VARIANTS]


def is_variant(name: str) -> bool:
    """Whether it is the name of a variant, of a configuration of one, or of one of the paper's ablations."""
    return _variant(name) is not None


def variant_named(name: str) -> Variant:
    """The row of the variant table, a configuration of one, or one of the paper's ablations.

    An unknown name raises UserError and offers the nearest names.
    """
    if (variant := _variant(name)) is not None:
        return variant
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4) or list_models()
    raise UserError(f"there is no model {name!r}; did you mean {' or '.join(near)}?")


def _variant(name: str) -> Variant | None:
    usual = next((variant for variant in VARIANTS if variant.name == name), None)
    return usual or configured(name) or ablation_variant(name)


@overload
def create_model(
    name: str,
    *,
    weights: str | Path | WeightFile | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    features_only: bool = False,
    drop_path_rate: float | None = None,
    kv_pooling: KvPooling = "sequence",
    task: Literal["classify"] = "classify",
    head: None = None,
) -> NextViT: ...
@overload
def create_model(
    name: str,
    *,
    weights: str | Path | WeightFile | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    features_only: bool = False,
    drop_path_rate: float | None = None,
    kv_pooling: KvPooling = "sequence",
    task: str,
    head: str | None = None,
) -> Network: ...
def create_model(
    name: str,
    *,
    weights: str | Path | WeightFile | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    features_only: bool = False,
    drop_path_rate: float | None = None,
    kv_pooling: KvPooling = "sequence",
    task: str = "classify",
    head: str | None = None,
) -> Network:
    """Build a Next-ViT: (B, in_channels, H, W) float -> (B, num_classes) logits; with task "segment" (B,
    num_classes, H / 4, W / 4), with "detect" a dict an image, and of these, given targets too, losses by name.

    name: a variant; "timm:NAME", any network of timm's; "peer:NAME", one that the paper compares with and timm lacks
        (`nextvit.peers`). Networks of others need maps at strides 4, 8, 16, 32 for a dense task.
    weights: None (random), a file (official .pth, timm .pth or .safetensors, our own .safetensors or .ckpt; or what
        `weights.read_weights` gave), a published tag ("in1k", "in1k_384", "in1k_6m", "in1k_6m_384"), or
        "hf-hub:org/name". Those of a classifier give a dense task its backbone; a warning says that the rest is new.
    num_classes: None: as the weights have it, else 1000 (classify), 150 (segment) or 80 (detect). Another count than
        the weights': the last layer is new.
    features_only: forward returns the four stage outputs at strides 4, 8, 16, 32: raw, without the final norm; with
        task "segment" after the norms that its heads read.
    drop_path_rate: stochastic depth at the last block; None: the task's and the variant's own.
    kv_pooling: "sequence", as the published weights were trained, or "spatial", true 2-D average pooling.
    task: "classify", "segment" or "detect". head: of "segment": "fpn" (Semantic FPN, also None) or "upernet"; of
        "detect": "mask_rcnn" (also None).

    `model.metadata` holds the labels and the preprocessing that go with it. Raises UserError (a ValueError) for an
    unknown name, and for weights that cannot be read or do not fit; then nothing was loaded.
    """
    head = _checked_head(task, head)
    _check(kv_pooling, num_classes, in_channels, drop_path_rate)
    foreign = is_foreign(name)
    if foreign and (features_only or drop_path_rate is not None):
        raise UserError(f"features_only and drop_path_rate are Next-ViT's; {name} is made with its own.")
    variant = None if foreign else variant_named(name)
    usual = preprocess_of(name) if foreign and task == "classify" else Preprocess()
    preprocess = usual if task == "classify" else DENSE[task]
    metadata = Metadata(name, task, head, (), preprocess, kv_pooling=kv_pooling, in_channels=in_channels)
    file, found = None, None
    if weights is not None:
        file, told = _read(name, weights)
        metadata = _agreeing(file.metadata, metadata, file.source)
        if told is not None and task == "classify":
            metadata = replace(metadata, preprocess=told)
        found = _renamed(model_tensors(file), variant, task, file.source)
    layers = dict.fromkeys(ends_of(name)[1], (1, 0)) if foreign and task == "classify" else LAST_LAYERS
    theirs = None if found is None else class_count(found, layers)
    if num_classes is None:
        num_classes = theirs or CLASSES[task]
    metadata = replace(metadata, num_classes=num_classes, in_channels=in_channels)
    model = _built(variant, metadata, features_only=features_only, drop_path_rate=drop_path_rate)
    if file is not None and found is not None:
        _load(model, found, file, name)
    if theirs is not None and file is not None and file.metadata is None:
        known = class_names.of_task(task)
        metadata = replace(metadata, labels=known if len(known) == num_classes else ())
    elif len(metadata.labels) != num_classes:
        metadata = replace(metadata, labels=())
    model.metadata = metadata
    return model.to(memory_format=torch.channels_last)  # as the forward pass wants its filters


def open_checkpoint(path: str | Path) -> Network:
    """The network of a weight file, built as its metadata says; without metadata, as its tensors do."""
    return model_of(read_weights(path))


def open_classifier(path: str | Path) -> Classifier:
    """The same of a file that holds a classifier; UserError for one that does not."""
    model = open_checkpoint(path)
    if not isinstance(model, Classifier):
        raise UserError(f"{path} is for the task {model.metadata.task!r}, and a classifier is needed here.")
    return model


def model_of(file: WeightFile) -> Network:
    """The same of a file that was read already."""
    m = file.metadata or recognised(file)
    if m is None:
        names = ", ".join(list_models())
        raise UserError(f"{file.source} fits none of {names}; `nextvit info {file.source}` shows what it holds.")
    return create_model(
        m.variant,
        weights=file,
        in_channels=m.in_channels,
        kv_pooling=m.kv_pooling,
        task=m.task,
        head=m.head or None,
    )


def recognised(file: WeightFile) -> Metadata | None:
    """What a file without metadata holds, by its names and shapes, classes and input channels aside; None: not ours."""
    tensors = model_tensors(file)
    dense = any(key.removeprefix("module.").startswith(BACKBONE) for key in tensors)
    head = next((head for mark, head in MARKS.items() if any(mark in key for key in tensors)), "") if dense else ""
    task = next(task for task, heads in HEADS.items() if head in heads)
    for variant in VARIANTS:
        try:
            found = _renamed(tensors, variant, task, file.source)
        except UserError:
            return None
        record = Metadata(variant.name, task=task, head=head)
        with torch.device("meta"):
            wanted = _built(variant, record, features_only=False, drop_path_rate=None).state_dict()
        first = BACKBONE * dense + FIRST_FILTER
        free = {first, *(f"{layer}.{kind}" for layer in LAST_LAYERS for kind in ("weight", "bias"))}
        if found.keys() == wanted.keys() and all(found[k].shape == wanted[k].shape for k in wanted.keys() - free):
            return replace(record, in_channels=found[first].shape[1])
    return None


# ---- parts of create_model -------------------------------------------------------------------------------------------


def _checked_head(task: str, head: str | None) -> str:
    if task not in HEADS:
        raise UserError(f"there is no task {task!r}; take one of {', '.join(HEADS)}.")
    if head is None:
        return HEADS[task][0]
    if head not in HEADS[task]:
        heads = ", ".join(HEADS[task]) if any(HEADS[task]) else "none"
        raise UserError(f"task {task!r} has no head {head!r}; it has {heads}.")
    return head


def _check(kv_pooling: str, num_classes: int | None, in_channels: int, drop_path_rate: float | None) -> None:
    if kv_pooling not in KV_POOLINGS:
        raise UserError(f"there is no kv_pooling {kv_pooling!r}; take one of {', '.join(KV_POOLINGS)}.")
    for value, what in ((num_classes, "num_classes"), (in_channels, "in_channels")):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{what} must be a whole number, 1 or more, not {value!r}.")
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise UserError(f"drop_path_rate must be 0 or more and below 1, not {drop_path_rate}.")


def _read(name: str, weights: str | Path | WeightFile) -> tuple[WeightFile, Preprocess | None]:
    """The file, and what a published one's own record says about its images."""
    if isinstance(weights, WeightFile):
        return weights, None
    path, preprocess = resolve(name, weights)
    return read_weights(path), preprocess


def _renamed(tensors: dict[str, Tensor], variant: Variant | None, task: str, source: str) -> dict[str, Tensor]:
    if task == "classify":
        return renamed_foreign(tensors) if variant is None else rename(tensors, variant, source)
    return rename_dense(tensors, variant, task, source)


def _built(variant: Variant | None, m: Metadata, *, features_only: bool, drop_path_rate: float | None) -> Network:
    """The network of a record, its weights random. variant: None for networks of others."""
    dense = m.task != "classify"
    if variant is None and not dense:
        return ForeignClassifier(m)
    if variant is None:
        backbone: NextViT | ForeignMaps = ForeignMaps(m.variant, m.in_channels)
    else:
        if dense and drop_path_rate is None:
            drop_path_rate = DENSE_DROP_PATH[m.task].get(variant.name)
        backbone = NextViT(
            variant,
            num_classes=m.num_classes,
            in_channels=m.in_channels,
            features_only=features_only or dense,
            normed_features=m.task == "segment",
            drop_path_rate=drop_path_rate,
            kv_pooling=m.kv_pooling,
            kinds=KINDS,
        )
    if isinstance(backbone, NextViT) and (not dense or features_only):
        return backbone
    return Segmenter(backbone, m) if m.task == "segment" else Detector(backbone, m)


def _load(model: Network, found: dict[str, Tensor], file: WeightFile, name: str) -> None:
    """Whole or not at all, but for what is meant to be new: last layers of other classes, all around a backbone."""
    own, first, around, layers = model.state_dict(), FIRST_FILTER, AROUND, LAST_LAYERS
    if isinstance(model, ForeignClassifier):
        first, last = ends_of(name)
        layers = dict.fromkeys(last, (1, 0))
    elif isinstance(model, Dense):
        first = BACKBONE + FIRST_FILTER
        if isinstance(model.backbone, ForeignMaps) and not any(key.startswith(BACKBONE) for key in found):
            found = {BACKBONE + k: t for k, t in from_classifier(model_tensors(file), model.backbone).items()}
        if not any(key.startswith(around) for key in found):
            warnings.warn(f"{file.source} holds a backbone alone: neck and head are new.", stacklevel=3)
            new = (*around, f"{BACKBONE}stage_norms.")
            found = {key: value for key, value in own.items() if key.startswith(new)} | found
    elif model.features_only:
        found = {key.removeprefix(BACKBONE): value for key, value in found.items()}
        found = {key: value for key, value in found.items() if not key.startswith((*around, "head."))}
        if not any(key.startswith("stage_norms.") for key in own):
            found = {key: value for key, value in found.items() if not key.startswith(("norm.", "stage_norms."))}
        elif not any(key.startswith("stage_norms.") for key in found):
            warnings.warn(f"{file.source} holds a classifier: the norms of its first three maps are new.", stacklevel=3)
            found = {key: value for key, value in own.items() if key.startswith("stage_norms.")} | found
    adapt_first_filter(found, first, model.metadata.in_channels, file.source)
    adapt_last_layers(found, model, file.source, layers)
    load_into(model, found, file.source, name)


def _agreeing(found: Metadata | None, wanted: Metadata, source: str) -> Metadata:
    """The file's own record, once it is clear that it is about what was asked for; of a classifier that gives a dense
    task its backbone, its preprocessing alone.
    """
    if found is None:
        return wanted
    if found.variant != wanted.variant:
        raise UserError(f"{source} holds {found.variant} and {wanted.variant} was asked for; ask for {found.variant}.")
    if found.kv_pooling != wanted.kv_pooling:
        raise UserError(f"{source} was trained with kv_pooling={found.kv_pooling!r}; ask for that.")
    if (found.task, found.head) == (wanted.task, wanted.head):
        return found
    if found.task == "classify":
        p = found.preprocess
        return replace(wanted, preprocess=replace(wanted.preprocess, mean=p.mean, std=p.std))
    raise UserError(
        f"{source} holds a network for task {found.task!r} with head {found.head!r}; ask for those, not for "
        f"{wanted.task!r}{f' with head {wanted.head!r}' if wanted.head else ''}."
    )
