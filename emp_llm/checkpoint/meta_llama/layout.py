"""Meta's original Llama checkpoints, seen as shards of safetensors in Hugging Face's layout.

    params.json and consolidated.00.pth … → config, and model-00001-of-0000N.safetensors …

Nothing is converted beforehand: the shards are nowhere as such, their bytes are taken from the
parts as they are read. The parts are those of model parallelism. They hold the rows of a matrix
(of a column-parallel layer) or its columns one after the other, and each the norms. Meta turns
neighbouring pairs of a head by the rotary embedding, transformers its halves, so the rows of q and
k stand in another order: row j of pair i of a head becomes row i of half j. ``rope.freqs``, which
follow from params.json, are left out. As transformers' convert_llama_weights_to_hf.py does it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from emp_llm.checkpoint.dtypes import TORCH_NAMES, item_bytes
from emp_llm.checkpoint.extents import Extent, Lying, dense_strides
from emp_llm.checkpoint.header import Header, TensorEntry
from emp_llm.checkpoint.meta_llama.params import PARAMS_NAME, OriginalParams
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError

__all__ = [
    "MAX_SHARD_BYTES",
    "OriginalLlama",
    "is_original",
    "is_part",
    "part_names",
    "read_original",
]

MAX_SHARD_BYTES: Final = 5_000_000_000
"""Bytes of a shard's tensors, at most, unless one alone is larger."""

_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_LEFT_OUT = re.compile(r"(^|\.)rope\.freqs$")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_GATE = "layers.0.feed_forward.w1.weight"
_FIRST_QUERY = "layers.0.attention.wq.weight"


@dataclass(frozen=True)
class _OriginalShard(Shard):
    """A file that there is not, made from the parts of a checkpoint of Meta's.

    Attributes:
        extents: Where its bytes come from; parts are numbered as in `made_from`.
    """

    extents: tuple[Extent, ...] = ()

    def open(self) -> SourceFile:
        """Open the parts, and with them the file that the header tells of."""
        from emp_llm.checkpoint.assembled_file import AssembledFile

        with ExitStack() as opened:
            parts = []
            for part in self.made_from:
                parts.append(part.open())
                opened.callback(parts[-1].close)
            opened.pop_all()
        return AssembledFile(self.name, parts, self.extents)


class OriginalLlama(NamedTuple):
    """A checkpoint of Meta's in Hugging Face's layout.

    Attributes:
        shards: Its weights.
        config: The content of its config.json.
        params: What params.json says.
    """

    shards: tuple[Shard, ...]
    config: dict[str, Any]
    params: OriginalParams


def is_original(names: Iterable[str]) -> bool:
    """Tell by the files' names whether a folder without a config.json is one of Meta's."""
    return any(name == PARAMS_NAME or is_part(name) for name in names)


def is_part(name: str) -> bool:
    """Tell whether a file is part of the weights, by its name."""
    return _PART.fullmatch(name) is not None


def part_names(names: Iterable[str], where: object) -> list[str]:
    """The names of all parts, in order.

    Args:
        names: The names of all files.
        where: The folder or repository, for the error's text.

    Raises:
        CheckpointError: If params.json or a part is missing.
    """
    names = set(names)
    parts = sorted(filter(is_part, names))
    if PARAMS_NAME not in names:
        raise CheckpointError(
            f"{where}: has {parts[0]}, which is of Meta's original format, and no {PARAMS_NAME}, "
            "which belongs to it: put it beside, or give the model in Hugging Face's layout"
        )
    count = 1 + max((int(part.split(".")[1]) for part in parts), default=0)
    expected = [f"consolidated.{number:02}.pth" for number in range(count)]
    missing = [name for name in expected if name not in names]
    if missing:
        raise CheckpointError(
            f"{where}: has {PARAMS_NAME}, so it is in Meta's original format, and no {missing[0]} "
            f"({len(missing)} of {count} parts missing): download it again, or give the model in "
            "Hugging Face's layout"
        )
    return expected


def read_original(folder: Path, parts: Sequence[Shard], fields: Mapping[str, Any]) -> OriginalLlama:
    """See a checkpoint of Meta's in Hugging Face's layout.

    Args:
        folder: Where it lies.
        parts: Its parts, in order.
        fields: The content of params.json.

    Raises:
        CheckpointError: If it is not a dense Llama, or its parts do not belong together.
    """
    params = OriginalParams.of(fields)
    if params.heads % len(parts) or params.key_heads % len(parts):
        raise CheckpointError(
            f"{PARAMS_NAME}: {params.heads} heads and {params.key_heads} of keys and values are "
            f"not whole in each of {len(parts)} parts: give the model in Hugging Face's layout"
        )
    reading = _Parts(parts, params)
    shards = tuple(_shards(folder, parts, list(reading.tensors())))
    config = params.config(
        intermediate=reading.intermediate,
        vocabulary=reading.vocabulary,
        dtype=TORCH_NAMES.get(reading.dtype, reading.dtype),
        tied=reading.tied,
    )
    return OriginalLlama(shards, config, params)


class _Tensor(NamedTuple):
    """A tensor in Hugging Face's layout, and the arrays it is made of: below or beside."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    lying: tuple[Lying, ...]
    beside: bool


class _Parts:
    """The tensors of all parts, and what they become."""

    def __init__(self, parts: Sequence[Shard], params: OriginalParams) -> None:
        self._parts = parts
        self._params = params
        self._entries = [{entry.name: entry for entry in part.header.tensors} for part in parts]
        self._seen: set[str] = set()
        first = self._entries[0]
        embedding = self._entry(0, _EMBEDDING, 2)
        head = first.get(_HEAD)
        # the same bytes, or none
        self.tied = head is None or (head.start, head.end) == (embedding.start, embedding.end)
        self.dtype = self._entry(0, _FIRST_QUERY, 2).dtype
        self.intermediate = self._entry(0, _GATE, 2).shape[0] * len(parts)
        whole_rows = embedding.shape[1] == params.dim
        self._embedding_axis = 0 if whole_rows else 1
        self.vocabulary = embedding.shape[0] * (len(parts) if whole_rows else 1)

    def tensors(self) -> Iterator[_Tensor]:
        """All tensors, in the order of transformers' own state dict."""
        p, dim, wide = self._params, self._params.dim, self.intermediate
        keys = p.key_heads * p.head_dim
        embedding = (self.vocabulary, dim)
        yield self._join("model.embed_tokens", "tok_embeddings", embedding, self._embedding_axis)
        for layer in range(p.layers):
            new, old = f"model.layers.{layer}", f"layers.{layer}"
            attention, mlp = f"{old}.attention", f"{old}.feed_forward"
            yield self._turn(f"{new}.self_attn.q_proj", f"{attention}.wq", p.heads)
            yield self._turn(f"{new}.self_attn.k_proj", f"{attention}.wk", p.key_heads)
            yield self._join(f"{new}.self_attn.v_proj", f"{attention}.wv", (keys, dim), 0)
            yield self._join(f"{new}.self_attn.o_proj", f"{attention}.wo", (dim, dim), 1)
            yield self._join(f"{new}.mlp.gate_proj", f"{mlp}.w1", (wide, dim), 0)
            yield self._join(f"{new}.mlp.up_proj", f"{mlp}.w3", (wide, dim), 0)
            yield self._join(f"{new}.mlp.down_proj", f"{mlp}.w2", (dim, wide), 1)
            yield self._copy(f"{new}.input_layernorm", f"{old}.attention_norm")
            yield self._copy(f"{new}.post_attention_layernorm", f"{old}.ffn_norm")
        yield self._copy("model.norm", "norm")
        if self.tied:
            self._seen.add(_HEAD)
        else:
            yield self._join("lm_head", "output", embedding, 0)
        self._check_all_seen()

    def _join(self, new: str, old: str, shape: tuple[int, int], axis: int) -> _Tensor:
        """One matrix, of which each part has as many rows (axis 0) or columns (axis 1)."""
        count = len(self._parts)
        part_shape = tuple(size // count if dim == axis else size for dim, size in enumerate(shape))
        entries = self._same(f"{old}.weight", part_shape)
        lying = tuple(
            Lying(
                number, entry.start, part_shape, dense_strides(part_shape, item_bytes(entry.dtype))
            )
            for number, entry in enumerate(entries)
        )
        beside = axis == 1 and count > 1
        return _Tensor(f"{new}.weight", entries[0].dtype, shape, lying, beside)

    def _turn(self, new: str, old: str, heads: int) -> _Tensor:
        """The queries or keys, with the rows of each head in another order."""
        half, dim = self._params.head_dim // 2, self._params.dim
        tensor = self._join(new, old, (heads * 2 * half, dim), 0)
        per_part = heads // len(self._parts)
        # [heads, pairs, 2, dim] with the middle dimensions swapped
        by_head, by_pair, by_row, by_item = dense_strides(
            (per_part, half, 2, dim), item_bytes(tensor.dtype)
        )
        lying = tuple(
            Lying(
                part.part,
                part.start,
                (per_part, 2, half, dim),
                (by_head, by_row, by_pair, by_item),
            )
            for part in tensor.lying
        )
        return tensor._replace(lying=lying)

    def _copy(self, new: str, old: str) -> _Tensor:
        """A norm, which every part has."""
        shape = (self._params.dim,)
        entry = self._same(f"{old}.weight", shape)[0]
        lying = (Lying(0, entry.start, shape, dense_strides(shape, item_bytes(entry.dtype))),)
        return _Tensor(f"{new}.weight", entry.dtype, shape, lying, beside=False)

    def _same(self, name: str, shape: tuple[int, ...]) -> list[TensorEntry]:
        """A tensor of every part, of this shape and of one dtype."""
        self._seen.add(name)
        entries = [self._entry(number, name, len(shape)) for number in range(len(self._parts))]
        for part, entry in zip(self._parts, entries, strict=True):
            if (entry.shape, entry.dtype) != (shape, entries[0].dtype):
                raise CheckpointError(
                    f"{part.name}: {name!r} is {entry.dtype} {list(entry.shape)}; by {PARAMS_NAME} "
                    f"and the other {len(self._parts) - 1} parts it must be {entries[0].dtype} "
                    f"{list(shape)}: the parts do not belong together, download them again"
                )
        return entries

    def _entry(self, number: int, name: str, dimensions: int) -> TensorEntry:
        entry = self._entries[number].get(name)
        if entry is None:
            self._check_dense_llama()
        if entry is None or len(entry.shape) != dimensions:
            raise CheckpointError(
                f"{self._parts[number].name}: lacks {name!r} of {dimensions} dimensions, which a "
                "Llama has: download it again, or give the model in Hugging Face's layout"
            )
        return entry

    def _check_dense_llama(self) -> None:
        """Tell first of what no dense Llama has, where something else is missing."""
        known = re.compile(
            r"(tok_embeddings|output|norm|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|"
            r"attention_norm|ffn_norm))\.weight"
        )
        for part, entries in zip(self._parts, self._entries, strict=True):
            for name in entries:
                if not known.fullmatch(name) and not _LEFT_OUT.search(name):
                    raise _not_dense(part, name)

    def _check_all_seen(self) -> None:
        for part, entries in zip(self._parts, self._entries, strict=True):
            for name in entries:
                if name not in self._seen and not _LEFT_OUT.search(name):
                    raise _not_dense(part, name)


def _not_dense(part: Shard, name: str) -> CheckpointError:
    return CheckpointError(
        f"{part.name}: has {name!r}, which the dense Llama of its {PARAMS_NAME} has not: of Meta's "
        "original format only dense Llamas are read, give the model in Hugging Face's layout"
    )


def _shards(folder: Path, parts: Sequence[Shard], tensors: Sequence[_Tensor]) -> Iterator[Shard]:
    """Deal the tensors out to shards, in their order."""
    groups: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if groups[-1] and filled + nbytes > MAX_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}" if len(groups) > 1 else "model"
        yield _shard(folder / f"{name}.safetensors", parts, group)


def _shard(path: Path, parts: Sequence[Shard], tensors: Iterable[_Tensor]) -> Shard:
    entries: list[TensorEntry] = []
    extents: list[Extent] = []
    end = 0
    for tensor in tensors:
        nbytes, item = _nbytes(tensor), item_bytes(tensor.dtype)
        entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, end, end + nbytes))
        below = [tensor.lying] if tensor.beside else [(lying,) for lying in tensor.lying]
        for arrays in below:
            extents.append(Extent(end, nbytes // len(below), item, arrays))
            end += nbytes // len(below)
    header = Header({"format": "pt"}, tuple(entries), 0, end)
    return _OriginalShard(path.name, path, header, tuple(parts), tuple(extents))


def _nbytes(tensor: _Tensor) -> int:
    return math.prod(tensor.shape) * item_bytes(tensor.dtype)
