"""A Kolmogorov-Arnold network [64, 32, 10] on digits, pruned by the importance of its nodes."""

import copy

import comparison
import digits
import torch
from matplotlib.figure import Figure
from row import BLUE, GREY, ORANGE, PINK, Line, Row, Run, curve, finish, run
from torch import nn

from emp_llm import keep_mask

WIDTHS = (64, 32, 10)
CELLS = 5
BETAS = (0.5, 0.75, 1.0)


class SplineLayer(nn.Module):
    """Each edge has a function of its own: y_o = Σ_i φ_oi(x_i), φ(x) = a SiLU(x) + Σ_k c_k B_k(x).

    B_k are the cubic B-splines of a uniform grid on [-1, 1]; beyond it they fade, to 0 at ±2.2.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        # 5 cells are reached by 8 cubic splines
        self.coefficients = nn.Parameter(0.02 * torch.randn(outputs, inputs, CELLS + 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, inputs] → [n, outputs]."""
        splines = torch.einsum("nik,oik->no", cubic_splines(x), self.coefficients)
        return self.base(nn.functional.silu(x)) + splines


def cubic_splines(x: torch.Tensor) -> torch.Tensor:
    """Values of the 8 B-splines, [..., 8]: each a bump four cells wide around its centre."""
    cell = 2 / CELLS
    centres = torch.arange(-1, CELLS + 2) * cell - 1
    u = ((x[..., None] - centres) / cell).abs()
    return torch.where(u < 1, 2 / 3 - u**2 + u**3 / 2, (2 - u).clamp(min=0) ** 3 / 6)


def importance(first: SplineLayer, second: SplineLayer) -> torch.Tensor:
    """The strongest edge into or out of each hidden node, by the mean of its |c_k|: [nodes]."""
    inward = first.coefficients.detach().abs().mean(-1).amax(1)
    outward = second.coefficients.detach().abs().mean(-1).amax(0)
    return torch.maximum(inward, outward)


def without(model: nn.Sequential, kept: torch.Tensor) -> nn.Sequential:
    """The network without the hidden nodes that a mask [nodes] drops: their edges give nothing."""
    pruned = copy.deepcopy(model)
    last = pruned[-1]
    last.base.weight.data *= kept
    last.coefficients.data *= kept[:, None]
    return pruned


def measure(seed: int, *, epochs: int = 40) -> Run:
    """One seed's accuracy by EMP at each β, and with each number of nodes, ranked and at random."""
    data = digits.load(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), SplineLayer(*WIDTHS[:2]), SplineLayer(*WIDTHS[1:]))
    digits.train(model, data, epochs=epochs, rate=3e-3)
    scores = importance(model[1], model[2])

    def cost(kept: torch.Tensor) -> dict[str, float]:
        sparsity = 100 * (1 - kept.float().mean().item())
        return {"sparsity": sparsity, **digits.test(without(model, kept), data)}

    def some(order: torch.Tensor, nodes: int) -> dict[str, float]:
        return cost(torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:nodes], True))

    ranked, shuffled = scores.argsort(descending=True), torch.randperm(len(scores))
    masks = {beta: keep_mask(scores, beta=beta) for beta in BETAS}
    return {
        "dense": digits.test(model, data),
        "shares": [some(ranked, nodes) for nodes in range(len(scores), 0, -1)],
        "random": [some(shuffled, nodes) for nodes in range(len(scores), 0, -1)],
        "betas": {
            f"{beta:g}": {"emp": cost(mask), "fixed": some(shuffled, int(mask.sum()))}
            for beta, mask in masks.items()
        },
    }


def lines(runs: list[Run]) -> list[Line]:
    """EMP's nodes beside as many random ones: of one group, a fixed share keeps the same nodes."""
    return [
        comparison.line(
            f"KAN, β = {beta:g}, beside random nodes",
            [run["dense"] for run in runs],
            [run["betas"][f"{beta:g}"] for run in runs],
            "MNIST 18.8: 97.21 → 95.81" if beta == 1 else "",
        )
        for beta in BETAS
    ]


def notes(runs: list[Run]) -> list[str]:
    """What could be pruned."""
    return [comparison.note(runs, "KAN")]


def draw(figure: Figure, runs: list[Run]) -> None:
    """Accuracy over the share of nodes that are pruned."""
    axes = figure.subplots()
    styles = {"shares": (GREY, "least important nodes first"), "random": (BLUE, "random nodes")}
    for which, (color, label) in styles.items():
        curve(axes, zip(*(run[which] for run in runs), strict=True), color=color, label=label)
    for beta, color in zip(BETAS, (PINK, ORANGE, "black"), strict=True):
        costs = [run["betas"][f"{beta:g}"]["emp"] for run in runs]
        comparison.mark(axes, costs, f"EMP, β = {beta:g}", color=color)
    finish(axes, xlabel="hidden nodes pruned, %", ylabel="accuracy, %", title="KAN [64, 32, 10]")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


ROW = Row(
    "kan", "A KAN, by the importance of its nodes", measure, lines, draw, notes, size=(8, 3.6)
)

if __name__ == "__main__":
    run(ROW)
