"""The kernels for GPUs, compiled as the functions that launch them ask for; no GPU is needed.

A program of its own, for Triton reads TRITON_INTERPRET where kernels are defined. It calls those
functions with tensors of the CPU, has each launch compile and no more, and prints what came of it:
the fields of `Compiled`, a JSON object a line.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COLUMNS = 4096
"""Of LLaMA-2 7B: rows of one of the largest tiles."""

MOST_COLUMNS = 1 << 16
"""Of rows that take the most warps."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was compiled for one kind of GPU.

    Attributes:
        kernel: The name of its function.
        capability: Of the GPU: 80, 90 or 100.
        warps: Of a program.
        constants: Its constexpr arguments by name.
        shared: Bytes of shared memory that a program takes.
        loads: The kinds of loads in its PTX, as ``ld.global.b64``.
        usage: Registers, and instructions that spill them; empty where there is no binary, or
            Triton comes without cuobjdump.
    """

    kernel: str
    capability: int
    warps: int
    constants: dict[str, str]
    shared: int
    loads: list[str]
    usage: dict[str, int]


def launches(*, all_of_them: bool) -> list[Callable[[], object]]:
    """Calls of the launching functions: of each kernel one, or in 16 and 32 bits by each rule."""
    import numpy as np
    import torch
    from emp_kernels.gpu import histogram, pack, unpack, whole
    from emp_kernels.gpu import prune as pruning
    from emp_kernels.gpu_held import DeviceHeldRows, multiply_rows_there
    from emp_kernels.gpu_workspace import DeviceWorkspace
    from emp_kernels.layout import RowLayout
    from emp_kernels.numbers import BF16, F16, F32
    from emp_kernels.rows import Given, PerRow, Threshold
    from emp_kernels.whole_layout import WholeLayout

    class Zeros(DeviceWorkspace):
        """Nothing runs: what kernels would have written is zero."""

        def on_device(self, name: str, nbytes: int) -> torch.Tensor:
            return super().on_device(name, nbytes).zero_()

    workspace = Zeros(torch.device("cpu"))
    rows, some = torch.zeros((2, COLUMNS), dtype=torch.int16), PerRow(1.0)
    wide = rows.to(torch.int32)
    given = Given(np.zeros((2, COLUMNS // 8), np.uint8))
    threshold = Threshold(1, 1)
    narrow, broad = (RowLayout(number_format=f, columns=COLUMNS, align=16) for f in (BF16, F32))
    powers_of_two = RowLayout(number_format=BF16, columns=COLUMNS, radix=4)
    payload, table = torch.zeros(1 << 16, dtype=torch.uint8), np.zeros((2, 3), np.int64)
    sections = np.zeros((2, 4), np.int64)

    def multiplied(layout: RowLayout, rows: int, tokens: int) -> None:
        dtype = layout.number_format.torch_dtype
        held = DeviceHeldRows(
            records=payload,
            lines=torch.zeros(rows, 7, dtype=torch.int64),
            starts=torch.zeros(rows, 4, 2, dtype=torch.int32),
            layout=layout,
            processors=1,
        )
        x, out = torch.zeros(tokens, COLUMNS, dtype=dtype), torch.zeros(tokens, rows, dtype=dtype)
        multiply_rows_there(held, x, out)

    def multiplied_whole() -> None:
        layout = WholeLayout(
            number_format=BF16,
            weights=4 * COLUMNS,
            widths=(2, 1, 3),
            exponents=(tuple(range(11)),) * 4,
        )
        offsets = torch.zeros(2, dtype=torch.int64)
        sections, _ = whole.check_records(payload, offsets, layout, [4, COLUMNS])
        there = whole.WholeThere.of(payload, sections, layout, [4, COLUMNS])
        x, out = (torch.zeros(16, length, dtype=torch.int16) for length in (COLUMNS, 4))
        there.multiply(x, out, None, 0, processors=1)
        there.unpack(torch.zeros(4, COLUMNS, dtype=torch.int16), 0, 4, None)

    of_each_kernel = [
        lambda: pack.pack(rows, narrow, some, workspace=workspace),
        lambda: pruning.prune(rows, BF16, threshold, out=rows, workspace=workspace),
        lambda: histogram.count_keys(rows.reshape(-1), BF16, workspace),
        lambda: histogram.count_low_parts(wide.reshape(-1), 7, workspace),
        lambda: unpack.unpack(payload, sections, table, narrow, rows, workspace),
        lambda: unpack.unpack(payload, sections, table, broad, wide, workspace),
        lambda: multiplied(narrow, rows=2, tokens=16),
        lambda: multiplied(broad, rows=100, tokens=16),
        multiplied_whole,
    ]
    if not all_of_them:
        return of_each_kernel
    longest = torch.zeros((2, MOST_COLUMNS), dtype=torch.int32)
    of_longest = RowLayout(number_format=F32, columns=MOST_COLUMNS, align=16)
    return [
        *of_each_kernel,
        lambda: pack.pack(wide, broad, some, workspace=workspace),
        lambda: pack.pack(longest, of_longest, some, workspace=workspace),
        lambda: pack.pack(rows, narrow, given, workspace=workspace),
        lambda: pack.pack(rows, narrow, some, workspace=workspace, emit=False),
        lambda: pruning.prune(rows, BF16, some, out=rows, workspace=workspace),
        lambda: pruning.prune(wide, F32, given, out=wide, workspace=workspace),
        lambda: pruning.select(wide, some, workspace=workspace),
        lambda: histogram.count_keys(rows.reshape(-1), F16, workspace),
        lambda: histogram.count_bins(wide.reshape(-1), workspace),
        lambda: unpack.unpack(payload, sections, table, powers_of_two, rows, workspace),
        lambda: multiplied(narrow, rows=100, tokens=1),
    ]


@contextmanager
def launching_compiles_for(capability: int, *, binaries: bool) -> Iterator[dict[int, Any]]:
    """Have launches compile for a GPU that is not there; what they compiled is found in the end."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self) -> int:
            return capability

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    found: dict[int, Any] = {}
    run, make_cubin = JITFunction.run, CUDABackend.make_cubin

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ARG001 (Triton gives it)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[id(kernel)] = self, kernel
        return kernel

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    if not binaries:
        CUDABackend.make_cubin = lambda *_: b""
    try:
        yield found
    finally:
        JITFunction.run, CUDABackend.make_cubin = run, make_cubin


def usage_of(cubin: bytes) -> dict[str, int]:
    """Registers of a binary's kernel, and instructions that spill some or fetch them again.

    Nothing where Triton comes without cuobjdump.
    """
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.check_output([program, "-res-usage", "-sass", file.name], text=True)
    (registers,) = re.findall(r"\bREG:(\d+)", told)
    return {"registers": int(registers), "spills": len(re.findall(r"\b(?:STL|LDL)\b", told))}


def main() -> None:
    """Compile all for sm_90, and PTX of each kernel for sm_80 and sm_100."""
    for capability in (90, 80, 100):
        with launching_compiles_for(capability, binaries=capability == 90) as found:
            for launch in launches(all_of_them=capability == 90):
                launch()
        for function, kernel in found.values():
            cubin = kernel.asm.get("cubin", b"")
            names = [parameter.name for parameter in function.params]
            constants = {names[path[0]]: str(value) for path, value in kernel.src.constants.items()}
            result = Compiled(
                function.fn.__name__,
                capability,
                kernel.metadata.num_warps,
                constants,
                kernel.metadata.shared,
                sorted(set(re.findall(r"\bld\.[\w.]+", kernel.asm["ptx"]))),
                usage_of(cubin) if cubin else {},
            )
            print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
