"""A vision transformer on digits, which the authors leave to future work, pruned by magnitude."""

import comparison
import digits
import torch
from matplotlib.figure import Figure
from row import Line, Row, Run, run
from torch import nn


class VisionTransformer(nn.Module):
    """16 patches of 2 × 2 pixels, two blocks 48 wide, and the mean of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(16, 48))
        block = nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 1, 8, 8] → [n, 10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(tokens).mean(1))


def scores(model: nn.Module) -> digits.Tensors:
    """|w| of the linear layers in the blocks; patches, places and head stay as they are."""
    return {n: s for n, s in digits.magnitudes(model).items() if n.startswith("blocks.")}


def measure(seed: int, *, epochs: int = 30) -> Run:
    """One seed's figures."""
    data = digits.load(seed)
    torch.manual_seed(seed)
    model = VisionTransformer()
    digits.train(model, data, epochs=epochs, rate=3e-3)
    return comparison.compare(model, scores(model), data)


def lines(runs: list[Run]) -> list[Line]:
    """EMP in three kinds of groups beside fixed shares of them."""
    return comparison.lines(runs, "ViT", {})


def notes(runs: list[Run]) -> list[str]:
    """What could be pruned."""
    return [comparison.note(runs, "ViT")]


def draw(figure: Figure, runs: list[Run]) -> None:
    """Accuracy over sparsity."""
    axes = figure.subplots()
    comparison.draw(axes, runs, "a vision transformer on digits")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


TITLE = "A vision transformer, by magnitude (the authors: future work)"
ROW = Row("vision_transformer", TITLE, measure, lines, draw, notes, size=(8, 3.6))

if __name__ == "__main__":
    run(ROW)
