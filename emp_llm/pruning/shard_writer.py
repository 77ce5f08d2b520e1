"""One safetensors file, written tensor by tensor before the sizes of all tensors are known.

The header stands first in the file but is known last, so room is reserved for it; the format allows
spaces to fill what is left. The file gets its name when all of it is on disk.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emp_llm.checkpoint.safetensors_header import encode_header
from emp_llm.files.direct_file import Flusher
from emp_llm.files.placed_file import PlacedFile
from emp_llm.tensors.geometry import Geometry, RowBlock

__all__ = ["Entry", "ShardWriter"]

Entry = tuple[str, str, tuple[int, ...], int]
"""Name, dtype as safetensors spells it, shape and bytes of a tensor."""


class ShardWriter(PlacedFile):
    """Writes one safetensors file; the places of its tensors are given out by `allot`.

    Args:
        path: The file; it has this name once it is complete and on disk, not before.
        at_most: Entries of its tensors, with sizes that the final ones do not exceed: they
            determine how much room the header gets.
        metadata: Its header's metadata.
        flusher: The thread that waits for the disk.
        in_order: Whether places are written roughly in the order in which they are given out.
        finished: Called from the flusher's thread when the file has its name.

    Raises:
        OSError: If the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        at_most: Iterable[Entry],
        metadata: Mapping[str, str],
        flusher: Flusher,
        *,
        in_order: bool,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        self._metadata = metadata
        self._reserved = len(encode_header(at_most, metadata))
        self._entries: list[Entry] = []
        super().__init__(
            path, flusher, head_bytes=self._reserved, in_order=in_order, finished=finished
        )

    def head(self) -> bytes:
        """The header, as long as the room that was reserved for it."""
        return encode_header(self._entries, self._metadata, reserve=self._reserved)

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """Add tensors to the header, in the order of their places."""
        self._entries.extend(entries)

    def write_rows(
        self,
        geometry: Geometry,
        offset: int,
        block: RowBlock,
        weights: npt.NDArray[np.unsignedinteger],
    ) -> None:
        """Write a row block of a dense tensor.

        Args:
            geometry: How the tensor's rows run.
            offset: The place of the whole tensor, from `allot`.
            block: The rows.
            weights: Their bit patterns, [R, C].

        Raises:
            OSError: If they cannot be written.
        """
        for at, data in geometry.placed(offset, block, weights):
            self.write(at, data)
