"""The tokens that a calibration runs on: stretches of a text, from random places.

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

_LENGTH = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Tokens to calibrate on.

    Attributes:
        text: Name of the text.
        seed: Of the places.
        ids_NL: int64 [N, L].
    """

    text: str
    seed: int
    ids_NL: torch.Tensor

    def description(self) -> SampleFields:
        """What a report says of them: text, samples, length, seed, and a hash of the tokens.

        Of equal hashes, the tokens are equal: the hash is that of N, L and the tokens, each as a
        little-endian 64-bit number.
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
    """Take samples of a text as GPTQ, SparseGPT and Wanda do.

    The whole text is tokenized once, with the special tokens that the tokenizer adds by itself: a
    BOS is there once, at the start of the text. Each sample is a stretch of it. Every place where a
    whole sample begins is equally likely, and the same one may come again, so samples may overlap.
    Sample i begins at the i-th number that NumPy's ``PCG64(seed).random_raw`` gives, modulo the
    number of places; NumPy promises that these numbers are the same in every release and on every
    machine.

    Args:
        text: What to calibrate on.
        tokenizer: The model's; it is left as it is.
        options: How many samples, their length and seed. The length is by default 2,048, or the
            model's positions if those are fewer.
        positions: How many tokens the model can see at once; None if any number.
        embeddings: How many tokens the model knows.

    Returns:
        The samples.

    Raises:
        OptionError: If a sample is longer than the text or than the model's positions, or the
            tokenizer gives tokens that the model does not have.
    """
    import torch

    length = options.length
    if length is None:
        length = _LENGTH if positions is None else min(_LENGTH, positions)
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
