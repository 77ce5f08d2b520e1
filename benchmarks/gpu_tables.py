"""For `bench_gpu.py`: the results, printed."""

from __future__ import annotations

from typing import Any

from common import GB, print_table

__all__ = ["print_results"]


def print_results(results: dict[str, Any]) -> None:
    """Prints the medians.

    Args:
        results: As `bench_gpu.py` writes them.
    """
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
            medians = [f"{case[key][name]:.{digits}f}" for name in names]
            rows.append([f"{case['dtype']} {case['shape']}", *medians])
        print_table(rows)
    print("\ntimes as fast as the authors' way")
    rows = [["", "pack", "prune"]]
    for case in results["cases"]:
        rates = case["gb_per_second"]
        ratios = [f"{rates[name] / rates['torch']:.0f}" for name in ("pack", "prune")]
        rows.append([f"{case['dtype']} {case['shape']}", *ratios])
    print_table(rows)
    _print_products(results)
    _print_mlps(results)


def _print_products(results: dict[str, Any]) -> None:
    """Prints how fast weights are multiplied, packed and dense."""
    print("\nproducts, 10^9 weights a second, and how many times as fast as dense")
    rows = [["", "records", "tokens", "packed", "dense", "ratio"]]
    for case in results["cases"]:
        for one in case["products"]:
            packed, dense = (
                one["weights"] / one["seconds"][name]["median"] / 1e9
                for name in ("packed", "dense")
            )
            label = f"{case['dtype']} {case['shape']}"
            figures = [f"{packed:.0f}", f"{dense:.0f}", f"{packed / dense:.2f}"]
            rows.append([label, one["records"], str(one["tokens"]), *figures])
    print_table(rows)


def _print_mlps(results: dict[str, Any]) -> None:
    """Prints what a model's MLPs took, on the device and from host to host."""
    mlps, host, bus = results["mlps"], results["host"], results["bus_gb_per_second"]
    seconds = mlps["kernel_seconds"]["median"]
    rows = [["", "seconds", "GB/s"]]
    rows.append(_line("packed on the device", seconds, mlps["dense_bytes"]))
    for threads, timed in mlps["threads"].items():
        label = f"and tables copied back, threads: {threads}"
        rows.append(_line(label, timed["seconds"]["median"], mlps["dense_bytes"]))
    print(f"\n{mlps['matrices']} matrices of LLaMA-2-7B's MLPs, bf16")
    print_table(rows)
    print(
        f"\nfrom host to host, {host['dense_bytes'] / GB:.2f} GB in {host['blocks']} row blocks; "
        f"the bus: {bus['up']:.1f} GB/s up, {bus['down']:.1f} GB/s down"
    )
    rows = [["", "seconds", "GB/s"]]
    for threads, timed in host["threads"].items():
        rows.append(_line(f"threads: {threads}", timed["seconds"]["median"], host["dense_bytes"]))
    print_table(rows)


def _line(label: str, seconds: float, nbytes: int) -> list[str]:
    """A line of a table."""
    return [label, f"{seconds:.4f}", f"{nbytes / GB / seconds:.1f}"]
