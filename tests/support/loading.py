"""Tiny models loaded by from_pretrained, and what they are compared by."""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.architectures import ARCHITECTURES, V
from support.checkpoints import Tensors
from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

each_with_a_dtype = pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(
            *(architecture, dtype),
            id=f"{architecture}-{name}",
            marks=[] if (place + number) % len(DTYPES) == 0 else [pytest.mark.slow],
        )
        for place, architecture in enumerate(ARCHITECTURES)
        for number, (name, dtype) in enumerate(DTYPES.items())
    ],
)
"""Each architecture with one dtype after the other; with the other two where slow tests are run."""


def load_model(architecture: str, folder: Path | str, **options: Any) -> PreTrainedModel:
    """Load a model of one of the architectures of `architectures.py`."""
    loader = getattr(transformers, ARCHITECTURES[architecture][0])
    return loader.from_pretrained(folder, **options)


def state(model: torch.nn.Module) -> Tensors:
    """All parameters and buffers that a model would save, as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says of eight fixed tokens; of its base class the last hidden state."""
    tokens = (torch.arange(8) * 5 + 4).remainder(V)[None]
    more = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = model(input_ids=tokens, **more)
    result: torch.Tensor = found[0]
    assert result.isfinite().all()
    return result


def zeros(model: PreTrainedModel, name: str) -> int:
    """How many weights of a parameter are zero."""
    return int((model.get_parameter(name) == 0).sum())


class Traces:
    """What loading could leave behind in a process: threads, open files, changed settings."""

    def __init__(self) -> None:
        self._before = self._look()

    def left(self) -> set[str]:
        """What was not there before."""
        if self._look() - self._before:
            gc.collect()  # what only an error's traceback has held goes with it
        return self._look() - self._before

    @staticmethod
    def _look() -> set[str]:
        files = {
            f"{link.name} {link.readlink()}"
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink() and str(link.readlink()).endswith(".safetensors")
        }
        threads = {
            f"{thread.name} {thread.ident}"
            for thread in threading.enumerate()
            if thread.name.startswith("emp")
        }
        settings = {f"{name}={value}" for name, value in os.environ.items() if name[:3] == "HF_"}
        return files | threads | settings
