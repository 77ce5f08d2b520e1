"""Times the CPU kernels on one core, in GB/s of dense weights, beside a copy of the same bytes.

    python benchmarks/bench_kernels.py --json result.json

Rows are Gaussian. Before anything is timed, what the kernels make of some rows is compared with
the reference in float64. Row blocks are taken in turn from 64 MB, more than the cache of a core, so
that weights come from memory; what is written goes to one place again and again, as in a real run.
The copy does the same and is the limit. Operations take turns, and the best round of each counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from common import DTYPES, GB, gaussian, print_table, say, spread, write_json
from emp_kernels import dispatch
from emp_kernels.dispatch import Impl
from emp_kernels.histogram import BlockHistogram
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import F32, NumberFormat, tensor_of_patterns
from emp_kernels.reference import keep_mask, pack_row
from emp_kernels.rows import PackedRows, WholeRecords, Workspace
from emp_kernels.whole_reference import pack_whole
from kernel_basics import RULE, agree, authors_way, check_authors_counts, row_layout

from emp_llm.tensors.code_choice import choose_code, read_sample, record_rows
from emp_llm.tensors.geometry import Geometry, WholeGeometry
from emp_llm.tensors.packed import PackedTensor
from emp_llm.tensors.whole import WholeTensor

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = (288, 4096, 11008, 28672)
FULL_BYTES, QUICK_BYTES = (8 << 20, 64 << 20), (1 << 20, 8 << 20)  # of a row block, of all

Patterns = npt.NDArray[np.unsignedinteger]


@dataclass
class Case:
    """Row blocks of one format and length, and where results go."""

    dtype: str
    blocks: list[Patterns]
    layout: RowLayout
    whole: WholeTensor
    out: Patterns
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def number_format(self) -> NumberFormat:
        """Format of the weights."""
        return self.layout.number_format

    @property
    def nbytes(self) -> int:
        """Dense bytes of all row blocks."""
        return sum(block.nbytes for block in self.blocks)

    def poison(self) -> None:
        """Fill the place for results with what no right result holds: NaN."""
        self.out.fill(np.iinfo(self.out.dtype).max)

    def pack(self, block: Patterns, impl: Impl) -> PackedRows:
        """Weights to records."""
        return dispatch.pack_rows(block, self.layout, RULE, impl=impl, workspace=self.workspace)

    def prune(self, block: Patterns, impl: Impl) -> Patterns:
        """Weights to weights with zeros."""
        return dispatch.prune_rows(
            block, self.number_format, RULE, out=self.out, impl=impl, workspace=self.workspace
        ).weights

    def unpack(self, packed: PackedRows, impl: Impl) -> Patterns:
        """Records to weights with zeros."""
        return dispatch.unpack_rows(
            packed.payload,
            packed.table,
            self.layout,
            out=self.out,
            impl=impl,
            workspace=self.workspace,
        )

    def pack_all(self, block: Patterns, impl: Impl) -> WholeRecords:
        """Weights to whole records."""
        return dispatch.pack_whole(block, self.whole.layout, impl=impl, workspace=self.workspace)

    def unpack_all(self, records: WholeRecords, impl: Impl) -> Patterns:
        """Whole records to weights."""
        dispatch.unpack_whole(
            records.payload,
            records.lengths,
            self.whole.layout,
            self.out,
            impl=impl,
            workspace=self.workspace,
        )
        return self.out


def main() -> None:
    """Reads the command line, then checks, measures and prints case by case."""
    args = parse()
    torch.set_num_threads(1)
    impls: list[Impl] = ["simd", "scalar"] if dispatch.resolve("auto") == "simd" else ["scalar"]
    block_bytes, pool_bytes = QUICK_BYTES if args.quick else FULL_BYTES
    results = []
    for dtype in args.dtypes:
        number_format = DTYPES[dtype]
        pool = gaussian(number_format, pool_bytes // number_format.item_bytes, seed=0)
        for columns in args.columns:
            say(f"{dtype}, rows of {columns}")
            case = make_case(dtype, columns, pool, block_bytes)
            check(case, impls)
            results.append(measure(case, impls, args.repeats))
    print_results(results)
    if args.json:
        settings = {"repeats": args.repeats, "quick": args.quick, "beta": RULE.beta}
        write_json(args.json, "kernels", settings, {"cases": results})


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--columns", nargs="+", type=int, default=list(COLUMNS), metavar="C")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="little data, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if args.repeats < 1 or not all(1 <= columns <= 1 << 18 for columns in args.columns):
        parser.error(f"--repeats must be positive, --columns from 1 to {1 << 18}")
    return args


def make_case(dtype: str, columns: int, pool: Patterns, block_bytes: int) -> Case:
    """Cut as many row blocks from the pool as there are in it."""
    number_format = DTYPES[dtype]
    rows = max(1, block_bytes // (columns * number_format.item_bytes))
    rows += -rows % record_rows(columns)  # whole records, as in row blocks of a real run
    size = rows * columns
    starts = range(0, pool.size - size + 1, size)
    blocks = [pool[start : start + size].reshape(rows, columns) for start in starts]
    layout = row_layout(number_format, columns)
    whole = whole_tensor(number_format, pool[: len(blocks) * size].reshape(-1, columns))
    return Case(dtype, blocks, layout, whole, np.empty_like(blocks[0]))


def whole_tensor(number_format: NumberFormat, weights: Patterns) -> WholeTensor:
    """How `emp-llm pack` packs a tensor of all row blocks."""
    columns = weights.shape[1]
    geometry = WholeGeometry(
        number_format=number_format, shape=weights.shape, record_rows=record_rows(columns)
    )
    sample = read_sample(geometry, lambda block: weights[block.start : block.stop])
    layout = choose_code(sample, geometry)
    if layout is None:
        raise AssertionError("Gaussian weights get smaller")
    return WholeTensor(geometry, layout)


# --- the proof -----------------------------------------------------------------------------------


def check(case: Case, impls: list[Impl]) -> None:
    """Compare every kernel with the reference on the first, the middle and the last row."""
    block = case.blocks[0]
    rows = sorted({0, len(block) // 2, len(block) - 1})
    keeps = [keep_mask(case.number_format.magnitudes(row), RULE.beta) for row in block[rows]]
    expected = np.where(keeps, block[rows], 0)
    records = [pack_row(row, k, case.layout) for row, k in zip(block[rows], keeps, strict=True)]
    for impl in impls:
        case.poison()
        agree("prune_rows", impl, case.prune(block, impl)[rows], expected)
        packed = case.pack(block, impl)
        ends = case.layout.offsets(packed.table[:, 0], packed.table[:, 1])
        for row, (*line, record) in zip(rows, records, strict=True):
            found = packed.payload[ends[row] : ends[row + 1]]
            agree("pack_rows", impl, packed.table[row], line)
            agree("pack_rows", impl, found, np.frombuffer(record, np.uint8))
        case.poison()
        agree("unpack_rows", impl, case.unpack(packed, impl)[rows], expected)
        check_whole(case, impl)
    check_histogram(block[rows], case.number_format)


def check_whole(case: Case, impl: Impl) -> None:
    """Compare a whole record with the reference's, and what is unpacked with the weights."""
    block, layout = case.blocks[0], case.whole.layout
    records = case.pack_all(block, impl)
    first, lengths = pack_whole(block.reshape(-1)[: layout.weights], layout)
    agree("pack_whole", impl, records.lengths[0], lengths[0])
    agree("pack_whole", impl, records.payload[: first.size], first)
    case.poison()
    agree("unpack_whole", impl, case.unpack_all(records, impl), block)


def check_histogram(weights: Patterns, number_format: NumberFormat) -> None:
    """Compare a histogram with numpy's."""
    found = BlockHistogram(weights, number_format)
    keys = (weights & number_format.key_mask).reshape(-1).astype(np.int64)
    bins = keys >> 16 if number_format is F32 else keys
    size = len(found.counts)
    agree("BlockHistogram", "", found.counts, np.bincount(bins, minlength=size))
    if number_format is F32:
        low = keys & 0xFFFF  # their sums stay below 2**53 here, so float64 holds them exactly
        agree("BlockHistogram", "", found.low_sums, np.bincount(bins, low, size))
        agree("BlockHistogram", "", found.low_squares, np.bincount(bins, low**2, size))


# --- the clock -----------------------------------------------------------------------------------


def measure(case: Case, impls: list[Impl], repeats: int) -> dict[str, Any]:
    """Time every operation over all row blocks, in turn; returns GB/s of dense weights."""
    packed = [
        PackedRows(rows.table, rows.stats, rows.payload.copy())
        for rows in (case.pack(block, impls[0]) for block in case.blocks)
    ]
    records = [
        WholeRecords(whole.lengths, whole.payload.copy())
        for whole in (case.pack_all(block, impls[0]) for block in case.blocks)
    ]
    actions = operations(case, packed, records, impls)
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            seconds = seconds_of(action, len(case.blocks))
            if number:  # the first round warms up
                rates[name].append(case.nbytes / GB / seconds)
    rates["torch"] = [authors_rate(case)]
    return {
        "dtype": case.dtype,
        "columns": case.layout.columns,
        "packed_ratio": packed_ratio(case, packed),
        "all_ratio": all_ratio(case, records),
        "gb_per_second": {
            name: {"best": max(each), **spread(each)} for name, each in rates.items()
        },
    }


def operations(
    case: Case, packed: list[PackedRows], records: list[WholeRecords], impls: list[Impl]
) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; each takes the number of a row block."""
    blocks = case.blocks
    actions: dict[str, Callable[[int], object]] = {
        "copy": lambda i: np.copyto(case.out, blocks[i]),
        "hist": lambda i: BlockHistogram(blocks[i], case.number_format),
    }
    for impl in impls:
        actions[f"pack {impl}"] = lambda i, impl=impl: case.pack(blocks[i], impl)
        actions[f"prune {impl}"] = lambda i, impl=impl: case.prune(blocks[i], impl)
        actions[f"unpack {impl}"] = lambda i, impl=impl: case.unpack(packed[i], impl)
        actions[f"pack all,{impl}"] = lambda i, impl=impl: case.pack_all(blocks[i], impl)
        actions[f"unpack all,{impl}"] = lambda i, impl=impl: case.unpack_all(records[i], impl)
    return actions


def seconds_of(action: Callable[[int], object], count: int) -> float:
    """Seconds that an action takes over all row blocks."""
    start = thread_time()
    for i in range(count):
        action(i)
    return thread_time() - start


def authors_rate(case: Case) -> float:
    """GB/s of the authors' way, once over one row block."""
    block = case.blocks[0]
    dtype = case.number_format.torch_dtype
    weights = tensor_of_patterns(block).view(dtype)
    start = thread_time()
    pruned = authors_way(weights)
    seconds = thread_time() - start
    check_authors_counts(pruned, tensor_of_patterns(case.prune(block, "auto")).view(dtype))
    return block.nbytes / GB / seconds


def packed_ratio(case: Case, packed: list[PackedRows]) -> float:
    """Packed bytes, row table included, over dense bytes."""
    rows = sum(len(block) for block in case.blocks)
    geometry = Geometry(number_format=case.number_format, shape=(rows, case.layout.columns))
    table = PackedTensor(geometry, case.layout).table_bytes
    return (sum(rows.payload.size for rows in packed) + table) / case.nbytes


def all_ratio(case: Case, records: list[WholeRecords]) -> float:
    """The same of whole records, with their lengths and the parameters."""
    size = sum(whole.payload.size for whole in records) + case.whole.table_bytes
    return (size + len(case.whole.encode_meta())) / case.nbytes


# --- the result ----------------------------------------------------------------------------------


def print_results(results: list[dict[str, Any]]) -> None:
    """Prints the best rates, and how many copies of the same bytes each operation costs."""
    names = list(results[0]["gb_per_second"])
    print("GB/s of dense weights, one core. hist: BlockHistogram; torch: the authors' way")
    print_table(table(results, names, lambda rate, _: f"{rate:.2f}"))
    print("\ntime as a multiple of the copy's; packed / dense bytes")
    rows = table(results, names[1:], lambda rate, copy: f"{copy / rate:.1f}")
    for head, key in ("packed", "packed_ratio"), ("all packed", "all_ratio"):
        ratios = [head, "/dense", *(f"{case[key]:.4f}" for case in results)]
        rows = [[*row, ratio] for row, ratio in zip(rows, ratios, strict=True)]
    print_table(rows)


def table(
    results: list[dict[str, Any]], names: list[str], show: Callable[[float, float], str]
) -> list[list[str]]:
    """Two lines of head, then a line for each case."""
    heads = [name.partition(" ") for name in names]
    rows = [["", *(head[0] for head in heads)], ["", *(head[2] for head in heads)]]
    for case in results:
        rates = {name: rounds["best"] for name, rounds in case["gb_per_second"].items()}
        cells = [show(rates[name], rates["copy"]) for name in names]
        rows.append([f"{case['dtype']} {case['columns']}", *cells])
    return rows


if __name__ == "__main__":
    main()
