"""Public sets of images, fetched by torchvision and laid out as `train` takes them."""

import os
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nextvit.errors import DiskFull, UserError
from nextvit.extras import need
from nextvit.files import FULL, cache_folder, replacing
from nextvit.progress import say, track

HELD_OUT = 5  # of a set without a val split every fifth training image of a class validates
Placed = tuple[Path, Path]  # a file, and where in the new folder it belongs


def fetch(name: str, folder: Path) -> dict[str, int]:
    """Fetch the set `name` of SETS into the new folder `folder`, and return the number of images of each split.

    Archives are kept in the cache until all is done, so that a call that was interrupted goes on. Raises UserError
    where there is no such set, where something lies at `folder`, or where the archives cannot be had.
    """
    if name not in SETS:
        raise UserError(f"there is no set {name!r}; take one of {', '.join(SETS)}.")
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists; choose another --output.")
    datasets = need("torchvision.datasets", extra="train")
    need("scipy", extra="train")  # what Flowers-102 keeps its labels for
    root = cache_folder() / "downloads" / name
    say(f"fetching {name} by way of {root} ...")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lay_out, unpacked = SETS[name]
        for part in unpacked:  # by a call that was interrupted, perhaps not whole; torchvision would not look
            shutil.rmtree(root / part, ignore_errors=True)
        found = list(lay_out(datasets, root))
    except (OSError, RuntimeError, HTTPException, EOFError, tarfile.TarError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFull(f"{root} cannot hold {name}: {error.strerror}; make room, or set NEXTVIT_CACHE.") from error
        why = (str(error).splitlines() or [""])[0].strip("<>") or type(error).__name__
        raise UserError(
            f"{name} cannot be fetched ({why}); it needs a network. Run the same again to go on, or lay out images of "
            "your own as docs/train.md says."
        ) from error
    counts: Counter[str] = Counter()
    with replacing(folder) as unfinished:
        for source, place in track(found, total=len(found), label="lay out", unit="files"):
            (unfinished / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, unfinished / place)
            counts[place.parts[0]] += 1
    shutil.rmtree(root, ignore_errors=True)
    return dict(counts)


def _imagenette(datasets: Any, root: Path) -> Iterator[Placed]:
    """Ten classes of ImageNet; 9,469 + 3,925 images."""
    for split in ("train", "val"):
        found = datasets.Imagenette(root, split=split, download=True)
        for path, target in found._samples:
            yield Path(path), Path(split, found.classes[target][0], Path(path).name)


def _flowers102(datasets: Any, root: Path) -> Iterator[Placed]:
    """102 kinds of flowers; 1,020 + 1,020 images, and 6,149 to test."""
    for split in ("train", "val", "test"):
        found = datasets.Flowers102(root, split=split, download=True)
        for path, target in zip(found._image_files, found._labels, strict=True):
            yield Path(path), Path(split, found.classes[target].replace("/", "-"), Path(path).name)


def _pets(datasets: Any, root: Path) -> Iterator[Placed]:
    """37 breeds of cats and dogs; 3,680 images to train and validate on, 3,669 to test, each with its mask.

    Masks: 1 the animal, 2 the background, 3 the edge between them.
    """
    for split in ("trainval", "test"):
        found = datasets.OxfordIIITPet(root, split=split, download=True)
        seen: dict[int, int] = defaultdict(int)
        for path, mask, target in zip(found._images, found._segs, found._labels, strict=True):
            seen[target] += 1
            own = "test" if split == "test" else "val" if seen[target] % HELD_OUT == 0 else "train"
            place = Path(own, found.classes[target], Path(path).name)
            yield Path(path), place
            yield Path(mask), Path("masks", place).with_suffix(".png")


SETS = {  # and where torchvision unpacks them
    "imagenette": (_imagenette, ["imagenette2"]),
    "flowers102": (_flowers102, ["flowers-102/jpg"]),
    "pets": (_pets, ["oxford-iiit-pet/images", "oxford-iiit-pet/annotations"]),
}
