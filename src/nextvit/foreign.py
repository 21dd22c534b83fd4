"""Networks of others, as classifiers and as backbones: timm's (`timm:NAME`), and the paper's peers that timm lacks
(`peer:NAME`).
"""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.metadata import Interpolation, Metadata, Preprocess

TIMM, PEER = "timm:", "peer:"  # before the name of a network
STRIDES = (4, 8, 16, 32)
PROBE = 192, 256  # pixels, high and wide: not what any network is made for, because dense tasks take every size
BODY = "body."  # before the names of a classifier's own tensors
FAULTS = (RuntimeError, ValueError, AttributeError, AssertionError, TypeError)  # of networks that cannot do it


def is_foreign(name: str) -> bool:
    return name.startswith((TIMM, PEER))


class ForeignClassifier(nn.Module):
    """(B, in_channels, H, W) -> (B, classes) logits; networks with a fixed size take images of the record's."""

    def __init__(self, metadata: Metadata):
        super().__init__()
        self.metadata = metadata
        size = metadata.preprocess.image_size
        if metadata.variant.startswith(TIMM):
            name, how = metadata.variant.removeprefix(TIMM), {}
            self.fixed_size = bool(_timm_record(name).get("fixed_input_size"))
            if self.fixed_size:
                how["img_size"] = size
            self.body = _timm(name, num_classes=metadata.num_classes, in_chans=metadata.in_channels, **how)
        else:
            peer = _peer(metadata.variant, metadata.in_channels)
            self.fixed_size = False
            self.body = peer.make(metadata.num_classes, size)

    def forward(self, x: Tensor) -> Tensor:
        size = self.metadata.preprocess.image_size
        if self.fixed_size and x.shape[2:] != (size, size):
            raise UserError(
                f"{self.metadata.variant} takes images of {size} x {size} pixels as it is, and not of {x.shape[2]} x "
                f"{x.shape[3]}; give its size, or --image-size where there is one."
            )
        logits: Tensor = self.body(x)
        return logits

    def of_size(self, image_size: int, *, fresh: bool = False) -> "ForeignClassifier":
        """The same for images of this size, its position tables resampled; itself where it has none. fresh: it has not
        learnt anything yet, so tables that cannot be resampled are drawn anew.
        """
        body: Any = self.body
        resampled = hasattr(body, "of_size")
        if not (self.fixed_size or resampled) or image_size == self.metadata.preprocess.image_size:
            return self
        metadata = self.metadata.with_image_size(image_size)
        other = ForeignClassifier(metadata)
        if resampled:
            other.body = body.of_size(image_size)
            return other.train(self.training)
        drawn = other.state_dict()
        kept = {
            key: value for key, value in self.state_dict().items() if key in drawn and value.shape == drawn[key].shape
        }
        if len(kept) < len(drawn) and not fresh:
            raise UserError(
                f"{metadata.variant} has tables of positions for {self.metadata.preprocess.image_size} pixels; it is "
                f"used at that size, and not at {image_size}."
            )
        other.load_state_dict(drawn | kept)
        return other.train(self.training)


class ForeignMaps(nn.Module):
    """(B, in_channels, H, W) -> four maps (B, C, H / stride, W / stride) of `widths` channels, finest first."""

    def __init__(self, name: str, in_channels: int = 3):
        super().__init__()
        if name.startswith(TIMM):
            self.body, self.widths = _timm_maps(name, in_channels)
        else:
            self.body, self.widths = _peer_maps(name, in_channels)
        with torch.no_grad():
            first = self._maps(torch.zeros(1, in_channels, *PROBE))[0]
        self.channels_last = first.shape[2:] != tuple(side // STRIDES[0] for side in PROBE)  # Swin's: (B, H, W, C)
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self._maps(x)
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps

    def _maps(self, x: Tensor) -> list[Tensor]:
        body: Any = self.body
        return list(body.maps(x) if hasattr(body, "maps") else body(x))


def preprocess_of(name: str) -> Preprocess:
    """How the network's images are prepared: as timm records it, or as the paper's Table 4 has it."""
    if name.startswith(PEER):
        return Preprocess(image_size=_peer(name, 3).image_size)
    record = _timm_record(name.removeprefix(TIMM))
    way = record["interpolation"]
    return Preprocess(
        image_size=record["input_size"][-1],
        crop=record["crop_pct"],
        interpolation=way if way in get_args(Interpolation) else "bicubic",
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
    )


def note_of(name: str) -> str:
    """What is to be known before a network is taken for the one of its name."""
    return _peer(name, 3).note if name.startswith(PEER) else ""


def ends_of(name: str) -> tuple[str, tuple[str, ...]]:
    """Of a classifier's tensors, the first filter, and the layers that give its classes."""
    if name.startswith(PEER):
        return "", (BODY + _peer(name, 3).last,)
    record = _timm_record(name.removeprefix(TIMM))
    first, last = record["first_conv"], record["classifier"]
    first = first if isinstance(first, str) else first[0]
    return f"{BODY}{first}.weight", tuple(BODY + layer for layer in ((last,) if isinstance(last, str) else last))


def renamed_foreign(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's tensors by our names, of a file of ours or of timm's own."""
    if any(key.startswith(BODY) for key in tensors):
        return dict(tensors)
    return {BODY + key: tensor for key, tensor in tensors.items()}


def from_classifier(tensors: Mapping[str, Tensor], backbone: ForeignMaps) -> dict[str, Tensor]:
    """The backbone's tensors among those of a classifier of the same name; timm's have dots there for some `_`."""
    same = {key.removeprefix(BODY).replace(".", "_"): tensor for key, tensor in tensors.items()}
    wanted = {key: key.removeprefix(BODY).replace(".", "_") for key in backbone.state_dict()}
    return {key: same[name] for key, name in wanted.items() if name in same}


# ---- timm's ----------------------------------------------------------------------------------------------------------


def _timm_record(name: str) -> dict[str, Any]:
    """What timm tells of the usual weights of a network of its."""
    timm = need("timm", extra="peers")
    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}; timm.list_models() names those that it has.")
    record: dict[str, Any] = timm.get_pretrained_cfg(name).to_dict()
    return record


def _timm(name: str, **how: Any) -> nn.Module:
    timm = need("timm", extra="peers")
    try:
        network: nn.Module = timm.create_model(name, **how)
    except FAULTS as error:
        asked = ", ".join(f"{key}={value}" for key, value in how.items())
        raise UserError(f"timm cannot make {name} with {asked}: {error}.") from error
    return network


def _timm_maps(name: str, in_channels: int) -> tuple[nn.Module, tuple[int, ...]]:
    short = name.removeprefix(TIMM)
    how = {"strict_img_size": False} if _timm_record(short)["architecture"].startswith("swin") else {}
    timm = need("timm", extra="peers")
    try:
        strides = timm.create_model(short, features_only=True).feature_info.reduction()
        last = {stride: index for index, stride in enumerate(strides)}
        if not last.keys() >= set(STRIDES):
            raise ValueError(f"its maps are at strides {', '.join(map(str, last))}")
        indices = tuple(last[stride] for stride in STRIDES)
        body = timm.create_model(short, features_only=True, out_indices=indices, in_chans=in_channels, **how).eval()
        with torch.no_grad():
            body(torch.zeros(1, in_channels, *PROBE))
    except FAULTS as error:
        raise UserError(
            f"{name} gives no maps at strides 4, 8, 16, 32 of images of any size: {str(error).rstrip('.')}."
        ) from error
    return body, tuple(body.feature_info.channels())


# ---- the paper's peers -----------------------------------------------------------------------------------------------


def _peer(name: str, in_channels: int) -> Any:
    from nextvit.peers import PEERS

    if (short := name.removeprefix(PEER)) not in PEERS:
        raise UserError(f"there is no peer {short!r}; take one of {', '.join(PEERS)}.")
    if in_channels != 3:
        raise UserError(f"{name} takes 3 input channels, not {in_channels}.")
    return PEERS[short]


def _peer_maps(name: str, in_channels: int) -> tuple[nn.Module, tuple[int, ...]]:
    peer = _peer(name, in_channels)
    body = peer.make(1, peer.image_size).eval()
    if not hasattr(body, "maps"):
        raise UserError(f"{name} gives no maps at strides 4, 8, 16, 32 of images of any size.")
    for part in ("final", "norm", "head"):  # what turns the last map into logits
        if hasattr(body, part):
            setattr(body, part, nn.Identity())
    return body, body.widths
