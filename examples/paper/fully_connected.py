"""Fully connected nets of 2, 5 and 12 layers on digits, pruned by magnitude."""

from itertools import pairwise

import comparison
import digits
import torch
from matplotlib.figure import Figure
from row import Line, Row, Run, run, spread
from torch import nn

# a quarter of the authors' widths, for images of 8 × 8 instead of 28 × 28
NETS = {
    "FC2": (64, 25, 10),
    "FC5": (64, 250, 150, 75, 25, 10),
    "FC12": (64, 250, 225, 200, 187, 175, 162, 150, 125, 100, 50, 25, 10),
}
# on MNIST, the net as one group, by β: sparsity and accuracy in per cent, before and after
AUTHORS = {
    "FC2": {"0.5": "MNIST 68.5: 93.80 → 93.57", "1.0": "MNIST 37.0: 93.80 → 93.78"},
    "FC5": {"0.5": "MNIST 64.8: 97.18 → 96.47", "1.0": "MNIST 29.6: 97.18 → 97.20"},
    "FC12": {"0.5": "MNIST 64.2: 97.05 → 93.15", "1.0": "MNIST 28.3: 97.05 → 96.94"},
}


def net(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def measure(seed: int, *, epochs: int = 60) -> Run:
    """One seed's figures of each net, and the sparsity that EMP would find before training."""
    data = digits.load(seed)
    found = {}
    for name, widths in NETS.items():
        torch.manual_seed(seed)
        model = net(widths)
        untrained = digits.magnitudes(model)
        kept = digits.count(digits.emp(untrained, "model", 1.0))
        digits.train(model, data, epochs=epochs)
        found[name] = {
            "untrained sparsity": 100 * (1 - kept / digits.as_one(untrained).numel()),
            **comparison.compare(model, digits.magnitudes(model), data),
        }
    return found


def lines(runs: list[Run]) -> list[Line]:
    """EMP in three kinds of groups beside fixed shares of them."""
    of_net = {name: [run[name] for run in runs] for name in NETS}
    return [line for name in NETS for line in comparison.lines(of_net[name], name, AUTHORS[name])]


def notes(runs: list[Run]) -> list[str]:
    """How much of EMP's sparsity the initialization brings, and what could be pruned."""
    return [
        f"{comparison.note([run[name] for run in runs], name)}; "
        f"untrained, EMP prunes {spread([run[name]['untrained sparsity'] for run in runs])} %"
        for name in NETS
    ]


def draw(figure: Figure, runs: list[Run]) -> None:
    """A part for each net."""
    parts = figure.subplots(1, len(NETS), sharey=True)
    for axes, name in zip(parts, NETS, strict=True):
        comparison.draw(axes, [run[name] for run in runs], name)
        axes.label_outer()
    figure.legend(*parts[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


ROW = Row("fully_connected", "Fully connected nets, by magnitude", measure, lines, draw, notes)

if __name__ == "__main__":
    run(ROW)
