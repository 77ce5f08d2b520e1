"""Weights that a repair has changed, as files that the smaller model is written from."""

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.selection.mask_store import MaskStore

__all__ = ["repaired_files"]


def repaired_files(store: MaskStore) -> dict[str, SourceFile]:
    """Files that hold the new weights of readers, cut, by the names of the readers' tensors.

    Args:
        store: What `emp_llm.shrinking.narrowing` has filled.
    """
    return {name: _Repaired(store, name) for name in store.replaced_names}


class _Repaired(SourceFile):
    """New weights of a reader as a file."""

    def __init__(self, store: MaskStore, name: str) -> None:
        self.name = name
        self._store = store

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the weights' bytes from an offset on."""
        self._store.read_replaced(self.name, offset, buffer)

    def close(self) -> None:
        """The store closes its files."""
