"""Loads one model at a time, pruned or not, measures it and frees it."""

from typing import Any

from accelerate.utils.memory import clear_device_cache

from emp_llm.evaluation.found_model import Found
from emp_llm.evaluation.model_loading import Dtype, load_model
from emp_llm.evaluation.perplexity import Perplexity, perplexity
from emp_llm.integration.configs import EmpConfig
from emp_llm.runtime.progress import Progress
from emp_llm.texts.texts import Protocol, Text

__all__ = ["Bench"]


class Bench:
    """Measures one model's perplexity on one text, as it is and pruned.

    Args:
        found: The model.
        text: What it predicts.
        context: As for `emp_llm.evaluation.perplexity.perplexity`.
        protocol: As for `emp_llm.evaluation.perplexity.perplexity`.
        dtype: As for `emp_llm.evaluation.model_loading.load_model`.
        device: As for `emp_llm.evaluation.model_loading.load_model`.
        trust_remote_code: As for `emp_llm.evaluation.model_loading.load_model`.
        progress: Reports the tokens of each measurement.

    Attributes:
        settings: The options of the measurement, for JSON.
    """

    def __init__(
        self,
        found: Found,
        text: str | Text,
        *,
        context: int,
        protocol: Protocol,
        dtype: Dtype,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
    ) -> None:
        self._found = found
        self._text = text if isinstance(text, Text) else Text("text", text)
        self._context, self._protocol = context, protocol
        self._dtype, self._device = dtype, device
        self._trust_remote_code = trust_remote_code
        self._progress = progress
        self.settings: dict[str, Any] = {
            "text": self._text.name,
            "context": context,
            "protocol": protocol,
            "dtype": dtype,
        }

    def measure(
        self, label: str, pruning: EmpConfig | None = None, found: Found | None = None
    ) -> Perplexity:
        """The perplexity of the model.

        Args:
            label: What progress calls this measurement.
            pruning: How to prune the model while it is loaded; None to leave it as it is.
            found: Another model, made of this one; None for the model itself.
        """
        model, tokenizer = load_model(
            found or self._found,
            dtype=self._dtype,
            device=self._device,
            trust_remote_code=self._trust_remote_code,
            pruning=pruning,
        )
        try:
            return perplexity(
                model,
                tokenizer,
                self._text,
                context=self._context,
                protocol=self._protocol,
                progress=_Labelled(self._progress, label),
            )
        finally:
            # before the next one is loaded; models hold themselves in reference cycles
            del model
            clear_device_cache(garbage_collection=True)


class _Labelled:
    """Progress whose stages have another name; their own if it is empty."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._label = label

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        self._progress.begin(self._label or stage, total, unit)

    def advance(self, count: int) -> None:
        self._progress.advance(count)
