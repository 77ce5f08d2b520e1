"""The tensors of Meta's original Llama checkpoints in Hugging Face's layout.

The parts are those of model parallelism: each holds some rows of a matrix (of a column-parallel
layer) or some of its columns, and all of the norms. Meta applies the rotary embedding to
neighbouring pairs of a head's outputs, transformers to its halves, so the rows of the queries and
keys are in another order: row j of pair i of a head becomes row i of half j. ``rope.freqs``, which
follow from params.json, are left out. transformers' convert_llama_weights_to_hf.py does the same.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emp_llm.checkpoint.dtypes import item_bytes
from emp_llm.checkpoint.extents import StridedArray, dense_strides
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.meta_llama.params import PARAMS_NAME, OriginalParams
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError

__all__ = ["JoinedTensor", "Parts"]


_LEFT_OUT = re.compile(r"(^|\.)rope\.freqs$")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_GATE = "layers.0.feed_forward.w1.weight"
_FIRST_QUERY = "layers.0.attention.wq.weight"


class JoinedTensor(NamedTuple):
    """A tensor in Hugging Face's layout, and what of Meta's parts it is made of.

    Attributes:
        name: Hugging Face's name of it.
        dtype: A key of `emp_llm.checkpoint.dtypes.ITEM_BITS`.
        shape: Sizes, outermost first.
        arrays: The arrays that it is made of.
        side_by_side: Whether these are strips of columns, side by side; otherwise rows, one array
            below the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    arrays: tuple[StridedArray, ...]
    side_by_side: bool


class Parts:
    """The tensors of all parts, and what they become.

    Args:
        parts: The parts, in order.
        params: What params.json says.

    Attributes:
        tied: Whether the output head is the embedding.
        dtype: Dtype of the weights.
        intermediate: Intermediate size of the MLPs.
        vocabulary: Tokens.

    Raises:
        CheckpointError: If a part lacks a tensor that a Llama has.
    """

    def __init__(self, parts: Sequence[Shard], params: OriginalParams) -> None:
        self._parts = parts
        self._params = params
        self._entries = [{entry.name: entry for entry in part.header.tensors} for part in parts]
        self._seen: set[str] = set()
        first = self._entries[0]
        embedding = self._entry(0, _EMBEDDING, 2)
        head = first.get(_HEAD)
        # a tied head is the same bytes as the embedding, or is not there
        self.tied = head is None or (head.start, head.end) == (embedding.start, embedding.end)
        self.dtype = self._entry(0, _FIRST_QUERY, 2).dtype
        self.intermediate = self._entry(0, _GATE, 2).shape[0] * len(parts)
        whole_rows = embedding.shape[1] == params.dim
        self._embedding_axis = 0 if whole_rows else 1
        self.vocabulary = embedding.shape[0] * (len(parts) if whole_rows else 1)

    def tensors(self) -> Iterator[JoinedTensor]:
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

    def _join(self, new: str, old: str, shape: tuple[int, int], axis: int) -> JoinedTensor:
        """One matrix, of which each part has as many rows (axis 0) or columns (axis 1)."""
        count = len(self._parts)
        part_shape = tuple(size // count if dim == axis else size for dim, size in enumerate(shape))
        entries = self._same(f"{old}.weight", part_shape)
        arrays = tuple(_dense(number, entry) for number, entry in enumerate(entries))
        side_by_side = axis == 1 and count > 1
        return JoinedTensor(f"{new}.weight", entries[0].dtype, shape, arrays, side_by_side)

    def _turn(self, new: str, old: str, heads: int) -> JoinedTensor:
        """The queries or keys, with the rows of each head in another order."""
        half, dim = self._params.head_dim // 2, self._params.dim
        tensor = self._join(new, old, (heads * 2 * half, dim), 0)
        per_part = heads // len(self._parts)
        # [heads, pairs, 2, dim] with the middle dimensions swapped
        by_head, by_pair, by_row, by_item = dense_strides(
            (per_part, half, 2, dim), item_bytes(tensor.dtype)
        )
        arrays = tuple(
            StridedArray(
                part.part,
                part.start,
                (per_part, 2, half, dim),
                (by_head, by_row, by_pair, by_item),
            )
            for part in tensor.arrays
        )
        return tensor._replace(arrays=arrays)

    def _copy(self, new: str, old: str) -> JoinedTensor:
        """A norm, which every part has."""
        shape = (self._params.dim,)
        entry = self._same(f"{old}.weight", shape)[0]
        arrays = (_dense(0, entry),)
        return JoinedTensor(f"{new}.weight", entry.dtype, shape, arrays, side_by_side=False)

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
        """Refuse what no dense Llama has; that explains more than what is missing instead."""
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


def _dense(part: int, entry: TensorEntry) -> StridedArray:
    strides = dense_strides(entry.shape, item_bytes(entry.dtype))
    return StridedArray(part, entry.start, entry.shape, strides)


def _not_dense(part: Shard, name: str) -> CheckpointError:
    return CheckpointError(
        f"{part.name}: has {name!r}, which the dense Llama of {PARAMS_NAME} lacks; only "
        "dense Llamas are read in Meta's format: give the model in Hugging Face's layout"
    )
