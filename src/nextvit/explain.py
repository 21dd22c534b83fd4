"""What a network looks at, and in which frequencies (paper, 4.4 and Figure 5): heat maps and Fourier spectra."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nextvit.backbone import EMHSA, NTB, NextViT, SequencePool
from nextvit.data.images import pixels, preprocess
from nextvit.errors import UserError
from nextvit.extras import need
from nextvit.foreign import ForeignMaps
from nextvit.metadata import Metadata
from nextvit.networks import Network, as_asked, backbone_of
from nextvit.tasks.detect import prepared

GRID = 33  # frequencies that a spectrum is told at, from 0 to pi
LEAST = -16.0  # logarithm of a share of the mean: below it is what float32 rounds
PLACES = 9  # that a map needs for a heat map to say where


class NotFound(UserError):
    """The model does not give the answer that is to be explained."""


@dataclass(frozen=True)
class Point:
    """A place in a network where maps can be looked at."""

    name: str  # "stage 3"; within its last NTB "stage 3, E-MHSA"
    module: str  # by the network's names
    channels: int | None  # of its map; None: of the second axis


@dataclass(frozen=True)
class Spectrum:
    """How strong the frequencies of a map are, relative to its mean."""

    point: str
    frequencies: np.ndarray  # (GRID,): shares of pi a pixel of the map
    log_amplitude: np.ndarray  # (GRID,): natural logarithm, less that at frequency 0


@dataclass(frozen=True)
class Heat:
    """What in an image speaks for an answer."""

    picture: np.ndarray  # uint8 (H, W, 3): the image as the network sees it
    answer: str  # the class, and how sure the network is where it says so
    evidence: np.ndarray  # float32 (H, W), 0 to 1: HiResCAM
    attention: np.ndarray | None  # float32 (H, W), 0 to 1: what E-MHSA's queries attend to; None: there is none


# ---- places ----------------------------------------------------------------------------------------------------------


def points_of(network: Network) -> list[Point]:
    """The stages of a network, finest first, and the two branches of the last NTB of each.

    UserError where timm does not tell which modules they are.
    """
    backbone = backbone_of(network)
    before = "" if backbone is network else "backbone."
    if isinstance(backbone, NextViT):
        return _of_next_vit(backbone, before)
    body: Any = backbone.body
    if isinstance(backbone, ForeignMaps) and not hasattr(body, "stages"):  # timm's backbones keep what they give
        places = [(info["module"].replace(".", "_"), info["num_chs"]) for info in body.feature_info.get_dicts()]
    elif hasattr(body, "feature_info"):
        places = [(info["module"], info["num_chs"]) for info in body.feature_info]
    else:
        places = [(f"stages.{number}", width) for number, width in enumerate(getattr(body, "widths", ()))]
    there = dict(body.named_modules())
    known = [(name, channels) for name, channels in dict(places).items() if name in there]
    if not known:
        raise UserError(f"{network.metadata.variant} does not tell where its stages are, so they cannot be looked at.")
    return [Point(f"stage {n}", f"{before}body.{name}", channels) for n, (name, channels) in enumerate(known, 1)]


def _of_next_vit(backbone: NextViT, before: str) -> list[Point]:
    found = []
    for number, stage in enumerate(backbone.stages):
        blocks: Any = stage.blocks
        last = max((index for index, block in enumerate(blocks) if isinstance(block, NTB)), default=None)
        if last is not None:
            at = f"{before}stages.{number}.blocks.{last}"
            branches = (("E-MHSA", "e_mhsa"), ("MHCA", "mhca"))
            found += [
                Point(f"stage {number + 1}, {name}", f"{at}.{module}", None)
                for name, module in branches
                if getattr(blocks[last], module) is not None
            ]
        found.append(Point(f"stage {number + 1}", f"{before}stages.{number}", None))
    return found


class Tap(nn.Module):
    """A module whose output passes, as maps (B, C, H, W), through `maps`, where it can be looked at."""

    def __init__(self, module: nn.Module, point: Point, prefix: int):
        super().__init__()
        self.module, self.point, self.prefix = module, point, prefix
        self.maps = nn.Identity()

    def forward(self, *inputs: Any) -> Any:
        x = self.module(*inputs)
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            raise UserError(f"{self.point.name} gives no maps, so it cannot be looked at.")
        if x.ndim == 3:  # tokens, perhaps behind some that stand for no place
            side = round((x.shape[1] - self.prefix) ** 0.5)
            if side * side + self.prefix != x.shape[1]:
                raise UserError(f"{self.point.name} gives tokens of no square image; take one of the network's size.")
            own = self.maps(x[:, self.prefix :].transpose(1, 2).unflatten(2, (side, side)))
            return torch.cat([x[:, : self.prefix], own.flatten(2).transpose(1, 2)], dim=1)
        if self.point.channels not in (None, x.shape[1]) and x.shape[3] == self.point.channels:
            return self.maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.maps(x)


@contextmanager
def tapped(network: Network, points: Sequence[Point]) -> Iterator[list[Tap]]:
    """The network with a tap behind each of the places, for a while."""
    body: Any = getattr(backbone_of(network), "body", None)
    prefix = int(getattr(body, "num_prefix_tokens", 0) or 0)
    places = [(*point.module.rpartition(".")[::2], point) for point in points]
    owners = [(network.get_submodule(owner), name, point) for owner, name, point in places]
    taps = [Tap(getattr(owner, name), point, prefix) for owner, name, point in owners]
    try:
        for (owner, name, _), tap in zip(owners, taps, strict=True):
            setattr(owner, name, tap)
        yield taps
    finally:
        for (owner, name, _), tap in zip(owners, taps, strict=True):
            setattr(owner, name, tap.module)


# ---- frequencies -----------------------------------------------------------------------------------------------------


def log_amplitude(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (shares of pi a pixel) and the mean logarithm of their amplitudes less that at frequency 0.

    Of maps (B, C, H, W), cut to a square, along the diagonal of the two-dimensional transform, as in "How Do Vision
    Transformers Work?" (arXiv 2202.06709, Figure 2): the mean of logarithms over images and channels.
    """
    side = min(maps.shape[2:])
    top, left = ((length - side) // 2 for length in maps.shape[2:])
    square = maps[:, :, top : top + side, left : left + side].double()
    amplitude = torch.fft.fft2(square).abs()
    half = torch.arange(side // 2 + 1, device=maps.device)
    diagonal = amplitude[:, :, half, half].clamp_min(torch.finfo(torch.float32).tiny).log().mean((0, 1))
    return (2 * half / side).cpu().numpy(), (diagonal - diagonal[0]).clamp_min(LEAST).cpu().numpy()


def spectra(network: Network, images: Iterable[Image.Image]) -> list[Spectrum]:
    """Of each place of a network, the mean over images; up to the highest frequency that its maps have."""
    points = points_of(network)
    grid = np.linspace(0, 1, GRID)
    seen: dict[str, list[np.ndarray]] = {point.name: [] for point in points}
    network.eval()

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if min(output.shape[2:]) > 1:
                seen[name].append(np.interp(grid, *log_amplitude(output), right=np.nan))  # odd sides have no pi

        return hook

    with tapped(network, points) as taps, torch.no_grad():
        for tap in taps:
            tap.maps.register_forward_hook(look(tap.point.name))
        asked = as_asked(network)
        for image in images:
            asked(torch.from_numpy(_input(image, network.metadata)))
    found = []
    for name, values in seen.items():
        if values:
            mean = np.mean(values, axis=0)
            known = np.isfinite(mean)
            found.append(Spectrum(name, grid[known], mean[known]))
    return found


# ---- evidence --------------------------------------------------------------------------------------------------------


def heat(network: Network, image: Image.Image, *, label: str | None = None, stage: int | None = None) -> Heat:
    """HiResCAM (arXiv 2011.08891, by captum) of an image's answer, and what E-MHSA attends to.

    It is each map times how the answer changes with it, place by place, summed over channels, where Grad-CAM takes the
    mean change of a map; behind a last stage, whose maps are averaged, both are the same.

    label: the class that evidence is shown for; None: the network's own answer, of a segmenter the class of most
    pixels, of a detector its surest object. stage: whose maps are weighed, from 1; None: the last one of a classifier,
    the third of dense networks, or an earlier one where the image is small and these have few places. UserError for a
    class that the model does not know; NotFound, one of these, for one that it does not find on the image.
    """
    m = network.metadata
    number = _class_of(m, label)
    network.eval()
    x = torch.from_numpy(_input(image, m))
    score, answer = _objective(network, x, number)
    stages = [point for point in points_of(network) if "," not in point.name]
    wanted = stage or _usual_stage(network, x, stages)
    if not 1 <= wanted <= len(stages):
        raise UserError(f"there is no stage {wanted}; {m.variant} has stages 1 to {len(stages)}.")
    with tapped(network, [stages[wanted - 1]]) as (tap,):
        weighed = need("captum.attr", extra="explain").LayerGradientXActivation(score, tap.maps)
        evidence = weighed.attribute(x).detach().sum(1).clamp_min(0)
    picture = pixels(x[0].numpy()[:3], m.preprocess) if m.in_channels == 3 else np.zeros((*x.shape[2:], 3), np.uint8)
    attention = attention_received(network, x)
    return Heat(picture, answer, _shown(evidence, x), None if attention is None else _shown(attention, x))


def _usual_stage(network: Network, x: Tensor, stages: Sequence[Point]) -> int:
    """The last stage of a classifier, the third of dense networks; the last before it with PLACES, if it has not."""
    last = len(stages) if network.metadata.task == "classify" else min(3, len(stages))
    body: Any = getattr(backbone_of(network), "body", None)
    if getattr(body, "num_prefix_tokens", 0) and getattr(body, "global_pool", "") == "token":
        last -= 1  # behind the last block only the class token is read
    places: list[int] = []
    with tapped(network, stages[:last]) as taps, torch.no_grad():
        for tap in taps:
            tap.maps.register_forward_hook(lambda module, inputs, output: places.append(output[0, 0].numel()))
        as_asked(network)(x)
    return max((number for number, count in enumerate(places, 1) if count >= PLACES), default=1)


def attention_received(network: Network, x: Tensor) -> Tensor | None:
    """(B, H, W): of the last E-MHSA, how much each place is attended to, the mean over heads and queries."""
    found: list[Tensor] = []
    modules = [module for module in network.modules() if isinstance(module, EMHSA)]
    if not modules:
        return None

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(received(modules[-1], inputs[0]))

    handle = modules[-1].register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            as_asked(network)(x)
    finally:
        handle.remove()
    return found[0]


def received(attention: EMHSA, x: Tensor) -> Tensor:
    """(B, C, H, W), what E-MHSA is given -> (B, H, W): the mean weight of each place among all keys' tokens."""
    height, width = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2)
    pooled = attention.norm(attention.pool(x)).transpose(1, 2)
    q, k = attention.heads(attention.q(tokens)), attention.heads(attention.k(pooled))
    weights = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1).mean((1, 2))  # (B, M)
    if isinstance(attention.pool, SequencePool):
        every = weights.repeat_interleave(attention.pool.reduction**2, dim=1)
        return F.pad(every, (0, height * width - every.shape[1])).unflatten(1, (height, width))
    reduction = int(getattr(attention.pool, "reduction", 1))
    grid = weights.unflatten(1, (-(-height // reduction), -1))
    return grid.repeat_interleave(reduction, 1).repeat_interleave(reduction, 2)[:, :height, :width]


def _class_of(m: Metadata, label: str | None) -> int | None:
    if label is None:
        return None
    if label in m.labels:
        return m.labels.index(label)
    if label.isdecimal() and int(label) < m.num_classes:
        return int(label)
    known = ", ".join(m.labels[:8]) + (" and others" if len(m.labels) > 8 else "")
    raise UserError(f"the model knows no class {label!r}; it knows {known or f'the numbers below {m.num_classes}'}.")


def _objective(network: Network, x: Tensor, number: int | None) -> tuple[Callable[[Tensor], Tensor], str]:
    """What speaks for the answer, as a function of the image, and the answer."""
    m, asked = network.metadata, as_asked(network)
    with torch.no_grad():
        first = asked(x)
    if m.task == "classify":
        chosen = int(first[0].argmax()) if number is None else number
        sure = float(first[0].softmax(0)[chosen])
        return lambda images: asked(images)[:, chosen], f"{_label(m, chosen)} {sure:.0%}"
    if m.task == "segment":
        there = first[0].argmax(0)
        chosen = int(there.flatten().bincount().argmax()) if number is None else number
        mask = there == chosen
        if not mask.any():
            raise NotFound(f"no pixel is {_label(m, chosen)} to the model")
        share = float(mask.double().mean())
        return lambda images: asked(images)[:, chosen][:, mask].mean(
            1
        ), f"{_label(m, chosen)}, {share:.0%} of the pixels"
    labels = first[0]["labels"]
    own = range(len(labels)) if number is None else (labels == number).nonzero()[:, 0].tolist()
    if not len(own):
        raise NotFound(f"the model finds no {'object' if number is None else _label(m, number)} on it")
    index = own[0]  # by falling score
    sure = float(first[0]["scores"][index])
    return lambda images: asked(images)[0]["scores"][index : index + 1], f"{_label(m, int(labels[index]))} {sure:.0%}"


def _label(m: Metadata, number: int) -> str:
    return m.labels[number] if m.labels else f"class {number}"


def _input(image: Image.Image, m: Metadata) -> np.ndarray:
    """float32 (1, C, H, W)."""
    x = prepared(image, m)[0] if m.task == "detect" else preprocess(image, m.preprocess)[None]
    return np.ascontiguousarray(np.tile(x, (1, -(-m.in_channels // 3), 1, 1))[:, : m.in_channels])


def _shown(maps: Tensor, x: Tensor) -> np.ndarray:
    """(1, h, w) -> (H, W) as the image, from 0 to 1."""
    found = F.interpolate(maps[:, None].float(), x.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    found = found - found.min()
    if found.max() <= 1e-4 * maps.abs().max():  # the same everywhere, but for rounding
        return np.zeros(found.shape, np.float32)
    values: np.ndarray = (found / found.max()).numpy()
    return values
