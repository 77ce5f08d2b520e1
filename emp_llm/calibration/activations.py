"""Activations that wait: in memory up to a limit, on disk past it.

Whoever holds a tensor keeps the very same one: only its storage is emptied while it waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from emp_llm.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Activations", "tensors_of"]


def tensors_of(*values: object) -> list[torch.Tensor]:
    """All tensors in some values, however deep in lists, tuples and dicts."""
    leaves, _ = _pytree.tree_flatten(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@dataclass
class _Waiting:
    """What was put away under one key."""

    in_memory: list[tuple[torch.UntypedStorage, torch.Tensor | None]] = field(default_factory=list)
    on_disk: list[tuple[torch.UntypedStorage, int, int]] = field(default_factory=list)
    nbytes: int = 0


class Activations:
    """Tensors of many samples that wait for their next block.

    Args:
        memory: Bytes that may wait in memory.
        folder: Where the others wait, in a file without a name.

    Attributes:
        spilled: The most bytes that waited on disk at once.
    """

    def __init__(self, memory: int, folder: Path) -> None:
        self.spilled = 0
        self._kept = frozenset[int]()
        self._shared: dict[int, torch.UntypedStorage] = {}
        self._memory = memory
        self._folder = folder
        self._waiting: dict[object, _Waiting] = {}
        self._file: Any = None
        self._free: dict[int, list[int]] = {}
        self._end = 0

    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        """From now on these, and no others, never wait: they are everyone's, as buffers are."""
        self._kept = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def put_away(self, key: object, tensors: Iterable[torch.Tensor]) -> None:
        """Have tensors wait under a key.

        Raises:
            OutputError: If the disk refuses them.
        """
        waiting = self._waiting[key] = _Waiting()
        seen = set(self._shared)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.is_meta or not tensor.numel() or storage._cdata in seen:
                continue
            seen.add(storage._cdata)
            nbytes = storage.nbytes()
            if not nbytes:
                self._share(storage)
            elif storage.data_ptr() in self._kept or not storage.resizable():
                continue
            elif self._memory >= nbytes:
                self._memory -= nbytes
                waiting.nbytes += nbytes
                waiting.in_memory.append((storage, self._keep(storage)))
            else:
                waiting.on_disk.append((storage, self._spill(storage), nbytes))

    def bring_back(self, key: object) -> None:
        """Give the tensors that wait under a key their content again.

        Raises:
            OutputError: If the disk does not give it back.
        """
        waiting = self._waiting.pop(key)
        self._memory += waiting.nbytes
        for storage, kept in waiting.in_memory:
            self._fill(storage, kept)
        for storage, offset, nbytes in waiting.on_disk:
            self._restore(storage, offset, nbytes)

    def close(self) -> None:
        """Give the disk back; what waits there is lost."""
        if self._file is not None:
            self._file.close()

    def _share(self, storage: torch.UntypedStorage) -> None:
        """Fill what several keys have, and one has emptied; it never waits again."""
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
        """The bytes of what lies on another device, which is emptied; None for the CPU's."""
        if storage.device.type == "cpu":
            return None
        kept = _bytes_of(storage).cpu()
        storage.resize_(0)
        return kept

    def _spill(self, storage: torch.UntypedStorage) -> int:
        nbytes = storage.nbytes()
        try:
            if self._file is None:
                self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            slots = self._free.get(nbytes)
            offset = slots.pop() if slots else self._end
            self._file.seek(offset)
            # a copy: storages that numpy has seen cannot be emptied
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
                    f"{self._folder}: activations that waited there are gone: run the command again"
                )
            view = view[count:]
        storage.resize_(nbytes)
        _bytes_of(storage).copy_(content)
        self._free.setdefault(nbytes, []).append(offset)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
