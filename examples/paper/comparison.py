"""EMP on the weights of a net beside fixed shares: what both cost, as lines, notes and pictures."""

from statistics import mean

import digits
from matplotlib.axes import Axes
from row import BLUE, GREEN, GREY, ORANGE, PINK, Line, Run, curve, finish, spread
from torch import nn

BETAS = ("0.25", "0.5", "0.75", "1.0", "1.25", "1.5", "2.0")
SPARSITIES = (10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 96, 98)
GROUPS = {"model": "one group", "layer": "by layers", "row": "by rows"}


def compare(model: nn.Module, scores: digits.Tensors, data: digits.Digits) -> Run:
    """EMP at each β in three kinds of groups, and as many weights in fixed shares."""
    betas = {}
    for beta in BETAS:
        betas[beta] = {}
        for group in GROUPS:
            masks = digits.emp(scores, group, float(beta))
            kept = digits.count(masks)
            # as one group, EMP keeps what a fixed share of the whole net keeps: divide it by layers
            fixed = digits.uniform(scores, "row" if group == "row" else "layer", kept)
            betas[beta][group] = {
                "emp": digits.cost(model, masks, data),
                "fixed": digits.cost(model, fixed, data),
            }
    return {
        "dense": digits.test(model, data),
        "betas": betas,
        "shares": sweep(model, scores, data),
    }


def sweep(model: nn.Module, scores: digits.Tensors, data: digits.Digits) -> list[Run]:
    """What pruning costs at every sparsity, the scores of the whole net ranked as one group."""
    total = digits.as_one(scores).numel()
    counts = [round(total * (1 - sparsity / 100)) for sparsity in SPARSITIES]
    return [digits.cost(model, digits.uniform(scores, "model", kept), data) for kept in counts]


def line(what: str, dense: list[Run], costs: list[Run], authors: str = "") -> Line:
    """A line of the table, from what `compare` has of each run: "emp" and "fixed"."""
    return Line(
        what,
        [cost["emp"]["sparsity"] for cost in costs],
        [cost["accuracy"] for cost in dense],
        [cost["emp"]["accuracy"] for cost in costs],
        [cost["fixed"]["accuracy"] for cost in costs],
        authors,
    )


def lines(runs: list[Run], net: str, authors: dict[str, str]) -> list[Line]:
    """A line for each kind of group at β = 0.5 and 1; the authors took the net as one group."""
    dense = [run["dense"] for run in runs]
    return [
        line(
            f"{net}, {told}, β = {beta}",
            dense,
            [run["betas"][beta][group] for run in runs],
            authors.get(beta, "") if group == "model" else "",
        )
        for beta in ("0.5", "1.0")
        for group, told in GROUPS.items()
    ]


def point_lost_at(run: Run) -> float:
    """The sparsity in per cent at which the net as one group has lost one point of accuracy."""
    limit = run["dense"]["accuracy"] - 1
    before, above = 0.0, run["dense"]["accuracy"]
    for cost in run["shares"]:
        at, accuracy = cost["sparsity"], cost["accuracy"]
        if accuracy < limit:
            return before + (at - before) * (above - limit) / (above - accuracy)
        before, above = at, accuracy
    return before


def note(runs: list[Run], net: str) -> str:
    """Whether EMP's count is near the one from which on accuracy is lost."""
    return f"{net}: one point of accuracy is lost at {spread([point_lost_at(r) for r in runs])} %"


def draw(axes: Axes, runs: list[Run], title: str) -> None:
    """Accuracy over sparsity: every share of the whole net, EMP's groups, and equal shares."""
    every_share = zip(*(run["shares"] for run in runs), strict=True)
    curve(axes, every_share, color=GREY, label="any share of the whole net")
    for group, ours, theirs in (("layer", ORANGE, BLUE), ("row", PINK, GREEN)):
        found = [[run["betas"][beta][group] for run in runs] for beta in BETAS]
        emp, fixed = ([[run[by] for run in runs] for runs in found] for by in ("emp", "fixed"))
        curve(axes, emp, color=ours, label=f"EMP by {group}s")
        curve(axes, fixed, color=theirs, linestyle="--", label=f"same share of each {group}")
    mark(axes, [run["betas"]["1.0"]["model"]["emp"] for run in runs], "EMP, one group, β = 1")
    finish(axes, xlabel="sparsity, %", ylabel="accuracy, %", title=title)


def mark(axes: Axes, costs: list[Run], label: str | None, **style: object) -> None:
    """EMP's own point, the mean of all runs."""
    point = ([mean(cost[what] for cost in costs)] for what in ("sparsity", "accuracy"))
    shown = {"color": "black", "marker": "*", "markersize": 12, "linestyle": "", "zorder": 5}
    axes.plot(*point, **{**shown, **style}, label=label)
