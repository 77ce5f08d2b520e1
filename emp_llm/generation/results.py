"""What was generated, what it took, and where the texts of two models part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emp_llm.evaluation.found_model import Found
    from emp_llm.generation.options import GenerateOptions

__all__ = ["Agreement", "Generated", "Generation", "Weights", "weights_of"]

Weights = Literal["dense", "unpacked", "packed", "pruned"]
"""How weights lie in memory: dense, as stored or unpacked, or packed, as stored or pruned."""


def weights_of(found: Found, options: GenerateOptions) -> Weights:
    """How the weights of a model will lie in memory."""
    if options.keep_packed:
        return "packed" if found.packed else "pruned"
    return "unpacked" if found.packed else "dense"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The text of one model, and what it took.

    Attributes:
        model: Its Hub id or folder.
        revision: The commit of a model of the Hub, else None.
        weights: How its weights lay in memory.
        weights_bytes: Bytes that they took there, with the model's buffers.
        dtype: Their dtype.
        device: Where the model ran; the first of several devices.
        threads: Threads on the CPU.
        prompt_ids: The prompt's tokens.
        new_ids: The tokens that were generated, with one that ended the text.
        text: Their text, without special tokens.
        ended: What ended the text: the model (``text``), ``max_new_tokens``, or the last of the
            model's ``positions``.
        load_seconds: Until the model was loaded, all weights were read and kernels compiled.
        first_seconds: From the call of `generate` to the first token.
        decode_seconds: From the first token to the last.
        bytes_before: Resident memory of the process before the model was loaded.
        resident_bytes: The same after the text.
        peak_bytes: The most that it was.
        gpu_peak_bytes: The most memory that torch held on GPUs, all together; None without.
    """

    model: str
    revision: str | None
    weights: Weights
    weights_bytes: int
    dtype: str
    device: str
    threads: int
    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    text: str
    ended: Literal["text", "max_new_tokens", "positions"]
    load_seconds: float
    first_seconds: float
    decode_seconds: float
    bytes_before: int
    resident_bytes: int
    peak_bytes: int
    gpu_peak_bytes: int | None

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt a second, until the first token was there."""
        return len(self.prompt_ids) / self.first_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first; None if there was no other."""
        return (len(self.new_ids) - 1) / self.decode_seconds if len(self.new_ids) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, tokens by their number."""
        fields = asdict(self)
        tokens = {f"{kind}_tokens": len(fields.pop(f"{kind}_ids")) for kind in ("prompt", "new")}
        rates = {
            "prompt_tokens_per_second": self.prompt_rate,
            "decode_tokens_per_second": self.decode_rate,
        }
        return fields | tokens | rates


@dataclass(frozen=True)
class Agreement:
    """How far the texts of two models are the same.

    Attributes:
        tokens: How many tokens they have in common before they part.
        same: Whether they do not part.
        model_goes_on: The next words of the first, "" where it ends; None if they do not part.
        against_goes_on: The same of the second.
    """

    tokens: int
    same: bool
    model_goes_on: str | None = None
    against_goes_on: str | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `emp_llm.generate` returns.

    Attributes:
        options: How the text was generated.
        prompt: What it began with.
        model: The text of the model.
        against: The text of the other; None without one.
    """

    options: GenerateOptions
    prompt: str
    model: Generated
    against: Generated | None = None

    @property
    def agreement(self) -> Agreement | None:
        """How far both texts agree; None if there is one only, or the prompt's tokens differ."""
        ours, theirs = self.model, self.against
        if theirs is None or ours.prompt_ids != theirs.prompt_ids:
            return None
        tokens = _common(ours.new_ids, theirs.new_ids)
        if ours.new_ids == theirs.new_ids:
            return Agreement(tokens, same=True)
        place = _common(ours.text, theirs.text)
        if not {ours.text[place : place + 1], theirs.text[place : place + 1]} <= {"", " "}:
            place = max(ours.text.rfind(" ", 0, place), 0)  # they part within a word
        return Agreement(tokens, False, _words(ours.text[place:]), _words(theirs.text[place:]))

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        agreement = self.agreement
        return {
            "options": asdict(self.options),
            "prompt": self.prompt,
            "model": self.model.to_dict(),
            "against": self.against and self.against.to_dict(),
            "agreement": agreement and asdict(agreement),
        }


def _common(ours: Sequence[object], theirs: Sequence[object]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _words(text: str, count: int = 3) -> str:
    return " ".join(text.split()[:count])
