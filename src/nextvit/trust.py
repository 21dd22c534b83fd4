"""Files that are programs. They are opened if they were written here, by this user, or if somebody says to trust them.

Reading a `.pt2` runs what it says: torch evaluates expressions in it as Python, writes names out of it into source
code, unpickles its examples, and loads libraries that lie in it. A seal does not help, since whoever changes a file can
seal it. So what `export` wrote is remembered by its SHA-256, in the user's own cache.
"""

import hashlib
from pathlib import Path

from nextvit.errors import UserError
from nextvit.files import cache_folder


def remember(path: Path) -> None:
    """Note that a file was written here; where the cache cannot be written, it has to be trusted by hand."""
    try:
        folder = cache_folder() / "written-here"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _digest(path.read_bytes())).touch()
    except OSError:
        pass


def read_trusted(path: Path, trust: bool) -> bytes:
    """The bytes of a file that is a program. Raises UserError for one that was not written here, unless `trust`."""
    data = path.read_bytes()
    if trust or (cache_folder() / "written-here" / _digest(data)).exists():
        return data
    raise UserError(
        f"{path} was not exported on this machine by you, and opening it runs it as a program; if you know who "
        "made it, add --trust (in Python: trust=True)."
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
