"""Compare every number of a model's page with the float64 reference on the whole tensors.

    python benchmarks/check_page.py MODEL [--targets T]

The plain reference computes once more, row by row: N_eff / N, sparsity, retained mass and the
distribution of N_eff / N for every tensor, and the kept weights and their mass at every β of the
curve. At some β the model is pruned, and bytes are compared. The first difference ends the check.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import say
from emp_kernels import reference
from safetensors.torch import load_file

import emp_llm
from emp_llm.report.page.content import page_content
from emp_llm.report.page.page import page_html

DIGITS = 5.1e-6  # relative; reports hold six digits


class Rows:
    """The statistics of one tensor, row by row, by the reference."""

    def __init__(self, weights: np.ndarray, betas: list[float]) -> None:
        scores = np.abs(weights)
        self.weights, self.mass = weights.size, float(scores.sum())
        self.fractions = np.array([reference.effective_number(row) / row.size for row in scores])
        sums = np.cumsum(-np.sort(-scores, axis=1), axis=1)
        self.kept, self.kept_mass = [], []
        for beta in betas:
            kept = np.array([reference.keep_count(row, beta) for row in scores])
            self.kept.append(int(kept.sum()))
            stays = np.take_along_axis(sums, np.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
            self.kept_mass.append(float(stays[kept > 0].sum()))


def near(found: float, expected: float, what: str, *, rounded: int = 1) -> None:
    """Raise unless two numbers agree to the digits that a report holds.

    Args:
        found: In the page.
        expected: By the reference.
        what: What they are, for the error.
        rounded: How often `found` was rounded: sums of rounded numbers are rounded once more.
    """
    assert abs(found - expected) <= DIGITS * rounded * abs(expected) + 1e-12, (
        what,
        found,
        expected,
    )


def check_tensors(content: dict[str, Any], rows: dict[str, Rows], at: int) -> None:
    """Check the table, and the cells and kinds of the heat map, which are sums over it."""
    table = content["tensors"]
    assert set(table["name"]) == set(rows)
    groups: dict[tuple[int, int | None], list[Rows]] = {}
    for i, name in enumerate(table["name"]):
        one = rows[name]
        near(table["n_eff_fraction_mean"][i], one.fractions.mean(), name)
        near(table["n_eff_fraction_min"][i], one.fractions.min(), name)
        near(table["n_eff_fraction_max"][i], one.fractions.max(), name)
        near(table["sparsity"][i], 1 - one.kept[at] / one.weights, name)
        near(table["retained_mass"][i], one.kept_mass[at] / one.mass, name)
        for key in ((table["kind"][i], table["block"][i]), (table["kind"][i], None)):
            groups.setdefault(key, []).append(one)
    parts = {(cell["kind"], cell["block"]): cell for cell in content["cells"]}
    parts |= {(i, None): kind for i, kind in enumerate(content["kinds"])}
    assert parts.keys() == groups.keys()
    for key, part in parts.items():
        group = groups[key]
        weights, mass = sum(one.weights for one in group), sum(one.mass for one in group)
        fraction = sum(one.fractions.mean() * one.weights for one in group) / weights
        near(part["n_eff_fraction_mean"], fraction, f"{key}", rounded=2)
        near(
            part["sparsity"], 1 - sum(one.kept[at] for one in group) / weights, f"{key}", rounded=2
        )
        near(
            part["retained_mass"],
            sum(one.kept_mass[at] for one in group) / mass,
            f"{key}",
            rounded=2,
        )
        if key[1] is None:
            fractions = np.concatenate([one.fractions for one in group])
            counts, _ = np.histogram(fractions, bins=50, range=(0, 1))
            assert part["histogram"]["counts"] == counts.tolist(), key


def check_curve(content: dict[str, Any], rows: dict[str, Rows]) -> None:
    """Check sparsity and retained mass at every point of every line."""
    table, kinds = content["tensors"], [kind["name"] for kind in content["kinds"]]
    for line in content["curve"]["parts"]:
        chosen = [
            rows[name]
            for i, name in enumerate(table["name"])
            if line["name"] in ("all targets", kinds[table["kind"][i]])
        ]
        weights, mass = sum(one.weights for one in chosen), sum(one.mass for one in chosen)
        for p, beta in enumerate(content["curve"]["beta"]):
            what = f"{line['name']} at {beta}"
            near(line["sparsity"][p], 1 - sum(one.kept[p] for one in chosen) / weights, what)
            near(line["retained_mass"][p], sum(one.kept_mass[p] for one in chosen) / mass, what)


def check_bytes(content: dict[str, Any], model: str, targets: str) -> None:
    """Check the bytes at some points against those that pruning there writes."""
    curve = content["curve"]
    last = len(curve["beta"]) - 1
    with tempfile.TemporaryDirectory() as folder:
        for p in sorted({*range(0, last, 8), last}):
            beta = curve["beta"][p]
            options = emp_llm.PruneOptions(beta=beta, targets=targets)
            totals = emp_llm.prune(model, Path(folder) / "out", options, overwrite=True)["totals"]
            assert curve["parts"][0]["bytes"][p] == totals["targets"]["bytes_after"], beta
            assert curve["model_bytes"][p] == totals["model"]["bytes_after"], beta


def main() -> None:
    """Inspect a model and check its page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--targets", default="mlp")
    arguments = parser.parse_args()
    options = emp_llm.PruneOptions(targets=arguments.targets)
    report = emp_llm.inspect(arguments.model, options)
    content = page_content(report)
    embedded = re.search(r'id="content">(.*?)</script>', page_html(report), re.DOTALL)
    assert embedded is not None
    assert content.items() <= json.loads(embedded[1]).items()
    betas = content["curve"]["beta"]
    files = sorted(Path(arguments.model).glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    rows = {
        name: Rows(tensors[name].double().numpy(), betas)
        for name, fields in report["tensors"].items()
        if fields["pruned"]
    }
    check_tensors(content, rows, betas.index(1.0))
    check_curve(content, rows)
    check_bytes(content, arguments.model, arguments.targets)
    counted = sum(len(one.fractions) for one in rows.values())
    points = len(betas) * len(content["curve"]["parts"])
    say(
        f"{Path(arguments.model).name}, {arguments.targets}: "
        f"{len(rows)} tensors, {counted:,} rows, "
        f"{len(content['cells'])} cells, {points} points of the curve are the reference's"
    )


if __name__ == "__main__":
    main()
