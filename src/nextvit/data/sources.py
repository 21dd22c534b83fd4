"""What `nextvit predict` is given: files, folders and globs, each file once, in order."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from nextvit.data.images import image_files
from nextvit.errors import UserError


def expand(sources: Sequence[str]) -> list[Path]:
    """All files of the sources. A folder means every file below it; a name with *, ? or [ that is no file is a glob.

    A file that is named and missing stays in the list, so that it is reported as an error of its own.
    """
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = image_files(path)
        elif not os.path.lexists(source) and glob.has_magic(source):
            files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if not Path(name).is_dir()]
        else:
            files = [path]
        if not files:
            raise UserError(f"{source} holds no files.")
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())
