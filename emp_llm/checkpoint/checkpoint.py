"""A checkpoint in a local folder: its config, its shards and the files beside them.

    config.json → weights file → index → shards → headers → the files beside them

Only headers are read. The checkpoint is what transformers would load from the folder, so that what
is pruned is what is used.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from emp_llm.checkpoint.folder_files import beside_weights
from emp_llm.checkpoint.header import Header, TensorEntry
from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME, BesideWeights
from emp_llm.checkpoint.meta_llama.original import read_original
from emp_llm.checkpoint.meta_llama.params import PARAMS_NAME, OriginalParams
from emp_llm.checkpoint.meta_llama.part_files import is_original, part_names
from emp_llm.checkpoint.other_formats import describe_other_format
from emp_llm.checkpoint.shard import Shard, read_shard
from emp_llm.checkpoint.weight_files import (
    INDEX_NAME,
    TORCH_INDEX_NAME,
    choose_weights,
    is_index,
    read_index,
)
from emp_llm.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "check_all_listed",
    "open_checkpoint",
]


_MAX_TENSORS = 1_000_000  # in all shards; each takes about 0.5 kB of memory


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose structure has been checked.

    Attributes:
        folder: Its folder.
        shards: Its files of weights, sorted by name.
        index_name: The name that its index has, or would have in a checkpoint of safetensors; None
            if one file holds all weights.
        index_metadata: The ``metadata`` of the index; empty if there is none.
        config: The content of ``config.json``.
        described_by: Paths, relative to the folder, of the files that all this is read from.
        beside: The other files: those that travel with its weights (tokenizer, generation config,
            code, licence, adapters, weights of other modules), and those that stay behind.
        absent: The tensors that the index lists and no shard has, with the file that it names for
            each. That is no fault where the model does without them, such as a tied head.
        original: The content of ``params.json`` if it is in Meta's original format, otherwise None.
            `shards` and `config` are then in Hugging Face's layout, and not in any file.
    """

    folder: Path
    shards: tuple[Shard, ...]
    index_name: str | None
    index_metadata: dict[str, Any]
    config: dict[str, Any]
    described_by: tuple[Path, ...]
    beside: BesideWeights
    absent: Mapping[str, str] = field(default_factory=dict)
    original: OriginalParams | None = None

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, TensorEntry]]:
        """Every tensor by name, with the shard that holds it, in the order of the data."""
        return {
            entry.name: (shard, entry) for shard in self.shards for entry in shard.header.tensors
        }

    @property
    def other_files(self) -> tuple[Path, ...]:
        """Paths, relative to the folder, of the files that travel with the weights, sorted.

        ``config.json`` is not among them.
        """
        return tuple(sorted(map(Path, self.beside.travelling)))

    def without(self, names: Collection[str]) -> "Checkpoint":
        """The checkpoint without some of its tensors."""
        if not names:
            return self
        return replace(self, shards=tuple(shard.without(names) for shard in self.shards))

    def stored_twice(self, tied: Mapping[str, str]) -> list[str]:
        """Tensors that are the same bytes of a file as the ones that they are tied to.

        Args:
            tied: By tensor, the one that it is tied to in the model.
        """

        def bytes_of(name: str) -> tuple[str, int, int]:
            shard, entry = self.tensors[name]
            return shard.name, entry.start, entry.end

        return [name for name, other in tied.items() if bytes_of(name) == bytes_of(other)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data, headers not counted."""
        return sum(entry.nbytes for _, entry in self.tensors.values())


def open_checkpoint(
    folder: Path, to_come: Mapping[str, Header] = MappingProxyType({})
) -> Checkpoint:
    """Open the checkpoint in a folder, reading headers only.

    A folder without ``config.json`` may be in Meta's original format, with ``params.json``; see
    `emp_llm.checkpoint.meta_llama`. Otherwise the weights are those that transformers would load,
    the first of these that there is:

    1. the file that the config names under ``transformers_weights``;
    2. ``model.safetensors``, or the shards in ``model.safetensors.index.json``;
    3. ``pytorch_model.bin``, or the shards in its index;
    4. the only ``*.safetensors`` of the folder.

    An index only says which files these are. transformers loads every tensor in them, listed or
    not, so every one belongs to the checkpoint here as well. A listed tensor that no file has is
    noted (`Checkpoint.absent`): whether the model needs it, only its structure shows. A name in two
    shards is refused, of which transformers would take the last; so is an index that lists more
    tensors that are not there than there are.

    Args:
        folder: A local folder, maybe a snapshot in the Hub's cache.
        to_come: Headers, by file name, of shards that are still to be downloaded to the folder.

    Returns:
        The checkpoint; the headers of its shards have been checked, their data has not been read.

    Raises:
        CheckpointError: If a part is missing, damaged or contradicts another one.
    """
    names = _file_names(folder)
    if CONFIG_NAME not in names and is_original([*names, *to_come]):
        return _open_original(folder, [*names, *to_come], to_come)
    config = _read_config(folder, names)
    weights = choose_weights(config, [*names, *to_come], folder)
    has_index = is_index(weights)
    weight_map, index_metadata = read_index(folder / weights) if has_index else ({}, {})
    shard_names = sorted(set(weight_map.values())) or [weights]
    leads = weights if has_index else CONFIG_NAME
    _check_present(folder, [name for name in shard_names if name not in to_come], leads)
    shards = tuple(_open_shards(folder, shard_names, to_come))
    holders = _holders(shards)
    absent = {tensor: name for tensor, name in weight_map.items() if tensor not in holders}
    if len(absent) > len(holders):  # as many are no left-overs, and are not worth a look
        _refuse_absent(absent)
    index_name = None if not has_index else INDEX_NAME if weights == TORCH_INDEX_NAME else weights
    described_by = (Path(CONFIG_NAME), *([Path(weights)] if has_index else []))
    beside = beside_weights(folder, [weights, *shard_names])
    return Checkpoint(
        folder, shards, index_name, index_metadata, config, described_by, beside, absent
    )


def _open_original(folder: Path, names: Iterable[str], to_come: Mapping[str, Header]) -> Checkpoint:
    parts = [read_shard(folder / name, to_come.get(name)) for name in part_names(names, folder)]
    model = read_original(folder, parts, read_json_object(folder / PARAMS_NAME))
    beside = beside_weights(folder, [part.name for part in parts], meta_llama=True)
    return Checkpoint(
        folder,
        model.shards,
        INDEX_NAME if len(model.shards) > 1 else None,
        {},
        model.config,
        (Path(PARAMS_NAME),),
        beside,
        original=model.params,
    )


def _file_names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: there is no such folder; give a checkpoint's folder or its Hub id"
        ) from error
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{folder}: is a file; give the folder of the checkpoint instead"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error


def _read_config(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        if instead := describe_other_format(names):
            raise CheckpointError(f"{folder}: holds {instead}")
        raise CheckpointError(
            f"{folder}: has no {CONFIG_NAME}, which says what kind of model this is; "
            "give the folder that save_pretrained wrote"
        )
    return read_json_object(folder / CONFIG_NAME)


def _check_present(folder: Path, names: list[str], leads: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {leads} names {missing[0]}, which is not there "
            f"({len(missing)} of {len(names)} files missing): download the checkpoint again"
        )


def _open_shards(
    folder: Path, names: Iterable[str], to_come: Mapping[str, Header]
) -> Iterator[Shard]:
    count = 0
    for name in names:
        shard = read_shard(folder / name, to_come.get(name))
        count += len(shard.header.tensors)
        if count > _MAX_TENSORS:
            raise CheckpointError(
                f"{folder}: has more than {_MAX_TENSORS:,} tensors by {name}, five times as many "
                "as models of 10^12 weights have: fuse its experts"
            )
        yield shard


def _holders(shards: tuple[Shard, ...]) -> dict[str, str]:
    """The name of the shard that holds each tensor, by the tensor's name."""
    holders: dict[str, str] = {}
    for shard in shards:
        for entry in shard.header.tensors:
            first = holders.setdefault(entry.name, shard.name)
            if first != shard.name:
                raise CheckpointError(
                    f"tensor {entry.name!r} is in {first} and again in {shard.name}; "
                    "only one of them can be meant: save the checkpoint again"
                )
    return holders


def check_all_listed(absent: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose index lists a tensor that no shard has.

    Args:
        absent: As `Checkpoint.absent`.

    Raises:
        CheckpointError: If there is one.
    """
    if absent:
        _refuse_absent(absent)


def _refuse_absent(absent: Mapping[str, str]) -> NoReturn:
    tensor, name = next(iter(absent.items()))
    raise CheckpointError(
        f"{name}: lacks tensor {tensor!r}, which the index says it holds ({len(absent)} missing): "
        "index and shards are not of one checkpoint, download it again"
    )
