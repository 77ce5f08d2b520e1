"""The CPU kernels, compiled by numba when they are first used and cached on disk.

numba looks only at a kernel's own file to see whether its cached code is still right, not at the
files of the kernels it calls. So code that was compiled before any file here changed is thrown
away first.
"""

from contextlib import suppress
from pathlib import Path

__all__ = ["drop_stale_code"]


def drop_stale_code(folder: Path) -> None:
    """Remove compiled kernels from a folder's ``__pycache__`` that are older than its sources."""
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for compiled in folder.glob("__pycache__/*.nb[ci]"):
        # another process may remove it first; where nothing can be removed the package was
        # installed: its files change together, and numba sees that
        with suppress(FileNotFoundError, PermissionError):
            if compiled.stat().st_mtime < newest:
                compiled.unlink()


drop_stale_code(Path(__file__).parent)
