"""What the benchmarks share: weights to work on, the machine they ran on, how results are told."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from emp_kernels.numbers import BF16, F16, F32, NumberFormat

from emp_llm.checkpoint.safetensors_header import encode_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "DTYPES",
    "GB",
    "LLAMA_1B",
    "LLAMA_7B",
    "MB",
    "LlamaSizes",
    "gaussian",
    "known_results",
    "machine",
    "make_checkpoint",
    "prepare_cache",
    "print_table",
    "replace_json",
    "round_bf16",
    "say",
    "spread",
    "spread_rows",
    "versions",
    "write_json",
]

MB, GB = 10**6, 10**9

DTYPES = {"bf16": BF16, "fp16": F16, "fp32": F32}
"""The dtypes of the command lines."""

_POOL_BYTES = 64 << 20
_ROWS_A_WRITE = 512
_STEP = 1 << 20
_SIGMA = 0.02
_INDEX_NAME = "model.safetensors.index.json"
_PACKAGES = ("emp-llm", "numpy", "numba", "torch", "triton", "transformers", "safetensors")


@dataclass(frozen=True)
class LlamaSizes:
    """What the shapes of a Llama's tensors follow from, but for the number of its layers."""

    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000


LLAMA_7B = LlamaSizes(4096, 11008, 32, 32)
LLAMA_1B = LlamaSizes(2048, 5632, 32, 4)
"""Those of LLaMA-2-7B, and of TinyLlama-1.1B, which has 22 layers."""

Patterns = npt.NDArray[np.unsignedinteger]
Shapes = dict[str, tuple[int, ...]]


# --- weights -------------------------------------------------------------------------------------


def gaussian(number_format: NumberFormat, count: int, *, seed: int) -> Patterns:
    """Bit patterns of Gaussian weights, uint16 or uint32 [count], in little memory beside them."""
    rng = np.random.default_rng(seed)
    out = np.empty(count, number_format.storage)
    for start in range(0, count, _STEP):
        part = out[start : start + _STEP]
        values = rng.standard_normal(part.size, np.float32)
        values *= np.float32(_SIGMA)
        part[:] = _patterns(number_format, values)
    return out


def _patterns(number_format: NumberFormat, values: npt.NDArray[np.float32]) -> Patterns:
    """The bit patterns of values rounded to a format."""
    if number_format is BF16:
        return round_bf16(values)
    cast = values if number_format is F32 else values.astype(np.float16)
    return cast.view(number_format.storage)


def round_bf16(values: npt.NDArray[np.float32]) -> Patterns:
    """The bit patterns of the bfloat16 nearest to finite float32 values, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def make_checkpoint(
    folder: Path,
    *,
    layers: int,
    dtype: str,
    shard_bytes: float,
    room: int,
    sizes: LlamaSizes = LLAMA_7B,
) -> None:
    """Write a checkpoint of a Llama's shapes, unless the very same one is there already.

    Args:
        folder: Where to; anything else in it is deleted.
        layers: Decoder blocks; 32 of LLaMA-2-7B make 13.5 GB in bf16.
        dtype: A key of `DTYPES`.
        shard_bytes: Size that a file is not to pass.
        room: Free bytes to ask for beyond it, in multiples of the checkpoint's size.
        sizes: The sizes of its tensors.

    Raises:
        SystemExit: If the disk is too small.
    """
    item = DTYPES[dtype].item_bytes
    shards = _split(_shapes(layers, sizes), shard_bytes / item)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = sum(prod(shape) for shard in shards for shape in shard.values()) * item
    index = {
        "metadata": {"total_size": total, "dtype": dtype},
        "weight_map": {key: n for n, shard in zip(names, shards, strict=True) for key in shard},
    }
    complete = _is_complete(folder, index)
    if not complete:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _check_room(folder, total * (room if complete else room + 1))
    if complete:
        return
    pool = gaussian(DTYPES[dtype], _POOL_BYTES // item, seed=0)
    rng = np.random.default_rng(1)
    for name, shard in zip(names, shards, strict=True):
        say(f"making {name}")
        _write_shard(folder / name, shard, DTYPES[dtype], pool, rng)
    _dump(folder / "config.json", _config(layers, dtype, sizes))
    _dump(folder / _INDEX_NAME, index)  # last: where it is, everything is


def _shapes(layers: int, sizes: LlamaSizes) -> Shapes:
    """Name and shape of every tensor, in the model's order."""
    hidden, inner, vocabulary = sizes.hidden, sizes.inner, sizes.vocabulary
    narrow = hidden // sizes.heads * sizes.key_value_heads
    block = {
        "input_layernorm": (hidden,),
        **{
            f"self_attn.{part}_proj": (narrow if part in "kv" else hidden, hidden)
            for part in "qkvo"
        },
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{f"model.layers.{n}.{k}.weight": v for n in range(layers) for k, v in block.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def _split(shapes: Shapes, most: float) -> list[Shapes]:
    """The tensors of each shard: no more than `most` weights, unless one tensor has more."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        used = sum(map(prod, shards[-1].values()))
        if shards[-1] and used + prod(shape) > most:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _is_complete(folder: Path, index: Mapping[str, Any]) -> bool:
    path = folder / _INDEX_NAME
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == index


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + GB:
        raise SystemExit(
            f"{needed / GB:.1f} GB and 1 GB to spare are needed on the disk of --folder, "
            f"{free / GB:.1f} GB are free: free some, give another --folder or fewer --layers"
        )


def _write_shard(
    path: Path,
    shapes: Shapes,
    number_format: NumberFormat,
    pool: Patterns,
    rng: np.random.Generator,
) -> None:
    """Write a shard whose rows are stretches of the pool, each from a place drawn for it.

    What has one dimension is ones, as norms are: with smaller ones activations would be subnormal.
    """
    item = number_format.item_bytes
    view = memoryview(pool.view(np.uint8))
    entries = [(key, number_format.name, s, prod(s) * item) for key, s in shapes.items()]
    with path.open("wb", buffering=0) as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(_patterns(number_format, np.ones(shape, np.float32)).tobytes())
                continue
            rows, columns = shape
            starts = rng.integers(0, pool.size - columns, rows) * item
            for first in range(0, rows, _ROWS_A_WRITE):
                some = starts[first : first + _ROWS_A_WRITE].tolist()
                written = os.writev(file.fileno(), [view[s : s + columns * item] for s in some])
                if written != len(some) * columns * item:
                    raise OSError(f"{path.name} could not be written: is the disk full?")
        os.fsync(file.fileno())


def _config(layers: int, dtype: str, sizes: LlamaSizes) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": DTYPES[dtype].torch_name,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


# --- the page cache ------------------------------------------------------------------------------


def prepare_cache(files: Sequence[Path], *, cold: bool) -> None:
    """Read files into the page cache as far as they fit, or drop them from there."""
    for file in files:
        with file.open("rb", buffering=0) as source:
            if cold:
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                subprocess.run(["cat"], stdin=source, stdout=subprocess.DEVNULL, check=True)


# --- the machine ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on of this machine; nothing that tells whose it is."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that do the work; None where one is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


# --- results -------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Some figures and their median, in the order they came."""
    return {"median": median(values), "all": list(values)}


def say(text: str) -> None:
    """Tell how the work goes on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def write_json(
    path: Path, benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write a benchmark's results with all that is needed to compare them with others."""
    content = {
        "benchmark": benchmark,
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "results": dict(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _dump(path, content)


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def spread_rows(
    results: Mapping[str, Any], figures: Iterable[tuple[str, str, float, int]]
) -> list[list[str]]:
    """Rows of a table: median and rounds of some results.

    Args:
        results: Of each key what `spread` gave.
        figures: Label, key, unit to divide by, and digits behind the point, a row each.
    """
    rows = []
    for label, key, unit, digits in figures:
        values = [results[key]["median"], *results[key]["all"]]
        first, *others = (f"{value / unit:.{digits}f}" for value in values)
        rows.append([label, first, " ".join(others)])
    return rows


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length under each other, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def known_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a table that an earlier run wrote, by name; none if there is no file.

    Raises:
        SystemExit: If they were measured with other settings.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != settings:
        raise SystemExit(
            f"{path}: its rows were measured with {content['settings']}, not {settings}: give the "
            "same or another --json"
        )
    results: dict[str, Any] = content["results"]
    return results


def replace_json(
    path: Path, benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Replace the results of a table, so that one of both is whole at any time."""
    new = path.with_suffix(".new")
    write_json(new, benchmark, settings, results)
    new.replace(path)
