"""The small files beside a checkpoint's weights: which are copied, and which links are refused."""

import os
from pathlib import Path, PurePosixPath
from typing import Final

from emp_llm.errors import CheckpointError

__all__ = ["CONFIG_NAME", "check_link", "is_small_file", "other_files"]

CONFIG_NAME: Final = "config.json"

_WEIGHTS = (
    *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl"),
    *(".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".onnx.data", ".pb", ".tflite", ".mlmodel", ".mlpackage", ".nemo"),
)
_OTHER_COPIES = "original"  # where Meta's repositories hold the same weights in Meta's format


def is_small_file(path: PurePosixPath) -> bool:
    """Whether a file is copied into a pruned checkpoint, by its path in the checkpoint.

    Not copied are weights in any framework's format, their indexes, hidden files and folders, the
    folder ``original``, and the ``config.json`` at the top, which is written anew.

    Args:
        path: Relative to the checkpoint's folder.
    """
    if any(part.startswith(".") for part in path.parts) or path.parts[0] == _OTHER_COPIES:
        return False
    name = path.name.lower()
    is_index = any(f"{ending}.index." in name for ending in _WEIGHTS)
    return not is_index and not name.endswith(_WEIGHTS) and str(path) != CONFIG_NAME


def other_files(folder: Path) -> tuple[Path, ...]:
    """The small files of a checkpoint that are copied: paths relative to its folder, sorted.

    Raises:
        CheckpointError: If one is a link to anything but a file of the checkpoint.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .git is large
        for name in names:
            relative = (Path(parent) / name).relative_to(folder)
            if is_small_file(PurePosixPath(relative)) and _is_own_file(folder, relative):
                found.append(relative)
    return tuple(sorted(found))


def _is_own_file(folder: Path, relative: Path) -> bool:
    """Whether it is a regular file; raises if it is a link out of the checkpoint."""
    path = folder / relative
    check_link(path, folder)
    return path.is_file()


def check_link(path: Path, folder: Path) -> None:
    """Refuse a link out of a checkpoint: the file that it leads to would be copied to the result.

    So a checkpoint from a stranger could have a private file copied and uploaded. Links of weights
    are not checked: they can only lead to files of weights, and users keep these elsewhere.

    Args:
        path: A file of the checkpoint, maybe a link.
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: If it is a link to anything but a file of the checkpoint.
    """
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))  # resolve() fails on links that lead in a circle
    if not target.is_file() or not any(target.is_relative_to(root) for root in _roots(folder)):
        raise CheckpointError(
            f"{path}: is a link to {target}, which is not a file of this checkpoint: "
            "put a copy in its place or remove it"
        )


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where links may lead: into the folder, or from a snapshot in the Hub's cache to its blobs."""
    own = folder.resolve()
    if own.parent.name != "snapshots":
        return (own,)
    repository = own.parent.parent
    # blobs of this repository and, since huggingface_hub 2.4, those that all repositories share
    return own, (repository / "blobs").resolve(), (repository.parent / "blobs").resolve()
