"""What the rows on digits share: images, training, the ways to choose weights, and what they cost.

Scores are dictionaries, from the name of a weight to a tensor of its shape; so are masks.
"""

import copy
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from emp_llm import keep_mask

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Digits:
    """Images, float32 [n, 1, 8, 8] of mean 0 and deviation 1, and their labels, int64 [n]."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def load(seed: int, *, train: int = 1200) -> Digits:
    """scikit-learn's 1,797 handwritten digits, divided by a seed."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels, dtype=torch.int64)
    train_i, test_i = train_test_split(
        range(len(y)), train_size=train, stratify=labels, random_state=seed
    )
    x = (x - x[train_i].mean()) / x[train_i].std()
    return Digits(x[train_i], y[train_i], x[test_i], y[test_i])


def train(model: nn.Module, data: Digits, *, epochs: int, rate: float = 1e-3) -> None:
    """Adam on batches of 64, its rate falling to 0; the model is in evaluation mode after that."""
    steps = epochs * -(-len(data.train_y) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y)).split(64):
            loss = nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def test(model: nn.Module, data: Digits) -> dict[str, float]:
    """Accuracy in per cent, and the loss, on the images that were not trained on."""
    logits = model(data.test_x)
    return {
        "accuracy": 100 * (logits.argmax(1) == data.test_y).float().mean().item(),
        "loss": nn.functional.cross_entropy(logits, data.test_y).item(),
    }


# --- which weights stay --------------------------------------------------------------------------


def magnitudes(model: nn.Module) -> Tensors:
    """|w| of all matrices and filters; biases and norms are never pruned."""
    return {name: p.detach().abs() for name, p in model.named_parameters() if p.ndim >= 2}


def as_one(scores: Tensors) -> torch.Tensor:
    """All scores behind each other."""
    return torch.cat([s.flatten() for s in scores.values()])


def divide(flat: torch.Tensor, like: Tensors) -> Tensors:
    """The inverse of `as_one`."""
    parts = flat.split([s.numel() for s in like.values()])
    return {n: part.reshape(s.shape) for part, (n, s) in zip(parts, like.items(), strict=True)}


def emp(scores: Tensors, group: str, beta: float) -> Tensors:
    """EMP's masks, where a group is the whole `model`, a `layer`, or a `row`: one output's."""
    if group == "model":
        return divide(keep_mask(as_one(scores), beta=beta), scores)
    dim = None if group == "layer" else -1
    return {n: keep_mask(s.flatten(1), beta=beta, dim=dim).view_as(s) for n, s in scores.items()}


def uniform(scores: Tensors, group: str, kept: int) -> Tensors:
    """Masks that keep `kept` scores, the same share of each group, the largest ones there."""
    if group == "model":
        return divide(_largest(as_one(scores)[None], [kept])[0], scores)
    share = kept / as_one(scores).numel()
    masks, seen, given = {}, 0.0, 0  # given to the groups so far, so that roundings cancel out
    for name, s in scores.items():
        rows = s.reshape(1, -1) if group == "layer" else s.flatten(1)
        counts = []
        for _ in rows:
            seen += share * rows.shape[1]
            counts.append(min(round(seen) - given, rows.shape[1]))
            given += counts[-1]
        masks[name] = _largest(rows, counts).view_as(s)
    return masks


def _largest(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    order = rows.argsort(dim=1, descending=True, stable=True)
    kept = torch.arange(rows.shape[1]) < torch.tensor(counts)[:, None]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, kept)


def count(masks: Tensors) -> int:
    """How many weights stay."""
    return sum(int(mask.sum()) for mask in masks.values())


def cost(model: nn.Module, masks: Tensors, data: Digits) -> dict[str, float]:
    """Sparsity in per cent, accuracy and loss of the model with its other weights zero."""
    pruned = copy.deepcopy(model)
    for name, weight in pruned.named_parameters():
        if name in masks:
            weight.data *= masks[name]
    kept = 100 * count(masks) / as_one(masks).numel()
    return {"sparsity": 100 - kept, **test(pruned, data)}
