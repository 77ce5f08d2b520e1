"""The samples of a calibration: sequences of tokens that start at random places of a text.

Shapes in names: N samples of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emp_llm.errors import OptionError
from emp_llm.files.checksum import hash_name, new_hash
from emp_llm.texts.tokens import check_length, tokenized

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from emp_llm.options import CalibrationOptions
    from emp_llm.rule_fields import SampleFields
    from emp_llm.texts.texts import Text

__all__ = ["Samples", "read_samples"]

_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Tokens to calibrate on.

    Attributes:
        text: Name of the text.
        seed: The seed that the places were drawn by.
        ids_NL: int64 [N, L], token ids.
    """

    text: str
    seed: int
    ids_NL: torch.Tensor

    def description(self) -> SampleFields:
        """What a report says of them: text, samples, length, seed, and a hash of the tokens.

        The hash is that of N, L and the tokens, each as a little-endian 64-bit number. Equal hashes
        mean equal tokens.
        """
        samples, length = self.ids_NL.shape
        checksum = new_hash()
        checksum.update(np.array([samples, length], "<i8").tobytes())
        checksum.update(self.ids_NL.numpy().astype("<i8").tobytes())
        return {
            "text": self.text,
            "samples": samples,
            "length": length,
            "seed": self.seed,
            "hash": hash_name(checksum),
        }


def read_samples(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    *,
    positions: int | None,
    embeddings: int,
) -> Samples:
    """Draw samples from a text as GPTQ, SparseGPT and Wanda do.

    The whole text is tokenized once, with the special tokens that the tokenizer adds by itself, so
    a BOS stands only at the start of the text. Each sample is a stretch of these tokens. All places
    where a whole sample fits are equally likely, and samples may overlap or be equal.

    Sample i starts at the i-th number of NumPy's ``PCG64(seed).random_raw``, modulo the number of
    places. NumPy guarantees these numbers for every release and machine.

    Args:
        text: The text.
        tokenizer: The model's tokenizer; not changed.
        options: How many samples, their length and seed. The default length is 2,048, or the
            model's number of positions if that is smaller.
        positions: The largest number of tokens that the model takes at once; None for no limit.
        embeddings: How many token ids the model has.

    Raises:
        OptionError: If a sample is longer than the text or than the model's positions, or the
            tokenizer returns ids that the model does not have.
    """
    import torch

    length = options.length
    if length is None:
        length = _DEFAULT_LENGTH if positions is None else min(_DEFAULT_LENGTH, positions)
    check_length("calibration: length", length, positions)
    ids = np.array(tokenized(tokenizer, text, embeddings)["input_ids"], np.int64)
    places = len(ids) - length + 1
    if places < 1:
        raise OptionError(
            f"calibration: {text.name} is {len(ids)} tokens long, shorter than one sample of "
            f"{length}: give a longer text or a smaller length"
        )
    raw_N = np.random.PCG64(options.seed).random_raw(options.samples)
    starts_N = (raw_N % np.uint64(places)).astype(np.int64)
    ids_NL = np.stack([ids[start : start + length] for start in starts_N])
    return Samples(text=text.name, seed=options.seed, ids_NL=torch.from_numpy(ids_NL))
