"""For `bench_gpu.py`: a model's MLPs, packed on the device, and from the host's memory to it."""

from __future__ import annotations

from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from common import GB, say, spread
from emp_kernels import dispatch
from emp_kernels.gpu.pack import PackLaunch, pack
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import BF16, patterns_of_tensor
from gpu_kernels import Clock, free_bytes, random_patterns
from kernel_basics import RULE, agree, row_layout

from emp_llm.runtime.devices import Devices
from emp_llm.runtime.pipeline import Piece, run_pieces
from emp_llm.tensors.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from emp_kernels.rows import Patterns, Workspace
    from gpu_sizes import Sizes

__all__ = ["make_mlps", "measure_bus", "measure_host", "measure_mlps", "measure_mlps_with_tables"]


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


def measure_mlps_with_tables(mlps: list[torch.Tensor], sizes: Sizes) -> dict[str, Any]:
    """The same with tables and sums copied to the host, on several threads."""

    def packed(weights: torch.Tensor, workspace: Workspace) -> int:
        if not isinstance(workspace, DeviceWorkspace):
            raise TypeError("the threads work on the CPU, not on the device")
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
        sizes: How many threads, and how many rounds.
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
    """Pack MLPs from pinned memory to pinned memory, row block by row block, all overlapped."""
    blocks: list[Patterns] = []
    for shape in sizes.mlp * sizes.host_layers:
        weights = random_patterns("bf16", torch.Size(shape).numel(), device).cpu()
        pinned = weights.pin_memory() if device.type == "cuda" else weights
        rows = patterns_of_tensor(pinned).reshape(shape)
        geometry = Geometry(number_format=BF16, shape=shape)
        blocks += [rows[block.start : block.stop] for block in geometry.row_blocks()]
    check_host(blocks, device)

    def packed(block: Patterns, workspace: Workspace) -> int:
        layout = row_layout(BF16, block.shape[1])
        return dispatch.pack_rows(block, layout, RULE, workspace=workspace).payload.size

    say(f"{len(blocks)} row blocks from host to host")
    return {
        "blocks": len(blocks),
        "dense_bytes": sum(each.nbytes for each in blocks),
        "threads": on_threads(
            [(each.nbytes, partial(packed, each)) for each in blocks], sizes, device
        ),
    }


def check_host(blocks: list[Patterns], device: torch.device) -> None:
    """Compare the first and the last row block with what the CPU's kernels make of them."""
    for block in (blocks[0], blocks[-1]):
        layout = row_layout(BF16, block.shape[1])
        found = dispatch.pack_rows(block, layout, RULE, workspace=DeviceWorkspace(device))
        expected = dispatch.pack_rows(block, layout, RULE, impl=dispatch.resolve("auto"))
        agree("pack_rows", "triton", found.table, expected.table)
        agree("pack_rows", "triton", found.payload, expected.payload)
