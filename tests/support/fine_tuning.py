"""Tiny models pruned while they are loaded, and trained a few steps by transformers' Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.architectures import V
from support.checkpoints import Tensors
from support.loading import load_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from emp_llm import EmpConfig

TOKENS = (torch.arange(12) * 5 + 4).remainder(V)


def pruned_model(
    architecture: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A tiny model with its MLPs pruned while it was loaded."""
    return load_model(architecture, folder, quantization_config=EmpConfig(), dtype=dtype)


def batch() -> dict[str, torch.Tensor]:
    """Two sequences, to be predicted."""
    rows = torch.stack([TOKENS, TOKENS.flip(0)])
    return {"input_ids": rows, "labels": rows}


def make_trainer(
    model: torch.nn.Module | None,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    optimizer: torch.optim.Optimizer | None = None,
    model_init: Any = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer of three steps with two sequences in each, which saves after every step."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = [{"input_ids": TOKENS.roll(i), "labels": TOKENS.roll(i)} for i in range(24)]
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
        model_init=model_init,
    )


def lost_zeros(before: Tensors, after: Tensors) -> dict[str, int]:
    """How many zeros of each matrix are anything but +0.0 now, of the matrices that had some."""
    found = {}
    for name, was in before.items():
        zero = was == 0
        if was.ndim > 1 and zero.any():
            integers = torch.int16 if after[name].element_size() == 2 else torch.int32
            found[name] = int((after[name].view(integers)[zero] != 0).sum())
    return found
