"""Parity: does the exported file answer as the model does, on real images?"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources

import numpy as np
import torch
from PIL import Image

from nextvit.backbone import NextViT
from nextvit.data.demo_images import garments
from nextvit.data.images import normalise, preprocess, read_image
from nextvit.errors import UserError
from nextvit.metadata import Preprocess
from nextvit.runtime.session import Session

BOUND = 1e-4  # of the largest difference, relative to the largest output
SPREAD_BOUND = 1e-3  # of the same, relative to how much a live model's outputs vary over the images
LIVE = 1e-3  # outputs that vary less than this over the images, relative to their size, prove little


@dataclass(frozen=True)
class Parity:
    """How far the file's outputs are from the model's, over all images and sizes tried."""

    images: int
    sizes: tuple[str, ...]  # "batch x height x width"
    max_abs: float  # largest absolute difference of a logit
    mean_abs: float
    relative: float  # max_abs / largest absolute logit of the model
    bound: float  # on `relative`
    top1_agreement: float  # percent of images with the same first label
    spread: float  # standard deviation of a logit over the images, mean over the classes
    size: float  # largest absolute logit of the model

    @property
    def ok(self) -> bool:
        return self.relative <= self.bound and (not self.live or self.max_abs <= SPREAD_BOUND * self.spread)

    @property
    def live(self) -> bool:
        """False: the outputs hardly depend on the image (random weights), and agreement says little."""
        return self.spread > LIVE * self.size

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok, "live": self.live}


def compare(model: NextViT, session: Session, *, dynamic: bool) -> Parity:
    """Run both on the photographs and garments that ship here; with `dynamic` at other sizes and batches too."""
    expected, found, sizes = [], [], []
    model = copy.deepcopy(model).eval().cpu().float()
    for batch in _inputs(session.metadata.preprocess, session.metadata.in_channels, dynamic):
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(batch)).numpy().astype(np.float64))
        found.append(np.asarray(session(batch), np.float64))
        sizes.append("x".join(map(str, (batch.shape[0], *batch.shape[2:]))))
    ours, theirs = np.concatenate(expected), np.concatenate(found)
    if ours.shape[1] != session.metadata.num_classes:
        raise UserError(
            f"the model has {ours.shape[1]} outputs and its metadata {session.metadata.num_classes} classes; set "
            "model.metadata to what the model is."
        )
    difference = np.abs(ours - theirs)
    largest = float(np.abs(ours).max())
    relative = float(difference.max()) / max(largest, 1e-30)
    return Parity(
        images=len(ours),
        sizes=tuple(dict.fromkeys(sizes)),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=relative if np.isfinite(theirs).all() else float("inf"),
        bound=BOUND,
        top1_agreement=100.0 * float((ours.argmax(1) == theirs.argmax(1)).mean()),
        spread=float((expected[0] if dynamic else ours).std(axis=0).mean()),  # over images of the model's own size
        size=largest,
    )


def _inputs(p: Preprocess, channels: int, dynamic: bool) -> Iterator[np.ndarray]:
    """Batches of real images: the model's own size first; then, if dynamic, another batch, and unequal odd sides."""
    images = real_images()
    full = _with_channels(np.stack([preprocess(image, p) for image in images]), channels)
    if not dynamic:
        yield from (full[i : i + 1] for i in range(len(full)))
        return
    yield full
    yield full[:1]
    side = p.image_size
    for count, height, width in ((2, side + 32, side), (7, side + 1, side + 27)):
        resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images[-count:]]
        yield _with_channels(np.stack([normalise(np.asarray(image), p) for image in resized]), channels)


def _with_channels(batch: np.ndarray, channels: int) -> np.ndarray:
    """Repeat the colours for a model of other input channels."""
    return np.ascontiguousarray(np.tile(batch, (1, -(-channels // 3), 1, 1))[:, :channels])


def real_images() -> list[Image.Image]:
    """RGB images that ship with the package: ten garments, one a class, and nine photographs."""
    tiles = [read_image(images[0]) for images in garments("val").values()]
    folder = resources.files("nextvit.data") / "demo" / "backgrounds"
    photographs = []
    for split in ("train", "val"):
        for file in sorted((folder / split).iterdir(), key=lambda f: f.name):
            with file.open("rb") as handle, Image.open(handle) as image:
                photographs.append(read_image(image))
    return tiles + photographs
