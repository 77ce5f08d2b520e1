"""Where the masks and weights of one unit lie in its data file.

A unit is a decoder block, or a module outside of all decoder blocks that holds targets; where a
decoder block is pruned in stages, each stage is a unit of its own here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.errors import CheckpointError
from emp_llm.report.tensor_statistics import Group

__all__ = [
    "INDEX_SUFFIX",
    "NOTES_NAME",
    "StoredRows",
    "StoredTensor",
    "UnitIndex",
    "count_stored",
    "file_stem",
    "index_paths",
    "read_index",
]

INDEX_SUFFIX = ".json"
NOTES_NAME = "notes.json"


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor that were stored together.

    Attributes:
        first_row: Number of the first one among all rows of the tensor.
        rows: How many.
        mask: Offset of their masks in the data file.
        mask_bytes: Bytes of a row's mask.
        stats: Offset of the sums of their scores.
        weights: Offset of their new weights; None if they keep the source's.
        columns: Weights in a row, where there are new ones.
        item_bytes: Bytes of a weight, where there are new ones.
    """

    first_row: int
    rows: int
    mask: int
    mask_bytes: int
    stats: int
    weights: int | None = None
    columns: int = 0
    item_bytes: int = 0

    @property
    def stop_row(self) -> int:
        """Number of the first row behind them."""
        return self.first_row + self.rows


@dataclass(frozen=True)
class StoredTensor:
    """What is stored of a target.

    Attributes:
        parts: All of its rows, in order.
        groups: The group of each of its matrices; empty where each row is a group.
    """

    parts: tuple[StoredRows, ...]
    groups: tuple[Group, ...]

    @property
    def is_repaired(self) -> bool:
        """Whether weights that are kept have changed."""
        return any(part.weights is not None for part in self.parts)


@dataclass(frozen=True)
class UnitIndex:
    """What a unit's data file holds.

    Attributes:
        key: The unit's name.
        nbytes: Bytes of the data file.
        checksum: XXH3-128 of these bytes.
        tensors: The targets, by name.
        replaced: Offset and bytes of tensors that are not targets and have changed, by name.
        notes: Facts for the report, which JSON can hold.
    """

    key: str
    nbytes: int
    checksum: str
    tensors: Mapping[str, StoredTensor]
    replaced: Mapping[str, tuple[int, int]]
    notes: Mapping[str, object]


def file_stem(key: str) -> str:
    """What the files of a unit are called, without their suffix: a unit's name may be no file's."""
    return xxhash.xxh3_128_hexdigest(key.encode())


def index_paths(folder: Path) -> list[Path]:
    """The indices in a folder, whole or damaged, sorted."""
    return sorted(path for path in folder.glob(f"*{INDEX_SUFFIX}") if path.name != NOTES_NAME)


def count_stored(folder: Path) -> int:
    """How many units have masks in a folder, whole or damaged."""
    return len(index_paths(folder))


def read_index(path: Path) -> UnitIndex | None:
    """A unit's index; None if it is damaged."""
    try:
        content = read_json_object(path)
        index = UnitIndex(
            **{
                **content,
                "tensors": {
                    name: StoredTensor(
                        tuple(StoredRows(**part) for part in tensor["parts"]),
                        tuple(Group(**group) for group in tensor["groups"]),
                    )
                    for name, tensor in content["tensors"].items()
                },
            }
        )
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
    named = file_stem(str(index.key)) == path.stem
    return index if named and all(tensor.parts for tensor in index.tensors.values()) else None
