"""The images that ship with the package, laid out as a user's own: folders of classes, made once in the cache."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

from PIL import Image

from nextvit import __version__
from nextvit.errors import UserError
from nextvit.files import cache_folder

TILE = 28  # pixels
TILES_A_ROW = 40
VALIDATION_SHARE = 16  # every 16th training image of a class selects the best epoch; `test` is never looked at


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache; `write` fills it at first use, and it appears only when it is whole."""
    folder = cache_folder() / f"{name}-{__version__}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"cannot write to {folder.parent}: {error.strerror}; set NEXTVIT_CACHE to a folder."
            ) from error
        try:
            write(unfinished)
            unfinished.chmod(0o755)
            os.replace(unfinished, folder)
        except OSError as error:
            if not folder.exists():  # else: another process was quicker
                raise UserError(
                    f"cannot write to {folder.parent}: {error.strerror}; set NEXTVIT_CACHE to another folder."
                ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def demo_folder() -> Path:
    """The garment photographs as `train/`, `val/` and `test/`, each with ten class folders.

    7,500 + 500 images are the package's training sheets, 2,000 (`test`) its validation sheets, which come from another
    split of the photographs.
    """
    return made_once("demo", _write)


def _write(folder: Path) -> None:
    for split in ("train", "val"):
        for label, tiles in garments(split).items():
            for index, tile in enumerate(tiles):
                into = "test" if split == "val" else "train" if index % VALIDATION_SHARE else "val"
                path = folder / into / label / f"{index:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                tile.save(path)


@cache
def garments(split: str) -> dict[str, list[Image.Image]]:
    """Grey 28 x 28 photographs of each class, cut out of the contact sheets of `split` ("train" or "val")."""
    sheets = resources.files("nextvit.data") / "demo" / "garments" / split
    found = {}
    for sheet in sorted(sheets.iterdir(), key=lambda s: int(s.name.partition("_")[0])):
        with sheet.open("rb") as file, Image.open(file) as image:
            rows = image.height // TILE
            boxes = ((x * TILE, y * TILE) for y in range(rows) for x in range(TILES_A_ROW))
            found[sheet.name.removesuffix(".png").partition("_")[2]] = [
                image.crop((x, y, x + TILE, y + TILE)) for x, y in boxes
            ]
    return found
