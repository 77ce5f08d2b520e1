"""Times the GPU kernels in GB/s of dense weights, beside a device copy of the same bytes.

    python benchmarks/bench_gpu.py --json result.json

Weights are Gaussian, other ones in each run. Before a shape is timed, what the kernels make of it
is compared with the CPU's kernels, with the reference and with plain counts. Sets of weights are
taken in turn, 2 GB of them in bf16, more than any cache holds. The device's own clock is read
before and after all of them, and the median round counts. The authors' way, abs, sums, sort and
scatter in torch on the same device, is timed beside.

Products of a few tokens and of many with packed weights, pruned ones and whole records, are timed
beside torch's with dense ones.

Then LLaMA-2-7B's MLPs are packed, once from the device's memory to it, once from the host's to the
host's, row block by row block as `emp-llm prune` does. Most of the time goes to compiling kernels
for each dtype and number of columns. With TRITON_INTERPRET=1 and --quick all of it runs on a CPU,
to see that it does: times mean nothing then.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("triton") is None:  # which the imports below need
    raise SystemExit("the kernels for GPUs need Triton: pip install triton")

import torch
from common import DTYPES, say, spread, write_json
from emp_kernels.errors import NoDeviceError
from emp_kernels.gpu_devices import find_devices, interpreted
from emp_kernels.gpu_workspace import DeviceWorkspace
from gpu_kernels import Case, Clock, Timed, free_bytes, random_patterns
from gpu_mlps import make_mlps, measure_bus, measure_host, measure_mlps, measure_mlps_with_tables
from gpu_products import measure_products
from gpu_sizes import FULL, QUICK, Sizes
from gpu_tables import print_results


def main() -> None:
    """Reads the command line, then checks, measures and prints part by part."""
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
        "mlps": {**on_device, "threads": measure_mlps_with_tables(mlps, sizes)},
        "host": measure_host(sizes, device),
    }
    print_results(results)
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
    """What the results depend on of a GPU."""
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
        timed = summary(dtype, name, case.measure(clock))
        results.append({**timed, "products": measure_products(case, sizes.tokens, clock)})
    return results


def summary(dtype: str, name: str, timed: dict[str, Timed]) -> dict[str, Any]:
    """The results of one shape, as they are written."""
    return {
        "dtype": dtype,
        "shape": name,
        "packed_ratio": timed["pack"].moved_bytes / timed["pack"].dense_bytes - 1,
        "gb_per_second": {key: each.rate for key, each in timed.items()},
        "copies": {key: each.copies(timed["copy"]) for key, each in timed.items()},
        "seconds": {key: spread(each.seconds) for key, each in timed.items()},
        "dense_bytes": {key: each.dense_bytes for key, each in timed.items()},
    }


if __name__ == "__main__":
    main()
