"""Files in the Hub's cache that are deleted after use."""

from pathlib import Path

from emp_llm.errors import HubError

__all__ = ["discard_file"]


def discard_file(path: Path) -> None:
    """Delete a downloaded file from the cache: the snapshot's link and what it leads to.

    Raises:
        HubError: If it cannot be deleted.
    """
    try:
        blob = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink()
        if blob is not None and blob.is_symlink():
            _discard_shared(blob)
        elif blob is not None:
            blob.unlink()
    except OSError as error:
        raise HubError(
            f"{path}: cannot be deleted: {error.strerror}; leave --discard-source out"
        ) from error


def _discard_shared(blob: Path) -> None:
    """Delete a link into the store of all repositories, and its file unless another uses it."""
    from huggingface_hub import DeleteCacheStrategy, constants

    nothing: frozenset[Path] = frozenset()
    DeleteCacheStrategy(
        expected_freed_size=0,
        blobs=frozenset({blob}),
        refs=nothing,
        repos=nothing,
        snapshots=nothing,
        cache_dir=Path(constants.HF_HUB_CACHE),
    ).execute()
