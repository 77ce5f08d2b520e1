"""The main job on a real model: prune, load and measure, at three values of β.

Run by ``make demo``; writes to ``demo/out``.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).parent
MODEL = DEMO / "model"
OUT = DEMO / "out"
BETAS = (0.75, 1.0, 1.25)
CONTEXT = 256


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    file_bytes: int
    sparsity: float
    perplexity: float
    seconds: float | None = None
    peak_bytes: float | None = None

    def line(self, dense: "Result") -> str:
        """The line, beside the dense model's results."""
        cost = f"{self.seconds:7.1f}  {self.peak_bytes / 1e6:7.0f}" if self.seconds else ""
        return (
            f"{self.name:<12}{self.file_bytes:>11,}  {self.file_bytes / dense.file_bytes:5.3f}  "
            f"{self.sparsity:8.2%}  {self.perplexity:10.2f}{cost}"
        )


def run(*arguments: str) -> dict[str, object]:
    """Run one emp-llm command as a user would; returns what its --json prints."""
    print(f"$ emp-llm {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "emp_cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)  # noqa: S101
    return answer


def measure(folder: Path) -> float:
    """Perplexity of a checkpoint, dense or packed, on the demo's text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from emp_llm.evaluation.perplexity import perplexity

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (DEMO / "text.txt").read_text(encoding="utf-8")
    return perplexity(model, tokenizer, text, context=CONTEXT).perplexity


def prune(beta: float) -> Result:
    """Prune at one β, and measure what it cost."""
    packed = str((OUT / f"beta-{beta}").relative_to(Path.cwd()))
    source = str(MODEL.relative_to(Path.cwd()))
    report = run("prune", source, "--beta", str(beta), "--out", packed, "--overwrite")
    run("verify", packed)
    return Result(
        f"β = {beta}",
        (Path(packed) / "model.safetensors").stat().st_size,
        report["totals"]["targets"]["sparsity"],
        measure(Path(packed)),
        report["seconds"],
        report["peak_memory_bytes"],
    )


def main() -> None:
    """Print dense against pruned."""
    dense = Result("dense", (MODEL / "model.safetensors").stat().st_size, 0.0, measure(MODEL))
    results = [dense, *(prune(beta) for beta in BETAS)]
    print(f"\n{'':<12}{'bytes':>11}  ratio  sparsity  perplexity  seconds  peak MB")
    for result in results:
        print(result.line(dense))
    print(
        "\nSparsity is that of the MLPs, the default targets. Perplexity is per token of"
        f"\ndemo/text.txt, in windows of {CONTEXT}. Seconds and peak memory are those of `emp-llm"
        "\nprune`, nearly all of them spent on reading the model's structure by transformers."
    )


if __name__ == "__main__":
    main()
