"""For `bench_gpu.py`: how much there is to do, in full or to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Sizes"]

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
        tokens: That packed and dense weights are multiplied with.
    """

    shapes: tuple[Shape, ...]
    pool: int
    mlp: tuple[Shape, ...]
    layers: int
    host_layers: int
    bus_bytes: int
    threads: tuple[int, ...]
    rounds: int
    tokens: tuple[int, ...]


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
    tokens=(1, 4, 16, 512),
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
    tokens=(1, 20),
)
