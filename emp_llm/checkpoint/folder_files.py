"""The files of a checkpoint's folder, by their paths in it."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from emp_llm.checkpoint.left_behind import BesideWeights, LeftBehind, sort_files
from emp_llm.checkpoint.links import check_link
from emp_llm.errors import CheckpointError
from emp_llm.messages import encodable

__all__ = ["beside_weights", "visible_files"]


def visible_files(folder: Path) -> list[str]:
    """Paths of all files in a folder that are not hidden nor in a hidden folder; sorted."""
    paths = (path for _, files in _walk(folder) for path in files)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _walk(folder: Path) -> Iterator[tuple[list[Path], list[Path]]]:
    """The folders and the files in each folder that no link leads to, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .git is large
        visible = [name for name in names if not name.startswith(".")]
        yield [Path(parent, name) for name in folders], [Path(parent, name) for name in visible]


def beside_weights(
    folder: Path, weights: Iterable[str], *, meta_llama: bool = False
) -> BesideWeights:
    """Sort the files of a folder by whether they travel; see `sort_files`.

    Raises:
        CheckpointError: If the name of a file is not UTF-8, or one that travels is a link to
            anything but a file of the checkpoint.
    """
    sizes = {name: _size(folder / name) for name in visible_files(folder)}
    for name in sizes:  # reports list all of them
        if encodable(name) != name:
            raise CheckpointError(
                f"{folder / name}: has a name that is not UTF-8: rename it, or move it away"
            )
    beside = sort_files(sizes, weights, meta_llama=meta_llama)
    for name in beside.travelling:
        check_link(folder / name, folder)
    # pipes and devices have never been read
    regular = {
        name: nbytes for name, nbytes in beside.travelling.items() if (folder / name).is_file()
    }
    return BesideWeights(regular, (*beside.left_behind, *_closed_folders(folder)))


def _closed_folders(folder: Path) -> Iterator[LeftBehind]:
    """Folders that are not looked into: links to them are not followed, or they cannot be read."""
    for path in sorted(path for folders, _ in _walk(folder) for path in folders):
        if path.is_symlink():
            reason = "links to folders"
        elif not os.access(path, os.R_OK | os.X_OK):  # os.walk passes over it
            reason = "folders that cannot be read"
        else:
            continue
        name = f"{path.relative_to(folder).as_posix()}/"
        yield {"path": name, "reason": reason, "files": 0, "bytes": 0}


def _size(path: Path) -> int:
    with suppress(OSError):  # a link that leads nowhere; whether that matters is seen later
        return path.stat().st_size
    return 0
