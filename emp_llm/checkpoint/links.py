"""Links in a checkpoint that lead out of it are refused."""

import os
from pathlib import Path

from emp_llm.errors import CheckpointError

__all__ = ["check_link"]


def check_link(path: Path, folder: Path) -> None:
    """Refuse a link out of a checkpoint: the file that it leads to would be copied to the result.

    So a checkpoint from a stranger could have a private file copied and uploaded. Links of the
    weights that are pruned are not checked: they can only lead to files of weights, and users keep
    these elsewhere.

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
