"""Writing that a crash cannot spoil, and a seal that finds a flipped bit."""

import csv
import errno
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextvit.errors import DiskFull, UserError

SEAL = "nextvit-sha256:"
FOLDERS = (".mlpackage", ".aimodel")  # formats that are a folder of files
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OPEN_SEAL = SEAL + "0" * 64  # written with the file's metadata; close_seal() puts the digest in its place


@contextmanager
def replacing(path: str | os.PathLike[str], *, size: int = 0) -> Iterator[Path]:
    """Give a path in a hidden folder beside `path`; what lies there takes its final place only if all went well.

    Companions written beside it (the `.bin` of an OpenVINO `.xml`) are moved first, the file itself last. Formats that
    are a folder of files (FOLDERS) are moved whole. size: bytes that it will have, where that is known, to be told with
    DiskFull.
    """
    final = Path(path)
    if final.is_dir() and not (final.suffix in FOLDERS and (not any(final.iterdir()) or _digest(final)[1])):
        raise UserError(f"{final} is a folder, and none that nextvit wrote; choose another place.")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}; choose another place.") from error
    try:
        yield folder / final.name
        written = sorted(folder.iterdir(), key=lambda p: p.name == final.name)
        for file in (part for item in written for part in parts(item)):
            file.chmod(0o666 & ~_umask())  # some writers make their files private
            _sync(file)
        for number, item in enumerate(written):
            place = final.parent / item.name
            if place.is_dir():  # a folder cannot be replaced in one step; what it held is removed with `folder`
                os.replace(place, folder / f"before-{number}")
            os.replace(item, place)
        _sync(final.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        needed = f"; it needs {size / 1e6:.0f} MB" if size else ""
        raise DiskFull(
            f"cannot write {final}: {error.strerror}{needed}; make room and go on, or choose another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`; nobody else may be writing there."""
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="surrogateescape")  # as file names have them


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV file of rows with the same keys, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def cache_folder() -> Path:
    """Where derived files are kept: NEXTVIT_CACHE, else XDG_CACHE_HOME/nextvit, else ~/.cache/nextvit."""
    own = os.environ.get("NEXTVIT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nextvit"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def close_seal(path: Path) -> None:
    """Put the SHA-256 of the file, and of its other parts, in the place of the OPEN_SEAL that its metadata holds."""
    digest, place = _digest(path)
    if place is None:
        raise RuntimeError(f"{path} was written without a seal")
    with open(place[0], "r+b") as file:
        file.seek(place[1])
        file.write(digest.encode())


def check_seal(path: Path) -> bool:
    """True: the seal holds. False: the file has none. UserError: the file is not as it was written."""
    digest, place = _digest(path)
    if place is None:
        return False
    with open(place[0], "rb") as file:
        file.seek(place[1])
        if file.read(64) != digest.encode():
            raise UserError(
                f"{path} is damaged: its SHA-256 is not the one it was written with; copy or make it again."
            )
    return True


def parts(path: Path) -> list[Path]:
    """The files that make one: itself, the `.bin` beside an `.xml`, or all in a folder, in a fixed order."""
    if path.is_dir():
        return sorted(part for part in path.rglob("*") if part.is_file())
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def _digest(path: Path) -> tuple[str, tuple[Path, int] | None]:
    """SHA-256 of all parts, the seal taken as zeros; and the part and the place where the seal's digits start."""
    digest, place = hashlib.sha256(), None
    for part in parts(path):
        try:
            data = bytearray(part.read_bytes())
        except OSError as error:
            if part == path:
                raise
            raise UserError(f"{part} is missing: {path.name} needs it beside itself.") from error
        found = None if place else re.search(SEAL.encode() + rb"[0-9a-f]{64}", data)
        if found:
            place = (part, found.end() - 64)
            data[place[1] : found.end()] = b"0" * 64
        if path.is_dir():
            digest.update(str(part.relative_to(path)).encode() + b"\0")
        digest.update(data)
    return digest.hexdigest(), place
