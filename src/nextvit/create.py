"""create_model and list_models: from a name, and perhaps a weight file, to a network with its metadata."""

import difflib
from dataclasses import replace
from pathlib import Path

import torch

from nextvit import imagenet
from nextvit.backbone import NextViT
from nextvit.errors import UserError
from nextvit.metadata import Metadata
from nextvit.spec import KV_POOLINGS, VARIANTS, KvPooling, Variant
from nextvit.weights import (
    FIRST_FILTER,
    HEAD,
    WeightFile,
    adapt_first_filter,
    adapt_head,
    load_into,
    model_tensors,
    read_weights,
    rename,
    resolve,
)


def list_models() -> list[str]:
    """Names of the variants, smallest first."""
    return [variant.name for variant in VARIANTS]


def variant_named(name: str) -> Variant:
    """The row of the variant table; an unknown name raises UserError and offers the nearest names."""
    for variant in VARIANTS:
        if variant.name == name:
            return variant
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4) or list_models()
    raise UserError(f"there is no model {name!r}; did you mean {' or '.join(near)}?")


def create_model(
    name: str,
    *,
    weights: str | Path | WeightFile | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    features_only: bool = False,
    drop_path_rate: float | None = None,
    kv_pooling: KvPooling = "sequence",
) -> NextViT:
    """Build a Next-ViT: (B, in_channels, H, W) float -> (B, num_classes) logits.

    weights: None (random), a file (official .pth, timm .pth or .safetensors, our own .safetensors or .ckpt; or what
        `weights.read_weights` gave), a published tag ("in1k", "in1k_384", "in1k_6m", "in1k_6m_384"), or
        "hf-hub:org/name".
    num_classes: None: as the weights have it, else 1000. Another count than the weights': the last layer is new.
    features_only: forward returns the four raw stage outputs at strides 4, 8, 16, 32, without the final norm.
    drop_path_rate: stochastic depth at the last block; None: the variant's own.
    kv_pooling: "sequence", as the published weights were trained, or "spatial", true 2-D average pooling.

    `model.metadata` holds the labels and the preprocessing that go with it. Raises UserError (a ValueError) for an
    unknown name, and for weights that cannot be read or do not fit; then nothing was loaded.
    """
    variant = variant_named(name)
    if kv_pooling not in KV_POOLINGS:
        raise UserError(f"there is no kv_pooling {kv_pooling!r}; take one of {', '.join(KV_POOLINGS)}.")
    for value, what in ((num_classes, "num_classes"), (in_channels, "in_channels")):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{what} must be a whole number, 1 or more, not {value!r}.")
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise UserError(f"drop_path_rate must be 0 or more and below 1, not {drop_path_rate}.")
    metadata = Metadata(name, kv_pooling=kv_pooling, in_channels=in_channels)
    found = None
    if weights is not None:
        preprocess = None
        if isinstance(weights, WeightFile):
            file = weights
        else:
            path, preprocess = resolve(name, weights)
            file = read_weights(path)
        if file.metadata is not None:
            metadata = _agreeing(file.metadata, name, kv_pooling, file.source)
        elif preprocess is not None:
            metadata = replace(metadata, preprocess=preprocess)
        found = rename(model_tensors(file), variant, file.source)
    if num_classes is None:
        num_classes = len(found[f"{HEAD}.bias"]) if found is not None and f"{HEAD}.bias" in found else 1000
    model = NextViT(
        variant,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
        drop_path_rate=drop_path_rate,
        kv_pooling=kv_pooling,
    )
    if found is not None:
        if features_only:
            found = {key: tensor for key, tensor in found.items() if not key.startswith(("norm.", "head."))}
        adapt_first_filter(found, in_channels, file.source)
        adapt_head(found, model, file.source)
        load_into(model, found, file.source, name)
    if num_classes != metadata.num_classes:
        metadata = replace(metadata, labels=())
    elif found is not None and file.metadata is None:
        metadata = replace(metadata, labels=imagenet.labels())
    model.metadata = replace(metadata, num_classes=num_classes, in_channels=in_channels)
    return model.to(memory_format=torch.channels_last)  # as the forward pass wants its filters


def open_checkpoint(path: str | Path) -> NextViT:
    """The network of a weight file, built as its metadata says; without metadata, as its tensors do."""
    return model_of(read_weights(path))


def model_of(file: WeightFile) -> NextViT:
    """The same of a file that was read already."""
    if file.metadata is not None:
        m = file.metadata
        return create_model(m.variant, weights=file, in_channels=m.in_channels, kv_pooling=m.kv_pooling)
    variant = variant_of(file)
    if variant is None:
        names = ", ".join(list_models())
        raise UserError(f"{file.source} fits none of {names}; `nextvit info {file.source}` shows what it holds.")
    return create_model(variant.name, weights=file, in_channels=file.tensors[FIRST_FILTER].shape[1])


def variant_of(file: WeightFile) -> Variant | None:
    """The variant whose names and shapes a file has, its classes and input channels aside; None: it is none of ours."""
    for variant in VARIANTS:
        try:
            found = rename(model_tensors(file), variant, file.source)
        except UserError:
            return None
        with torch.device("meta"):
            wanted = NextViT(variant).state_dict()
        free = (FIRST_FILTER, f"{HEAD}.weight", f"{HEAD}.bias")
        if found.keys() == wanted.keys() and all(found[k].shape == wanted[k].shape for k in wanted if k not in free):
            return variant
    return None


def _agreeing(found: Metadata, name: str, kv_pooling: str, source: str) -> Metadata:
    """The file's own record, once it is clear that it is about the network that was asked for."""
    if found.variant != name:
        raise UserError(f"{source} holds {found.variant} and {name} was asked for; ask for {found.variant}.")
    if found.kv_pooling != kv_pooling:
        raise UserError(f"{source} was trained with kv_pooling={found.kv_pooling!r}; ask for that.")
    return found
