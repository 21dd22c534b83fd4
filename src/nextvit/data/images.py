"""The one way from a file, a PIL image or an array to an upright 8-bit RGB image, and from there to the input."""

import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from nextvit.errors import UserError
from nextvit.metadata import Metadata, Preprocess

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # told by content; Pillow's other decoders stay closed
MAX_PIXELS = 64_000_000
MAX_TILED_PIXELS = 1_000_000_000  # of an image that is looked at tile by tile
MAX_SIDE = 32_768
LEAST_SIDE = 32  # of what a network takes, so of a very thin image the proportions are not kept
MAX_ASPECT = 100  # resized by its short side, a thinner image would take gigabytes

ORIENTATION = 0x0112  # in EXIF
T = Image.Transpose
UPRIGHT = {  # what makes an image of that orientation upright; from 5 on it swaps the sides
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_270,
    7: T.TRANSVERSE,
    8: T.ROTATE_90,
}

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
Draft = Callable[[int, int], tuple[float, float]]  # width and height -> the least of both that is wanted


class ImageRejected(UserError):
    """One image cannot be used; the message names it and says why."""


def read_image(
    source: ImageSource | bytes,
    *,
    name: str | os.PathLike[str] | None = None,
    draft: Draft | None = None,
    most: int = MAX_PIXELS,
) -> Image.Image:
    """An upright 8-bit RGB image.

    source: a path, a PIL image, a uint8 array (H, W, 3), or the bytes of a file, whose name is then told.
    draft: is asked once with the size of the upright image; a JPEG is then decoded at 1/2, 1/4 or 1/8 of it where that
    is still as large as wanted, which takes a fraction of the time. most: pixels that an image may have.

    EXIF orientation is applied; alpha is laid over white; 16-bit grey is scaled to 8 bits; CMYK, palette and grey are
    converted; of an animation or a multi-page file the first frame is taken. Raises ImageRejected for a file that is
    missing, truncated, of another format, or larger than `most`, 64 million pixels, before its pixels are decoded.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageRejected(f"an array image must be uint8 of shape (H, W, 3), not {source.dtype} {source.shape}.")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        try:
            return _upright_rgb(source, "the image")
        except OSError as error:
            raise ImageRejected("the image cannot be read: it is damaged or cut short.") from error
    name = printable(name if name is not None else "the image" if isinstance(source, bytes) else source)
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise ImageRejected(f"{name} is not a regular file.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below; odd EXIF and palettes are handled
            with _opened(io.BytesIO(source) if isinstance(source, bytes) else source, most) as image:
                width, height = image.size
                if width * height > most or max(width, height) > MAX_SIDE:
                    raise ImageRejected(
                        f"{name} has {width} x {height} pixels; the limit is {most // 10**6} million and {MAX_SIDE} a "
                        "side."
                    )
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ImageRejected(
                        f"{name} has {width} x {height} pixels; one side may be {MAX_ASPECT} times the other."
                    )
                if draft is not None:
                    turned = -1 if _orientation(image) >= 5 else 1
                    image.draft(None, tuple(int(side) for side in draft(*image.size[::turned])[::turned]))
                return _upright_rgb(image, name)
    except ImageRejected:
        raise
    except OSError as error:
        reason = error.strerror or (
            "it is no image" if "cannot identify" in str(error) else "it is damaged or cut short"
        )
        raise ImageRejected(f"{name} cannot be read: {reason}.") from error
    except Exception as error:  # decoders raise many kinds on crafted files
        raise ImageRejected(f"{name} cannot be read: it is damaged or not of {', '.join(FORMATS)}.") from error


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of the image as `read_image` gives it, by its header; ImageRejected where there is none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size if _orientation(image) < 5 else image.size[::-1]
    except Exception as error:  # decoders raise many kinds on crafted files
        raise ImageRejected(f"{printable(path)} cannot be read: it is damaged, or no image.") from error


def _opened(source: Any, most: int) -> Image.Image:
    """Pillow's own limit, 179 million pixels, gives way where the caller has a larger one."""
    kept = Image.MAX_IMAGE_PIXELS
    if most > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = most
    try:
        return Image.open(source, formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    if (orientation := _orientation(image)) > 1:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I"):  # 16 bits: scale, where convert() would clip to white
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((np.clip(levels, 0, 65535) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ImageRejected(f"{name} holds floating-point values, whose range is not known; save it with 8 or 16 bits.")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """By its EXIF, 1 to 8; 1 is upright. Pillow's own exif_transpose also writes EXIF anew, and odd ones break it."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF that cannot be parsed says nothing about the orientation; the pixels are good
        return 1
    return found if found in UPRIGHT else 1


def preprocess(image: Image.Image, p: Preprocess) -> np.ndarray:
    """The network's input of an RGB image: float32 (3, image_size, image_size), normalised.

    The short side is resized to `p.resize_size`, the centre cut out, values scaled to 0..1, then mean and std applied.
    With `p.long_side` the whole image is resized: see `fitted`.
    """
    if p.long_side is not None:
        return normalise(fitted(np.asarray(image), p.image_size, p.long_side), p)
    short = min(image.size)
    width, height = (max(p.image_size, int(side * p.resize_size / short)) for side in image.size)
    for size in (
        (width, image.height),
        (width, height),
    ):  # columns, then rows: left alone, the order is Pillow's choice
        if size != image.size:
            image = image.resize(size, Image.Resampling[p.interpolation.upper()])
    left, top = round((width - p.image_size) / 2), round((height - p.image_size) / 2)
    image = image.crop((left, top, left + p.image_size, top + p.image_size))
    return normalise(np.asarray(image), p)


def fitted(image: np.ndarray, short: int, long: int) -> np.ndarray:
    """uint8 (H, W, 3) -> the same, as large as fits into short x long pixels, either way round.

    Bilinear without a filter against aliasing, rounded to levels: OpenCV's, which the dense networks were trained with.
    """
    height, width = image.shape[:2]
    factor = min(long / max(height, width), short / min(height, width))
    size = tuple(max(LEAST_SIDE, int(side * factor + 0.5)) for side in (height, width))
    if size == (height, width):
        return image
    levels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    found = F.interpolate(levels, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    return found.round().to(torch.uint8).numpy()


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) -> uint8 of `size`, each pixel the one that its upper left corner lies in."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, labels.shape, strict=True))
    return labels[rows[:, None], columns]


def centre(x: np.ndarray, side: int, fill: float) -> np.ndarray:
    """(..., H, W) -> (..., side, side): the middle of it; where it is smaller, `fill` below and to the right."""
    height, width = x.shape[-2:]
    top, left = max(height - side, 0) // 2, max(width - side, 0) // 2
    part = x[..., top : top + side, left : left + side]
    found = np.full((*x.shape[:-2], side, side), fill, x.dtype)
    found[..., : part.shape[-2], : part.shape[-1]] = part
    return found


def as_taken(image: Image.Image, metadata: Metadata) -> np.ndarray:
    """What a file takes of an RGB image: float32 (3, image_size, image_size), or the uint8 (H, W, 3) that it is."""
    return np.array(image) if metadata.takes_pixels else preprocess(image, metadata.preprocess)


def normalise(pixels: np.ndarray, p: Preprocess) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W), scaled to 0..1, then mean and std."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    tables = [(levels - np.float32(mean)) / np.float32(std) for mean, std in zip(p.mean, p.std, strict=True)]
    return np.stack([table[pixels[:, :, channel]] for channel, table in enumerate(tables)])


def pixels(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """float32 (3, H, W), normalised -> uint8 (H, W, 3): what preprocessing had before it normalised."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    values: np.ndarray = np.rint((image * std + mean) * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return values


def printable(path: str | os.PathLike[str]) -> str:
    """A file name that can be shown: control characters and bytes that are no text are escaped."""
    text = os.fspath(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def image_files(folder: Path) -> list[Path]:
    """All files below a folder, by name; hidden ones and those in hidden folders are left out, links not followed."""
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in sorted(files) if not name.startswith(".")]
    return found
