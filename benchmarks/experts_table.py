"""What fewer experts cost in perplexity, by each score, and what they save: a table of one model.

    OMP_NUM_THREADS=1 python benchmarks/experts_table.py MODEL TRAIN_TEXT TEST_TEXT \
        --experts 15 14 12 8 --json experts.json

The perplexities are those of `emp-llm compare --experts`, whose rows go on where an interrupted run
was. Speed depends on how many experts there are and not on which: for each number, the model that
`emp-llm shrink` makes by aimer generates a text beside the dense one, each in turn, in one process.
`benchmarks/train_moe.py` trains a model to measure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from common import MB, say, write_json
from transformers import AutoModelForCausalLM

from emp_llm import CalibrationOptions, ShrinkOptions, compare_structures, shrink
from emp_llm.texts.texts import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from emp_llm.comparison.structures_costs import StructuresComparison, StructuresCost

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 16, 64, 5


def main() -> None:
    """Read the command line, measure, and print the table."""
    args = parse()
    data = CalibrationOptions(
        text=str(args.calibration), samples=args.samples, length=args.length, seed=0
    )
    say("perplexities")
    found = compare_structures(
        args.model,
        read_text(str(args.text), protocol="paper"),
        experts=args.experts,
        context=args.context,
        dtype="float32",
        calibration=data,
        save=args.json.with_suffix(".rows.json"),
    )
    numbers = [cost.kept for cost in found.costs if cost.score == "random"]
    sizes = {number: measured(args.model, number) for number in numbers}
    result = {"comparison": found.to_dict(), "sizes": sizes}
    write_json(args.json, "experts", {"model": args.model.name}, result)
    print(table(found, sizes))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder with a mixture of experts")
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("text", type=Path, help="text to measure perplexity on")
    parser.add_argument("--experts", nargs="+", required=True, help="as for emp-llm compare")
    parser.add_argument("--json", type=Path, required=True, help="where results are written")
    parser.add_argument("--samples", type=int, default=64, help="to calibrate on (default: 64)")
    parser.add_argument("--length", type=int, default=256, help="tokens in one (default: 256)")
    parser.add_argument("--context", type=int, default=256, help="of perplexity (default: 256)")
    return parser.parse_args()


def measured(dense: Path, number: int) -> dict[str, Any]:
    """Bytes of the weights with so many experts, and tokens a second beside the dense model."""
    say(f"speed with {number} experts")
    with TemporaryDirectory() as folder:
        small = Path(folder) / "model"
        shrink(dense, small, ShrinkOptions(experts=number))
        models = [AutoModelForCausalLM.from_pretrained(one) for one in (small, dense)]
        rounds = [tuple(map(tokens_per_second, models)) for _ in range(ROUNDS)]
        return {
            "bytes": weight_bytes(small),
            "dense_bytes": weight_bytes(dense),
            "tokens_per_second": median(ours for ours, _ in rounds),
            "dense_tokens_per_second": median(theirs for _, theirs in rounds),
            "ratio": median(ours / theirs for ours, theirs in rounds),
            "rounds": rounds,
        }


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tokens_per_second(model: PreTrainedModel) -> float:
    """Of greedy decoding, one text at a time, by the process's own time: others may be busy too."""
    decoder: Any = model
    prompt = torch.arange(1, 1 + PROMPT_TOKENS)[None]
    started = time.process_time()
    text = decoder.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return (text.shape[1] - PROMPT_TOKENS) / (time.process_time() - started)


def table(found: StructuresComparison, sizes: dict[int, dict[str, Any]]) -> str:
    """A table in Markdown: the dense model, then a line for each number of experts."""
    scores = list(dict.fromkeys(cost.score for cost in found.costs[1:]))
    lines = [
        ["experts", *scores, "MB", "tokens per CPU second", "of dense"],
        ["---"] * (len(scores) + 4),
    ]
    of_dense = next(iter(sizes.values()))
    perplexities = [f"dense {found.dense.perplexity:.2f}", *[""] * (len(scores) - 1)]
    rate = f"{of_dense['dense_tokens_per_second']:.0f}"
    lines.append(
        [f"{found.dense.kept}", *perplexities, megabytes(of_dense["dense_bytes"]), rate, ""]
    )
    for number, of in sizes.items():
        costs = {cost.score: cost for cost in found.costs if cost.kept == number}
        perplexities = [shown(costs[score]) for score in scores]
        rate, ratio = f"{of['tokens_per_second']:.0f}", f"{of['ratio']:.2f}"
        lines.append([f"{number}", *perplexities, megabytes(of["bytes"]), rate, ratio])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(cost: StructuresCost) -> str:
    """A perplexity, with the deviation of several."""
    several = "" if cost.deviation is None else f" ± {cost.deviation:.2f}"
    return f"{cost.perplexity:.2f}{several}"


def megabytes(nbytes: int) -> str:
    """Bytes as they stand in the table."""
    return f"{nbytes / MB:.1f}"


if __name__ == "__main__":
    main()
