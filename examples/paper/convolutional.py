"""A VGG-like net and a small ResNet on digits, pruned by magnitude, saliency and loss change."""

from itertools import product

import comparison
import conv_nets
import digits
import torch
from matplotlib.figure import Figure
from row import BLUE, GREEN, ORANGE, Line, Row, Run, curve, finish, run, spread
from torch import nn

NETS = {"VGG": conv_nets.vgg, "ResNet": conv_nets.resnet}
COLORS = {"magnitude": ORANGE, "saliency": BLUE, "loss change": GREEN}
READINGS = {"keep N_eff": "*", "prune N_eff": "o"}
# on CIFAR-10 and CIFAR-100; for saliency and loss change they pruned N_eff weights
AUTHORS = {
    "VGG, magnitude, keep N_eff": "VGG16 59.5: 91.12 → 90.98",
    "VGG, saliency, prune N_eff": "VGG16 25.7: 91.12 → 90.97",
    "VGG, loss change, prune N_eff": "VGG16 2.1: 91.12 → 91.11",
    "ResNet, magnitude, keep N_eff": "ResNet18 56.2: 78.64 → 77.55",
}


def gradients(model: nn.Module, data: digits.Digits, *, batches: int) -> digits.Tensors:
    """The mean of |∂L/∂w| over the first batches of 64 training images."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for batch in torch.arange(64 * batches).split(64):
        loss = nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        found = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            total[name] += gradient.abs() / batches
    return total


def scores(model: nn.Module, data: digits.Digits) -> dict[str, digits.Tensors]:
    """The three scores: |w|; |∂L/∂w|, the mean of ten batches; |w · ∂L/∂w| of one batch."""
    magnitudes = digits.magnitudes(model)
    one = gradients(model, data, batches=1)
    return {
        "magnitude": magnitudes,
        "saliency": gradients(model, data, batches=10),
        "loss change": {name: one[name] * w for name, w in magnitudes.items()},
    }


def measure(seed: int, *, epochs: int = 20) -> Run:
    """One seed's figures of each net and score, by the rule and as the authors' notebook has it."""
    data = digits.load(seed)
    found = {}
    for name, make in NETS.items():
        torch.manual_seed(seed)
        model = make()
        digits.train(model, data, epochs=epochs)
        found[name] = {
            "dense": digits.test(model, data),
            "scores": {kind: by(model, s, data) for kind, s in scores(model, data).items()},
        }
    return found


def by(model: nn.Module, score: digits.Tensors, data: digits.Digits) -> Run:
    """What keeping and what pruning N_eff weights costs, beside as many in other ways."""
    kept = digits.count(digits.emp(score, "model", 1.0))
    rest = digits.as_one(score).numel() - kept
    found: Run = {"shares": comparison.sweep(model, score, data)}
    for reading, count in zip(READINGS, (kept, rest), strict=True):
        masks = {
            "emp": digits.uniform(score, "model", count),
            "fixed": digits.uniform(score, "layer", count),
            "magnitude": digits.uniform(digits.magnitudes(model), "model", count),
        }
        found[reading] = {name: digits.cost(model, mask, data) for name, mask in masks.items()}
    return found


def lines(runs: list[Run]) -> list[Line]:
    """Both readings of each score, the net as one group, beside the same share of each layer."""
    found = []
    for net, score, reading in product(NETS, COLORS, READINGS):
        what = f"{net}, {score}, {reading}"
        dense = [run[net]["dense"] for run in runs]
        costs = [run[net]["scores"][score][reading] for run in runs]
        found.append(comparison.line(what, dense, costs, AUTHORS.get(what, "")))
    return found


def notes(runs: list[Run]) -> list[str]:
    """Magnitude where the other scores stop, and what could be pruned."""
    found = []
    for net, score in product(NETS, COLORS):
        of_score = [{"dense": run[net]["dense"], **run[net]["scores"][score]} for run in runs]
        kept = spread([run["keep N_eff"]["magnitude"]["accuracy"] for run in of_score])
        also = "" if score == "magnitude" else f"; with its N_eff weights by magnitude: {kept}"
        found.append(comparison.note(of_score, f"{net}, {score}") + also)
    return found


def draw(figure: Figure, runs: list[Run]) -> None:
    """A part for each net: accuracy over sparsity by each score, and where both readings stop."""
    parts = figure.subplots(1, len(NETS), sharey=True)
    for axes, net in zip(parts, NETS, strict=True):
        for score, color in COLORS.items():
            found = [run[net]["scores"][score] for run in runs]
            every_share = zip(*(run["shares"] for run in found), strict=True)
            curve(axes, every_share, color=color, label=score)
            for reading, marker in READINGS.items():
                costs = [run[reading]["emp"] for run in found]
                style = {"color": color, "marker": marker, "markersize": 11}
                comparison.mark(axes, costs, f"{score}: {reading}", **style)
        finish(axes, xlabel="sparsity, %", ylabel="accuracy, %", title=net)
        axes.label_outer()
    figure.legend(*parts[0].get_legend_handles_labels(), loc="outside right center")


ROW = Row("convolutional", "Convolutional nets, by three scores", measure, lines, draw, notes)

if __name__ == "__main__":
    run(ROW)
