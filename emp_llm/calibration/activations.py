"""Activations between units, which wait in memory up to a limit and on disk beyond it.

A model may hold an activation anywhere, in its own variables or in a graph for gradients. So
tensors are not replaced: their storages are resized to nothing while they wait, and filled again.
"""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from emp_llm.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Activations", "opened", "tensors_of"]


def tensors_of(*values: object) -> list[torch.Tensor]:
    """All tensors in some values, however deep in lists, tuples and dicts."""
    leaves, _ = _pytree.tree_flatten(opened(values))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def opened(values: object) -> object:
    """The same values, with each `UserDict` as a dict, which torch looks into.

    Layers that share keys and values pass them in a `UserDict`.
    """
    found: object = _pytree.tree_map(
        lambda leaf: dict(leaf) if isinstance(leaf, UserDict) else leaf, values
    )
    return found


@dataclass
class _Waiting:
    """What waits under one key.

    Attributes:
        in_memory: Storages that count against the limit, with their bytes where these were copied
            from another device.
        on_disk: Storages that are empty, with offset and bytes of their content in the file.
        nbytes: Bytes of `in_memory`.
    """

    in_memory: list[tuple[torch.UntypedStorage, torch.Tensor | None]] = field(default_factory=list)
    on_disk: list[tuple[torch.UntypedStorage, int, int]] = field(default_factory=list)
    nbytes: int = 0


class Activations:
    """Tensors of many samples that wait for their next decoder block.

    Args:
        memory: Bytes that may wait in memory.
        folder: Where the others wait, in an unnamed temporary file.

    Attributes:
        spilled: The most bytes that waited on disk at once.
    """

    def __init__(self, memory: int, folder: Path) -> None:
        self.spilled = 0
        self._exempt = frozenset[int]()
        self._shared: dict[int, torch.UntypedStorage] = {}
        self._memory = memory
        self._folder = folder
        self._waiting: dict[object, _Waiting] = {}
        self._file: Any = None
        self._free: dict[int, list[int]] = {}
        self._end = 0

    @property
    def room(self) -> int:
        """Bytes of memory in which nothing waits."""
        return self._memory

    def exempt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave these tensors, and no others, as they are: all samples share them, as buffers."""
        self._exempt = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def put_away(self, key: object, tensors: Iterable[torch.Tensor]) -> None:
        """Have tensors wait under a key; those that cannot be emptied stay as they are.

        Raises:
            OutputError: If they cannot be written.
        """
        waiting = self._waiting[key] = _Waiting()
        seen = set(self._shared)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # `_cdata` is the address of the storage itself, which stays while it is emptied
            if tensor.is_meta or not tensor.numel() or storage._cdata in seen:
                continue
            seen.add(storage._cdata)
            nbytes = storage.nbytes()
            if not nbytes:  # another key, whose tensors wait already, holds the same storage
                self._share(storage)
            elif storage.data_ptr() in self._exempt or not storage.resizable():
                continue
            elif self._memory >= nbytes:  # first come, first served: who waits longest is not known
                self._memory -= nbytes
                waiting.nbytes += nbytes
                waiting.in_memory.append((storage, self._keep(storage)))
            else:
                waiting.on_disk.append((storage, self._spill(storage), nbytes))

    def bring_back(self, key: object) -> None:
        """Fill the tensors that wait under a key.

        Raises:
            OutputError: If they cannot be read.
        """
        waiting = self._waiting.pop(key)
        self._memory += waiting.nbytes
        for storage, kept in waiting.in_memory:
            self._fill(storage, kept)
        for storage, offset, nbytes in waiting.on_disk:
            self._restore(storage, offset, nbytes)

    def close(self) -> None:
        """Delete the file; what waits there is lost."""
        if self._file is not None:
            self._file.close()

    def _share(self, storage: torch.UntypedStorage) -> None:
        """Fill a storage that several keys hold and one has emptied; it never waits again."""
        # samples reach units in turn: which one needs it next is not known, so it stays filled
        address = storage._cdata
        for waiting in self._waiting.values():
            for place, (one, kept) in enumerate(waiting.in_memory):
                if one._cdata == address and kept is not None:
                    self._fill(*waiting.in_memory.pop(place))
                    break
            for place, (one, _, _) in enumerate(waiting.on_disk):
                if one._cdata == address:
                    self._restore(*waiting.on_disk.pop(place))
                    break
        self._shared[address] = storage

    def _fill(self, storage: torch.UntypedStorage, kept: torch.Tensor | None) -> None:
        if kept is not None:
            storage.resize_(kept.numel())
            _bytes_of(storage).copy_(kept)

    def _keep(self, storage: torch.UntypedStorage) -> torch.Tensor | None:
        """Copy the bytes of a storage from another device and empty it; None for the CPU's."""
        if storage.device.type == "cpu":  # it may stay where it is, as long as memory allows
            return None
        kept = _bytes_of(storage).cpu()
        storage.resize_(0)
        return kept

    def _spill(self, storage: torch.UntypedStorage) -> int:
        nbytes = storage.nbytes()
        try:
            if self._file is None:
                self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (closed by close())
            # samples have equal sizes, so a place that became free fits the next one exactly
            slots = self._free.get(nbytes)
            offset = slots.pop() if slots else self._end
            self._file.seek(offset)
            # a copy, for a storage that numpy has a view of can no longer be resized
            data = _bytes_of(storage).to("cpu", copy=True).numpy().data
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OutputError(
                f"{self._folder}: {nbytes:,} bytes of activations cannot be written: "
                f"{error.strerror}; free some disk, or take fewer or shorter samples"
            ) from error
        self._end = max(self._end, offset + nbytes)
        self.spilled = max(self.spilled, self._end)
        storage.resize_(0)
        return offset

    def _restore(self, storage: torch.UntypedStorage, offset: int, nbytes: int) -> None:
        content = torch.empty(nbytes, dtype=torch.uint8)
        view = content.numpy().data
        self._file.seek(offset)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise OutputError(
                    f"{self._folder}: activations stored there are gone: run the command again"
                )
            view = view[count:]
        storage.resize_(nbytes)
        _bytes_of(storage).copy_(content)
        self._free.setdefault(nbytes, []).append(offset)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
