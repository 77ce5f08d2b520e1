"""Perplexity by criterion: at its own N_eff and at equal sparsity, without and with repair.

    OMP_NUM_THREADS=1 python benchmarks/criteria_table.py MODEL CALIBRATION_TEXT TEST_TEXT \
        --cells cells.jsonl

Every criterion prunes the MLPs with row groups three times: at β = 1 by its own N_eff, and keeping
as many weights of each row as magnitude keeps at β = 1 and at β = 0.75. Whatever depends on samples
or on chance is measured for each seed; the table has mean ± sample standard deviation. A cell is
written to a file as soon as it is measured and is not measured again, so an interrupted run can be
continued, and several can share the work by `--seeds`.

To tokenize each text only once, masks are made by the functions that `emp_llm.prune` calls, and
applied to a model that stays loaded. `--check` runs `emp-llm prune` for one cell as well and
compares the perplexities, which must be equal.

The model is loaded whole. Its parameters must have the names that they have in the checkpoint, as
those of Llama do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import numpy as np
import torch
from common import say, write_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from emp_llm import PruneOptions
from emp_llm.calibration.calibrate import Calibration, needs_of
from emp_llm.calibration.criteria import Criterion, Taylor
from emp_llm.calibration.criterion_registry import register_criterion
from emp_llm.calibration.session import Session
from emp_llm.calibration.statistics import Statistics
from emp_llm.calibration.target_pruner import apply_masks
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.evaluation.perplexity import perplexity
from emp_llm.hub.source import find_source
from emp_llm.options import CalibrationOptions
from emp_llm.pruning.plan import PruningPlan
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.tensors.target import Target
from emp_llm.texts.texts import Text

CRITERIA = ("magnitude", "wanda", "obs", "taylor", "ria", "random")
SETTINGS = {"own": (1.0, "criterion"), "1": (1.0, "magnitude"), "0.75": (0.75, "magnitude")}
REPAIRS = ("none", "obs")
GOALS = {"1": 0.30, "0.75": 1.14}
"""Per cent by which repaired magnitude may be worse than dense: what exact least squares gives."""


@dataclass(frozen=True)
class Cell:
    """One way to prune: a setting of SETTINGS, and a seed unless nothing depends on it."""

    criterion: str
    setting: str
    repair: str
    seed: int | None

    @staticmethod
    def of(criterion: str, setting: str, repair: str, seed: int) -> Cell:
        """The cell of a seed; of none where nothing depends on it."""
        depends = (criterion, repair) != ("magnitude", "none")
        return Cell(criterion, setting, repair, seed if depends else None)

    def options(self, calibration: CalibrationOptions) -> PruneOptions:
        """The options of `emp_llm.prune` for this cell."""
        beta, count_by = SETTINGS[self.setting]
        return PruneOptions(
            beta=beta,
            criterion=self.criterion,
            count_by="criterion" if self.criterion == "magnitude" else count_by,
            repair=self.repair,
            calibration=replace(calibration, seed=self.seed or 0),
        )


def main() -> None:
    """Read the command line, measure what is missing, and print the table."""
    args = parse()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    cells = dict.fromkeys(
        Cell.of(criterion, setting, repair, seed)
        for seed in args.seeds
        for repair in args.repairs
        for criterion in args.criteria
        for setting in SETTINGS
        if (criterion, setting) != ("magnitude", "own")  # that is β = 1
    )
    with Bench(args) as bench:
        results = measure(bench, cells, args)
        if args.check:
            results["check"] = bench.check(Cell.of("wanda", "own", "obs", args.seeds[0]))
    for blocks in args.blocks:
        print(f"\n{table(results, blocks)}")
    if args.json:
        names = ("samples", "length", "context", "threads")
        settings = {name: getattr(args, name) for name in names} | {"model": Path(args.model).name}
        write_json(args.json, "criteria", settings, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder")
    parser.add_argument("calibration", help="text to calibrate on")
    parser.add_argument("text", type=Path, help="text to measure perplexity on")
    parser.add_argument("--cells", type=Path, required=True, help="where cells are written down")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0], help="of the text; 0: all")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA)
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--samples", type=int, default=128, help="to calibrate on (default: 128)")
    parser.add_argument("--length", type=int, default=512, help="tokens in one (default: 512)")
    parser.add_argument("--context", type=int, default=512, help="of perplexity (default: 512)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--check", action="store_true", help="do one cell by the command as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args()


# --- the work ------------------------------------------------------------------------------------


class Bench:
    """A model, whole and streamed, and what it is calibrated and measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.calibration = CalibrationOptions(
            text=args.calibration, samples=args.samples, length=args.length, device="cpu"
        )
        self._workers = Workers(threads=args.threads, progress=SharedProgress(Silent()))
        self._source = find_source(args.model, progress=self._workers.progress)
        self._checkpoint = self._source.open_checkpoint()
        self._files: OpenFiles = self._stack.enter_context(
            self._source.files(self._checkpoint.shards)
        )
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32
        )
        self._tokenizer = Tokens(args.model)
        self._text = args.text.read_text(encoding="utf-8")
        self._session = cache(self._open_session)
        self._dense: dict[str, torch.Tensor] = {}
        for shard in self._checkpoint.shards:
            self._dense |= load_file(shard.path)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def perplexity(self, model: PreTrainedModel, blocks: int) -> float:
        """Perplexity of a model on the first windows of the text, or on all."""
        text = Text(self.args.text.name, self._text, blocks or None)
        context = self.args.context
        return perplexity(model, self._tokenizer, text, context=context).perplexity  # type: ignore[arg-type]

    def prune(self, cell: Cell) -> float:
        """Give the model the weights of a cell; returns the sparsity of the targets."""
        options = cell.options(self.calibration)
        if cell.criterion == "taylor":
            self._remember_gradients(cell.seed or 0)
            options = replace(options, criterion=Remembered.name)
        kept = weights = 0
        with self._masked(options) as (store, targets):
            parameters = dict(self.model.named_parameters())
            for target in targets:
                parameter = parameters[target.name]
                parameter.data.copy_(apply_masks(store, target, self._dense[target.name].clone()))
                kept += int(np.bitwise_count(store.read_mask(target.name, 0, len(parameter))).sum())
                weights += parameter.numel()
        return 1 - kept / weights

    def check(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell by the command line as well; raises AssertionError if it differs."""
        beta, count_by = SETTINGS[cell.setting]
        calibration = ["--calibration", self.args.calibration, "--seed", str(cell.seed)]
        calibration += ["--samples", str(self.args.samples), "--length", str(self.args.length)]
        out = self._folder / "checked"
        command = [sys.executable, "-m", "emp_cli", "prune", self.args.model, "--out", str(out)]
        command += ["--criterion", cell.criterion, "--beta", str(beta), "--count-by", count_by]
        command += ["--repair", cell.repair, "--json", *calibration]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.args.threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        blocks = min(self.args.blocks)
        by_command = self.perplexity(loaded, blocks)
        self.prune(cell)
        here = self.perplexity(self.model, blocks)
        if by_command != here:
            raise AssertionError(f"{cell}: perplexity {here}, by the command {by_command}")
        return {**vars(cell), "perplexity": here}

    @contextmanager
    def _masked(self, options: PruneOptions) -> Iterator[tuple[MaskStore, list[Target]]]:
        session = None
        if needs_of(options) and options.calibration is not None:
            session = self._session(options.calibration.seed)
        plan = PruningPlan.make(self._source, self._checkpoint, options)
        with (
            tempfile.TemporaryDirectory(dir=self._folder) as folder,
            MaskStore(Path(folder)) as store,
        ):
            Calibration(plan, self._workers, self._files, session).mask(store)
            yield store, plan.all_targets

    def _open_session(self, seed: int) -> Session:
        options = PruneOptions(criterion="wanda", calibration=replace(self.calibration, seed=seed))
        plan = PruningPlan.make(self._source, self._checkpoint, options)
        return Session(plan, self._workers.progress, self._files, self._folder)

    def _remember_gradients(self, seed: int) -> None:
        """Compute Taylor's scores of the dense model, unless those of the seed are there."""
        if Remembered.seed != seed:
            say(f"gradients of seed {seed}")
            Remembered.seed, Remembered.kept = seed, {}
            calibration = replace(self.calibration, seed=seed)
            options = PruneOptions(criterion=Remembering.name, calibration=calibration)
            with self._masked(options):
                pass


class Remembering(Criterion):
    """Taylor's scores, kept: they are those of the dense model in every cell."""

    name = "taylor, remembering"
    needs = Taylor.needs

    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """|w · ∂L/∂w|."""
        scores_RC = Taylor().scores(weight_RC, statistics)
        Remembered.kept[statistics.tensor, statistics.matrix] = scores_RC
        return scores_RC


class Remembered(Criterion):
    """Taylor's scores as `Remembering` kept them."""

    name = "taylor, remembered"
    seed: ClassVar[int | None] = None
    kept: ClassVar[dict[tuple[str, int], torch.Tensor]] = {}

    def scores(self, _weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """|w · ∂L/∂w|."""
        return self.kept[statistics.tensor, statistics.matrix]


register_criterion(Remembering)
register_criterion(Remembered)


class Tokens:
    """A tokenizer that tokenizes each text only once."""

    is_fast = True

    def __init__(self, model: str) -> None:
        self._tokenizer = cache(AutoTokenizer.from_pretrained(model).__call__)

    def __call__(self, text: str, **options: bool) -> Mapping[str, Any]:
        """The tokens of a text, from the cache if they are there."""
        return self._tokenizer(text, **options)


def measure(bench: Bench, cells: Iterable[Cell], args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell that is missing in the file; returns all cells, and the dense model's."""
    known = {key(line): line for line in read_lines(args.cells)}
    for cell in [None, *cells]:
        named = {} if cell is None else vars(cell)
        missing = [
            blocks for blocks in args.blocks if key({**named, "blocks": blocks}) not in known
        ]
        if not missing:
            continue
        start = time.perf_counter(), time.process_time()
        sparsity = 0.0 if cell is None else bench.prune(cell)
        took = time.perf_counter() - start[0], time.process_time() - start[1]
        for blocks in missing:
            line = named | {"blocks": blocks, "sparsity": sparsity}
            line |= {"perplexity": bench.perplexity(bench.model, blocks)}
            line |= {"seconds": took[0], "cpu_seconds": took[1]}
            with args.cells.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            known[key(line)] = line
            say(json.dumps(line))
    known |= {key(line): line for line in read_lines(args.cells)}  # of others who share the work
    return {"cells": list(known.values())}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The cells in the file; an unfinished last line is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a cell."""
    return tuple(line.get(name) for name in ("criterion", "setting", "repair", "seed", "blocks"))


# --- the result ----------------------------------------------------------------------------------


def table(results: Mapping[str, Any], blocks: int) -> str:
    """A table in Markdown: per cent by which perplexity is above the dense model's."""
    cells = [cell for cell in results["cells"] if cell["blocks"] == blocks]
    dense = next(cell["perplexity"] for cell in cells if "criterion" not in cell)
    heads = [("sparsity", "own"), *((repair, name) for name in SETTINGS for repair in REPAIRS)]
    lines = [f"dense {dense:.3f}, on {blocks or 'all'} blocks", ""]
    titles = [
        "",
        "own N_eff",
        "pruned",
        "repaired",
        "as β = 1",
        "repaired",
        "as β = 0.75",
        "repaired",
    ]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for criterion in CRITERIA:
        row = []
        for column, setting in heads:
            where = {"criterion": criterion, "setting": setting}
            if criterion == "magnitude" and setting == "own":
                where["setting"] = "1"
            where["repair"] = "none" if column == "sparsity" else column
            found = [cell for cell in cells if where.items() <= cell.items()]
            if column == "sparsity":
                row.append(spread([100 * cell["sparsity"] for cell in found], ".2f", " %"))
            else:
                more = [100 * (cell["perplexity"] / dense - 1) for cell in found]
                row.append(spread(more, "+.2f", " %"))
        lines.append(f"| {criterion} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def spread(values: list[float], form: str, unit: str) -> str:
    """Mean ± sample standard deviation, in words."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}{unit}"


if __name__ == "__main__":
    main()
