"""One model in memory at a time: loaded, pruned on the way or not, measured and forgotten."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from emp_llm.errors import OptionError
from emp_llm.integration.configs import EmpConfig
from emp_llm.perplexity import Perplexity, Protocol, perplexity
from emp_llm.progress import Progress
from emp_llm.texts import Text

__all__ = ["Bench"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class Bench:
    """Measures one model's perplexity on one text, as it is and pruned.

    Args:
        folder: The model's.
        text: What it predicts.
        context: As for `emp_llm.perplexity.perplexity`.
        protocol: As for `emp_llm.perplexity.perplexity`.
        dtype: What the model computes in; ``auto`` for the checkpoint's own.
        device: ``auto`` (all GPUs there are, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        progress: Told of the tokens of each measurement.

    Attributes:
        settings: What was asked for, as JSON can hold it.

    Raises:
        OptionError: If there is no such dtype or device.
    """

    def __init__(
        self,
        folder: Path,
        text: str | Text,
        *,
        context: int,
        protocol: Protocol,
        dtype: str,
        device: str,
        progress: Progress,
    ) -> None:
        if dtype not in _DTYPES:
            raise OptionError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}")
        self._device_map = _device_map(device)
        self._text = text if isinstance(text, Text) else Text("text", text)
        self._folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._progress = progress
        self.settings: dict[str, Any] = {
            "text": self._text.name,
            "context": context,
            "protocol": protocol,
            "dtype": dtype,
        }

    def measure(self, label: str, how: EmpConfig | None = None) -> Perplexity:
        """The perplexity of the model.

        Args:
            label: What progress calls this measurement.
            how: How to prune the model while it is loaded; None to leave it dense.
        """
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                self._folder,
                dtype=self.settings["dtype"],
                device_map=self._device_map,
                quantization_config=how,
            )
        try:
            return perplexity(
                model,
                self._tokenizer,
                self._text,
                context=self.settings["context"],
                protocol=self.settings["protocol"],
                progress=_Labelled(self._progress, label),
            )
        finally:
            # before the next one is loaded; models are full of cycles
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _Labelled:
    """Progress whose stages go by another name."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._label = label

    def begin(self, stage: str, total: int, unit: str = "B") -> None:  # noqa: ARG002
        self._progress.begin(self._label, total, unit)

    def advance(self, count: int) -> None:
        self._progress.advance(count)


def _device_map(device: str) -> str | dict[str, str] | None:
    """What transformers calls a device."""
    if device == "auto":
        return "auto" if torch.cuda.is_available() else None
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise OptionError(
            f"device is {device!r}; choose one of auto, cpu, cuda and cuda:0"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device is {device!r}, but torch sees no GPU: choose auto or cpu")
    return {"": device}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would run through ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
