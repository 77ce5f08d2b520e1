"""Opens regular files only: reading a pipe or a device might never end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_regular"]


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: If it cannot be opened, or is a pipe, a device or a folder.
    """
    # without O_NONBLOCK, opening a pipe would wait until another process writes to it
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a regular file")
    return os.fdopen(fd, "rb")
