"""Whether a recovery fits in memory: asked before the masks are made, which takes long."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.session import device_of
from emp_llm.calibration.tensor_loading import compute_dtype
from emp_llm.errors import OptionError

if TYPE_CHECKING:
    from emp_llm.checkpoint.checkpoint import Checkpoint
    from emp_llm.options import CalibrationOptions
    from emp_llm.pruning.plan import PruningPlan

__all__ = ["available_bytes", "check_memory", "needed_bytes", "training_dtype"]

_STATE_BYTES = 3 * 4 + 1
"""Of each trained weight: its value and two moments in float32, and whether it is kept."""

_DEFAULT_LENGTH = 2048


def training_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What a recovery computes in: bfloat16 for a checkpoint in it, or else float32.

    Gradients would underflow in float16.
    """
    is_bfloat16 = compute_dtype(checkpoint) == torch.bfloat16
    return torch.bfloat16 if is_bfloat16 else torch.float32


def needed_bytes(plan: PruningPlan, tokens: int) -> int:
    """About how much memory a recovery takes.

    Args:
        plan: What is trained, and the model.
        tokens: Tokens in a sample.

    Returns:
        Bytes of all weights; of the dense values, gradients and state of those that are trained;
        and of the activations of one sample, which are estimated: twice what goes into each matrix
        and comes out of it, of experts of one kind once, and four times that of embeddings and the
        output head.
    """
    item = training_dtype(plan.checkpoint).itemsize
    targets = {target.name for target in plan.all_targets}
    weights = trained = 0
    numbers: dict[tuple[str | None, str], int] = {}
    for name, (_, entry) in plan.checkpoint.tensors.items():
        size, decision = math.prod(entry.shape), plan.decisions[name]
        weights += size
        if name in targets:
            trained += size
        if len(entry.shape) >= 2:
            kind = name if decision.block is None else re.sub(r"\d+", "", name)
            numbers[decision.block, kind] = sum(entry.shape[-2:]) * (2 if decision.block else 4)
    state = trained * (2 * item + _STATE_BYTES)
    return weights * item + state + tokens * item * sum(numbers.values())


def available_bytes(device: torch.device) -> int:
    """The memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc/meminfo does not say how much memory is available")
    return int(found[1]) * 1024


def check_memory(plan: PruningPlan, data: CalibrationOptions) -> None:
    """Refuse a recovery that does not fit in memory.

    Args:
        plan: What is trained, and the model.
        data: The length of samples, and the device.

    Raises:
        OptionError: If it does not.
    """
    device = device_of(data.device)
    needed = needed_bytes(plan, data.length or _DEFAULT_LENGTH)
    free = available_bytes(device)
    if needed > free:
        raise OptionError(
            f"recover: trains the whole model, which takes about {needed / 1e9:.1f} GB, and "
            f"{device} has {free / 1e9:.1f} GB free: leave --recover out (--preset repaired), "
            "prune fewer tensors, or calibrate on a device with more memory"
        )
