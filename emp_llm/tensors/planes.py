"""The planes of packed tensors, found among the tensors of a shard by their names."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.errors import CheckpointError, FormatError

__all__ = ["META_SUFFIX", "ROWS_SUFFIX", "Planes", "check_names", "find_packed", "holds_planes"]

ROWS_SUFFIX: Final = ".emp_rows"
META_SUFFIX: Final = ".emp_meta"


@dataclass(frozen=True)
class Planes:
    """Where the planes of one packed tensor lie in a shard."""

    records: TensorEntry
    rows: TensorEntry
    meta: TensorEntry

    @property
    def nbytes(self) -> int:
        """Bytes of the three together."""
        return self.records.nbytes + self.rows.nbytes + self.meta.nbytes


def holds_planes(names: Iterable[str]) -> bool:
    """Whether some tensor is named like a plane, so that a checkpoint holds packed tensors."""
    return any(name.endswith((ROWS_SUFFIX, META_SUFFIX)) for name in names)


def check_names(names: Iterable[str]) -> None:
    """Refuse a source with a tensor that is named like a plane: it is packed already.

    Raises:
        CheckpointError: If there is one.
    """
    for name in names:
        if name.endswith((ROWS_SUFFIX, META_SUFFIX)):
            raise CheckpointError(
                f"{name!r} is the name of a packed tensor's plane: the checkpoint is packed; run "
                "'emp-llm unpack' on it or give its dense source"
            )


def find_packed(
    where: str, tensors: Iterable[TensorEntry]
) -> tuple[dict[str, Planes], list[TensorEntry]]:
    """Sort the tensors of a shard into packed and plain ones.

    Args:
        where: The shard's file name, for errors.
        tensors: All of its tensors.

    Returns:
        The planes of each packed tensor by its name, and the plain tensors, both in the order of
        their data.

    Raises:
        FormatError: If a plane is missing, left over, or of a dtype or shape that no plane has.
    """
    entries = {entry.name: entry for entry in tensors}
    packed = {
        name.removesuffix(META_SUFFIX): _planes(where, name.removesuffix(META_SUFFIX), entries)
        for name in entries
        if name.endswith(META_SUFFIX)
    }
    taken = Counter(entry.name for planes in packed.values() for entry in _each(planes))
    for name, count in taken.items():
        if count > 1:
            raise FormatError(
                f"{where}: {name!r} would be a plane of two packed tensors: download or pack the "
                "checkpoint again"
            )
    plain = [entry for name, entry in entries.items() if name not in taken]
    for entry in plain:
        if entry.name.endswith(ROWS_SUFFIX):
            raise FormatError(
                f"{where}: {entry.name!r} is there without its other planes: the shard was taken "
                "apart; pack or download it again"
            )
    return packed, plain


def _each(planes: Planes) -> tuple[TensorEntry, TensorEntry, TensorEntry]:
    return planes.records, planes.rows, planes.meta


def _planes(where: str, name: str, entries: Mapping[str, TensorEntry]) -> Planes:
    found = []
    for suffix, dtype in (("", "U8"), (ROWS_SUFFIX, "U8"), (META_SUFFIX, "I64")):
        entry = entries.get(name + suffix)
        if entry is None:
            raise FormatError(
                f"{where}: packed tensor {name!r} lacks its plane {name + suffix!r}: the shard was "
                "taken apart; pack or download it again"
            )
        if entry.dtype != dtype or len(entry.shape) != 1:
            raise FormatError(
                f"{where}: plane {entry.name!r} is {entry.dtype} {list(entry.shape)}; it must be "
                f"{dtype} of one dimension: download or pack the checkpoint again"
            )
        found.append(entry)
    return Planes(*found)
