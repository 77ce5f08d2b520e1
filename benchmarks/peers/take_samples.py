"""Writes the samples that emp-llm calibrates on to a file, for pruners that cannot draw them.

    python benchmarks/peers/take_samples.py MODEL TEXT --samples 64 --length 512 --out samples.json

The file holds ``ids``, a list of token ids for each sample, and ``samples``, what a report of
emp-llm says of them; equal hashes there mean equal tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from emp_llm import CalibrationOptions
from emp_llm.calibration.samples import read_samples
from emp_llm.texts.texts import read_text
from emp_llm.texts.tokenizer import load_tokenizer
from emp_llm.texts.tokens import positions_of


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder")
    parser.add_argument("text", help="what to calibrate on, as for emp-llm's --calibration")
    parser.add_argument("--samples", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--length", type=int, default=512, help="tokens in one (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    options = CalibrationOptions(
        text=args.text, samples=args.samples, length=args.length, seed=args.seed
    )
    args.out.write_text(json.dumps(samples_of(args.model, options)), encoding="utf-8")


def samples_of(model: str, options: CalibrationOptions) -> dict[str, Any]:
    """What the file holds: token ids and what they are."""
    config = AutoConfig.from_pretrained(model)
    samples = read_samples(
        read_text(str(options.text), protocol="paper", part="train"),
        load_tokenizer(model, Path(model), trust_remote_code=False),
        options,
        positions=positions_of(config),
        embeddings=config.get_text_config().vocab_size,
    )
    return {"samples": samples.description(), "ids": samples.ids_NL.tolist()}


if __name__ == "__main__":
    main()
