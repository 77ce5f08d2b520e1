"""Times the GPU kernels in GB/s of dense weights, beside a device copy of the same bytes.

    python benchmarks/bench_gpu.py --json result.json

Weights are Gaussian, other ones in each run. Before a shape is timed, what the kernels make of it
is compared with the CPU's kernels, with the reference and with plain counts. Sets of weights are
taken in turn, 2 GB of them in bf16, more than any cache holds. The device's own clock is read
before and after all of them, and the median round counts. The authors' way, abs, sums, sort and
scatter in torch on the same device, is timed beside.

Then LLaMA-2-7B's MLPs are packed, once from the device's memory to it, once from the host's to the
host's, block by block as `emp-llm prune` does. Most of the time goes to compiling kernels for each
dtype and number of columns. With TRITON_INTERPRET=1 and --quick the whole of it runs on a CPU, to
see that it does: times mean nothing then.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

try:
    import triton  # noqa: F401 (what follows needs it)
except ImportError:
    raise SystemExit("the kernels for GPUs need Triton: pip install triton") from None

import numpy as np
import torch
from bench_kernels import agree
from common import DTYPES, GB, print_table, say, spread, write_json
from emp_kernels import dispatch
from emp_kernels.errors import NoDeviceError
from emp_kernels.gpu.pack import PackLaunch, pack
from emp_kernels.gpu_devices import find_devices, interpreted
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import BF16
from gpu_kernels import RULE, Case, Clock, Timed, random_patterns, row_layout

from emp_llm.runtime.devices import Devices
from emp_llm.runtime.pipeline import Piece, run_pieces
from emp_llm.tensors.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from emp_kernels.rows import Patterns, Workspace

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much there is to do.

    Attributes:
        shapes: [R, C] or [E, R, C], that the kernels are timed on.
        pool: Weights that are taken in turn, set by set.
        mlp: Shapes of one layer's gate, up and down.
        layers: Whose MLPs are packed on the device.
        host_layers: Whose MLPs lie in pinned memory.
        bus_bytes: That are copied to and from the device.
        threads: How many work at the same time, each number tried in turn.
        rounds: Of each timing.
    """

    shapes: tuple[Shape, ...]
    pool: int
    mlp: tuple[Shape, ...]
    layers: int
    host_layers: int
    bus_bytes: int
    threads: tuple[int, ...]
    rounds: int


FULL = Sizes(
    shapes=(
        (4096, 4096),
        (11008, 4096),  # LLaMA-2-7B
        (4096, 11008),
        (28672, 8192),  # 70B
        (8192, 28672),
        (8, 14336, 4096),  # Mixtral
        (8, 4096, 14336),
    ),
    pool=1 << 30,
    mlp=((11008, 4096), (11008, 4096), (4096, 11008)),
    layers=32,
    host_layers=4,
    bus_bytes=1 << 28,
    threads=(1, 4, 8),
    rounds=9,
)
QUICK = Sizes(
    shapes=((1, 40), (2, 1, 24)),
    pool=100,
    mlp=((1, 16), (1, 16), (1, 24)),
    layers=1,
    host_layers=1,
    bus_bytes=1 << 12,
    threads=(2,),
    rounds=1,
)


def main() -> None:
    """Reads the command line, then checks, measures and tells part by part."""
    args = parse()
    sizes = QUICK if args.quick else FULL
    device = find_device(quick=args.quick)
    workspace = DeviceWorkspace(device)
    seed = torch.seed()
    with workspace.active():
        clock = Clock(workspace, sizes.rounds)
        cases = [case for dtype in args.dtypes for case in measure_shapes(dtype, sizes, clock)]
        bus = measure_bus(sizes.bus_bytes, clock)
        mlps = make_mlps(sizes, device)
        on_device = measure_mlps(mlps, clock)
    results: dict[str, Any] = {
        "gpu": describe(device),
        "cases": cases,
        "bus_gb_per_second": bus,
        "mlps": {**on_device, "threads": measure_mlps_told(mlps, sizes)},
        "host": measure_host(sizes, device),
    }
    tell(results)
    if device.type != "cuda":
        print("Triton interpreted the kernels: no time here means anything, nothing is written")
    elif args.json:
        settings = {"rounds": sizes.rounds, "quick": args.quick, "seed": seed}
        write_json(args.json, "gpu", settings, results)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="little data, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args()


def find_device(*, quick: bool) -> torch.device:
    """The first GPU, or with --quick Triton's interpreter.

    Raises:
        SystemExit: If there is none.
    """
    wanted = "bench_gpu.py needs a CUDA device"
    try:
        device = find_devices()[0]
    except NoDeviceError as error:
        raise SystemExit(f"{wanted}: {error}") from error
    if interpreted() and not quick:
        raise SystemExit(f"{wanted}: TRITON_INTERPRET is set, and interpreted it takes --quick")
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures depend on of a GPU."""
    if device.type != "cuda":
        return {"name": "Triton's interpreter"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nothing is in."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


# --- kernel by kernel ----------------------------------------------------------------------------


def measure_shapes(dtype: str, sizes: Sizes, clock: Clock) -> list[dict[str, Any]]:
    """Prove and time all kernels on all shapes."""
    device, count = clock.workspace.device, sizes.pool
    if device.type == "cuda":  # as much again for results, for records, and for what is compared
        count = min(count, free_bytes(device) // 6 // DTYPES[dtype].item_bytes)
    pool = random_patterns(dtype, count, device)
    work = torch.empty_like(pool)
    results = []
    for shape in sizes.shapes:
        name = "×".join(map(str, shape))
        if count < 2 * torch.Size(shape).numel():
            say(f"{dtype} {name}: left out, the device has too little memory")
            continue
        say(f"{dtype} {name}")
        case = Case(dtype, shape, pool, work, clock.workspace)
        case.check()
        results.append(told(dtype, name, case.measure(clock)))
    return results


def told(dtype: str, name: str, timed: dict[str, Timed]) -> dict[str, Any]:
    """The figures of one shape, as they are written."""
    return {
        "dtype": dtype,
        "shape": name,
        "packed_ratio": timed["pack"].moved_bytes / timed["pack"].dense_bytes - 1,
        "gb_per_second": {key: each.rate for key, each in timed.items()},
        "copies": {key: each.copies(timed["copy"]) for key, each in timed.items()},
        "seconds": {key: spread(each.seconds) for key, each in timed.items()},
        "dense_bytes": {key: each.dense_bytes for key, each in timed.items()},
    }


# --- a model's MLPs ------------------------------------------------------------------------------


def make_mlps(sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    """The matrices of a model's MLPs, of as many layers as half of the free memory holds."""
    layers = sizes.layers
    if device.type == "cuda":
        layer_bytes = sum(2 * torch.Size(shape).numel() for shape in sizes.mlp)
        layers = min(layers, free_bytes(device) // 2 // layer_bytes)
    say(f"MLPs of {layers} layers")
    return [
        random_patterns("bf16", torch.Size(shape).numel(), device).view(shape)
        for shape in sizes.mlp * layers
    ]


def measure_mlps(mlps: list[torch.Tensor], clock: Clock) -> dict[str, Any]:
    """Pack all matrices on the device, one launch after the other."""
    launches = [PackLaunch(each, row_layout(BF16, each.shape[1]), clock.workspace) for each in mlps]
    rules = [launch.rows.tensors_of(RULE) for launch in launches]

    def put() -> None:
        for launch, rule in zip(launches, rules, strict=True):
            launch(rule)

    return {
        "matrices": len(mlps),
        "dense_bytes": sum(each.nbytes for each in mlps),
        "kernel_seconds": spread(clock.seconds(put)),
    }


def measure_mlps_told(mlps: list[torch.Tensor], sizes: Sizes) -> dict[str, Any]:
    """The same with tables and sums told to the host, on several threads."""

    def packed(weights: torch.Tensor, workspace: Workspace) -> int:
        assert isinstance(workspace, DeviceWorkspace)
        with workspace.active():
            layout = row_layout(BF16, weights.shape[1])
            return pack(weights, layout, RULE, workspace=workspace).payload.numel()

    pieces = [(each.nbytes, partial(packed, each)) for each in mlps]
    return on_threads(pieces, sizes, mlps[0].device)


def on_threads(
    work: list[tuple[int, Callable[[Workspace], int]]], sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """Time work as a run of emp-llm does it, on each number of threads.

    Args:
        work: Dense bytes of each piece, and what to do with a thread's workspace, which returns
            how many bytes it made.
        sizes: How many threads, and how often.
        device: What the threads work on.
    """
    found: dict[str, Any] = {}
    for threads in sizes.threads:
        seconds: list[float] = []
        for _ in range(sizes.rounds + 1):  # the first warms up
            made: list[int] = []
            pieces = [Piece(nbytes, compute, made.append) for nbytes, compute in work]
            start = perf_counter()
            run_pieces(pieces, threads=threads, devices=Devices((device,)))
            seconds.append(perf_counter() - start)
        found[str(threads)] = {"seconds": spread(seconds[1:]), "packed_bytes": sum(made)}
    return found


# --- from host to host ---------------------------------------------------------------------------


def measure_bus(nbytes: int, clock: Clock) -> dict[str, float]:
    """GB/s of copies from pinned memory and to it, one at a time."""
    device = clock.workspace.device
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    up = clock.seconds(lambda: there.copy_(here, non_blocking=True), replayed=False)
    down = clock.seconds(lambda: here.copy_(there, non_blocking=True), replayed=False)
    return {"up": nbytes / GB / median(up), "down": nbytes / GB / median(down)}


def measure_host(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Pack MLPs from pinned memory to pinned memory, block by block, uploads and all overlapped."""
    blocks: list[Patterns] = []
    for shape in sizes.mlp * sizes.host_layers:
        weights = random_patterns("bf16", torch.Size(shape).numel(), device).cpu()
        pinned = weights.pin_memory() if device.type == "cuda" else weights
        rows = pinned.numpy().view(np.uint16).reshape(shape)
        geometry = Geometry(number_format=BF16, shape=shape)
        blocks += [rows[block.start : block.stop] for block in geometry.row_blocks()]
    check_host(blocks, device)

    def packed(block: Patterns, workspace: Workspace) -> int:
        layout = row_layout(BF16, block.shape[1])
        return dispatch.pack_rows(block, layout, RULE, workspace=workspace).payload.size

    say(f"{len(blocks)} blocks from host to host")
    return {
        "blocks": len(blocks),
        "dense_bytes": sum(each.nbytes for each in blocks),
        "threads": on_threads(
            [(each.nbytes, partial(packed, each)) for each in blocks], sizes, device
        ),
    }


def check_host(blocks: list[Patterns], device: torch.device) -> None:
    """Compare the first and the last block with what the CPU's kernels make of them."""
    for block in (blocks[0], blocks[-1]):
        layout = row_layout(BF16, block.shape[1])
        found = dispatch.pack_rows(block, layout, RULE, workspace=DeviceWorkspace(device))
        expected = dispatch.pack_rows(block, layout, RULE, impl=dispatch.resolve("auto"))
        agree("pack_rows", "triton", found.table, expected.table)
        agree("pack_rows", "triton", found.payload, expected.payload)


# --- the result ----------------------------------------------------------------------------------


def tell(results: dict[str, Any]) -> None:
    """Prints the medians."""
    print(results["gpu"]["name"])
    for title, key, digits, names in (
        (
            "GB/s of dense weights; torch: the authors' way on the same device",
            "gb_per_second",
            0,
            ("copy", "pack", "prune", "hist", "unpack", "torch"),
        ),
        (
            "time as a multiple of a device copy that reads and writes as many bytes",
            "copies",
            2,
            ("pack", "prune", "hist", "unpack", "torch"),
        ),
    ):
        print(f"\n{title}")
        rows = [["", *names]]
        for case in results["cases"]:
            figures = [f"{case[key][name]:.{digits}f}" for name in names]
            rows.append([f"{case['dtype']} {case['shape']}", *figures])
        print_table(rows)
    print("\ntimes as fast as the authors' way")
    rows = [["", "pack", "prune"]]
    for case in results["cases"]:
        rates = case["gb_per_second"]
        ratios = [f"{rates[name] / rates['torch']:.0f}" for name in ("pack", "prune")]
        rows.append([f"{case['dtype']} {case['shape']}", *ratios])
    print_table(rows)
    tell_mlps(results)


def tell_mlps(results: dict[str, Any]) -> None:
    """Prints what a model's MLPs took, on the device and from host to host."""
    mlps, host, bus = results["mlps"], results["host"], results["bus_gb_per_second"]
    seconds = mlps["kernel_seconds"]["median"]
    rows = [["", "seconds", "GB/s"]]
    rows.append(line("packed on the device", seconds, mlps["dense_bytes"]))
    for threads, figures in mlps["threads"].items():
        label = f"and tables told, threads: {threads}"
        rows.append(line(label, figures["seconds"]["median"], mlps["dense_bytes"]))
    print(f"\n{mlps['matrices']} matrices of LLaMA-2-7B's MLPs, bf16")
    print_table(rows)
    print(
        f"\nfrom host to host, {host['dense_bytes'] / GB:.2f} GB in {host['blocks']} blocks; "
        f"the bus: {bus['up']:.1f} GB/s up, {bus['down']:.1f} GB/s down"
    )
    rows = [["", "seconds", "GB/s"]]
    for threads, figures in host["threads"].items():
        rows.append(line(f"threads: {threads}", figures["seconds"]["median"], host["dense_bytes"]))
    print_table(rows)


def line(label: str, seconds: float, nbytes: int) -> list[str]:
    """A line of a table."""
    return [label, f"{seconds:.4f}", f"{nbytes / GB / seconds:.1f}"]


if __name__ == "__main__":
    main()
