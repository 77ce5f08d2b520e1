"""Small folders that are compared with their source, and what verify says then."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    Tensors,
    few_values,
    gaussian,
    llama_config,
    pruned_by_rule,
    write_checkpoint,
)

from emp_llm import (
    EmpError,
    FormatError,
    verify,
)

TinyModel = Callable[..., Path]

H, F = 12, 20
NORM = "model.norm.weight"
TARGETS = (DOWN, GATE, UP)
FORMATS = ("packed", "dense")
GRANULARITIES = ("row", "layer", "model")


def weights_with_ties(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """MLPs of which many weights are equal in magnitude, and a norm."""
    return {
        DOWN: few_values(H, F, dtype=dtype, seed=1),
        GATE: few_values(F, H, dtype=dtype, seed=2),
        UP: few_values(F, H, dtype=dtype, seed=3),
        NORM: gaussian(H, dtype=dtype),
    }


def source_with_ties(folder: Path) -> Path:
    """A checkpoint of these weights, with a file beside them."""
    write_checkpoint(folder, llama_config(H, F), weights_with_ties())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def expected(granularity: str = "row", beta: float = 1.0) -> Tensors:
    """What the rule leaves of the weights, worked out on whole tensors."""
    return pruned_by_rule(weights_with_ties(), TARGETS, beta=beta, granularity=granularity)


def refusal(folder: Path, source: Path | str, kind: type[EmpError] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        verify(folder, against=source)
    assert "\n" not in str(caught.value)
    return str(caught.value)
