"""Files that are there whole or not at all: written beside their place, then moved to it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to; what is written there becomes the file ``path`` when the block ends.

    If the block raises, whatever was at ``path`` is as it was. A symbolic link is followed. A file
    that is replaced passes on its permissions.

    Raises:
        OSError: if ``path`` cannot be written: a missing folder, a folder or device of that name, a
            file marked read-only, a full disk. The message says which.
    """
    target = Path(os.path.realpath(path))
    try:
        _require_a_place_for_a_file(path, target)
        with tempfile.TemporaryDirectory(prefix=".oscar-kv-", dir=target.parent) as folder:
            part = Path(folder, target.name)
            part.touch()
            mode = stat.S_IMODE((target if target.exists() else part).stat().st_mode)
            yield part
            part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())  # some file systems report a full disk only now
            os.replace(part, target)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"cannot write {str(path)!r}: {reason}") from error


def _require_a_place_for_a_file(path: str | Path, target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r}")
    if str(path).endswith(("/", os.sep)) or target.is_dir():
        raise IsADirectoryError("that is a folder: add the name of a file")
    if target.is_symlink():
        raise OSError("symbolic links that lead back to themselves")
    if target.exists():
        if not target.is_file():
            raise OSError("that is no regular file")
        if not target.stat().st_mode & 0o222 or not os.access(target, os.W_OK):
            raise PermissionError("the file there is read-only")
