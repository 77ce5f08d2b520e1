"""Two photographs, whose pixels and patches are pruned by how far they are from their mean."""

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from row import BLUE, GREEN, GREY, ORANGE, Line, Row, Run, finish, run
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.datasets import load_sample_images

from emp_llm import keep_mask

PATCH = 4
Rule = Callable[[torch.Tensor], torch.Tensor]

NAMES = ("china", "flower")
BETAS = (0.25, 0.5, 0.75, 1.0, 1.1)
# of one photograph of 4000 × 6000: PSNR and SSIM
AUTHORS = {"pixels": ("26.7: 29.4", "26.7: 0.912"), "patches": ("32.3: 38.3", "32.3: 0.991")}


def photograph(number: int) -> torch.Tensor:
    """scikit-learn's `china` or `flower` in whole patches: float32 [3, 424, 640], from 0 to 255."""
    pixels = torch.tensor(load_sample_images().images[number], dtype=torch.float32)
    rows, columns = (size // PATCH * PATCH for size in pixels.shape[:2])
    return pixels[:rows, :columns].permute(2, 0, 1)


def channels(image: torch.Tensor) -> torch.Tensor:
    """Each colour channel is a group: [3, pixels]."""
    return image.flatten(1)


def patches(image: torch.Tensor) -> torch.Tensor:
    """Each patch of 4 × 4 pixels of a channel is a group: [patches, 16]."""
    tiles = image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return tiles.reshape(-1, PATCH * PATCH)


def put_back(groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `channels` and `patches`."""
    if len(groups) == len(like):
        return groups.view_as(like)
    _, rows, columns = like.shape
    tiles = groups.view(-1, rows // PATCH, columns // PATCH, PATCH, PATCH)
    return tiles.transpose(2, 3).reshape(like.shape)


def fixed(scores: torch.Tensor, kept: int, *, everywhere: bool) -> torch.Tensor:
    """Masks of `kept` scores: the largest of all groups, or as many in each group."""
    if everywhere:
        return fixed(scores.flatten()[None], kept, everywhere=False).view_as(scores)
    ends = torch.arange(len(scores) + 1) * kept // len(scores)
    order = scores.argsort(dim=1, descending=True, stable=True)
    mask = torch.arange(scores.shape[1]) < ends.diff()[:, None]
    return torch.zeros_like(mask).scatter_(1, order, mask)


def pruned(image: torch.Tensor, kind: str, choose: Rule) -> tuple[torch.Tensor, int]:
    """The image with its other pixels at their group's mean, and how many keep their value.

    Args:
        image: As `photograph` gives it.
        kind: "pixels", where a channel is a group, or "patches".
        choose: From distances [groups, pixels] to a mask of them.
    """
    groups = channels(image) if kind == "pixels" else patches(image)
    means = groups.mean(1, keepdim=True)
    mask = choose((groups - means).abs())
    return put_back(torch.where(mask, groups, means), image), int(mask.sum())


def quality(image: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """PSNR in dB, and SSIM, of an image rounded to whole values."""
    a, b = (x.round().clamp(0, 255).byte().permute(1, 2, 0).numpy() for x in (image, other))
    return {
        "psnr": float(peak_signal_noise_ratio(a, b)),
        "ssim": float(structural_similarity(a, b, channel_axis=2)),
    }


def measure(number: int) -> Run:
    """One photograph's figures at each β: EMP, as many in every group, and as many of all."""
    image = photograph(number)
    found: Run = {}
    for kind in AUTHORS:
        found[kind] = {}
        for beta in BETAS:
            ours, kept = pruned(image, kind, lambda scores, beta=beta: keep_mask(scores, beta=beta))
            costs = {"emp": quality(image, ours)}
            for name, everywhere in (("each", False), ("all", True)):
                choose = partial(fixed, kept=kept, everywhere=everywhere)
                costs[name] = quality(image, pruned(image, kind, choose)[0])
            found[kind][f"{beta:g}"] = {"sparsity": 100 * (1 - kept / image.numel()), **costs}
    return found


def lines(runs: list[Run]) -> list[Line]:
    """EMP beside as many pixels in every group, and beside the largest distances of all groups."""
    return [
        Line(
            f"{name}, {kind}, {told} {measured.upper()}",
            [run[kind]["1"]["sparsity"]],
            [float("inf") if measured == "psnr" else 1.0],
            [run[kind]["1"]["emp"][measured]],
            [run[kind]["1"][control][measured]],
            AUTHORS[kind][number],
            decimals=(1, 3)[number],
        )
        for name, run in zip(NAMES, runs, strict=False)
        for kind in AUTHORS
        for number, measured in enumerate(("psnr", "ssim"))
        for control, told in (("each", "as many in each:"), ("all", "largest of all:"))
    ]


def draw(figure: Figure, runs: list[Run]) -> None:
    """A part of a photograph, whole and pruned at β = 1, and what each sparsity costs."""
    image = photograph(0)
    shown = {"whole": image}
    for kind in AUTHORS:
        shown[f"EMP, {kind}"] = pruned(image, kind, keep_mask)[0]
    parts = figure.subplots(1, 5, width_ratios=(1, 1, 1, 1.3, 1.3))
    for axes, (title, pixels) in zip(parts, shown.items(), strict=False):
        axes.imshow(
            pixels[:, 140:300, 230:390].permute(1, 2, 0).numpy() / 255, interpolation="nearest"
        )
        axes.set(title=title)
        axes.set_axis_off()
    styles = {"emp": (ORANGE, "EMP"), "each": (BLUE, "as many in each"), "all": (GREEN, "of all")}
    for axes, kind in zip(parts[3:], AUTHORS, strict=True):
        for name, (color, label) in styles.items():
            costs = [runs[0][kind][f"{beta:g}"] for beta in BETAS]
            x, y = [c["sparsity"] for c in costs], [c[name]["ssim"] for c in costs]
            axes.plot(x, y, color=color, marker="o", markersize=3, label=label)
        one = runs[0][kind]["1"]
        axes.axvline(one["sparsity"], color=GREY, linewidth=0.8, label="β = 1")
        finish(axes, xlabel="sparsity, %", title=f"SSIM, {kind}")
    figure.legend(*parts[3].get_legend_handles_labels(), loc="outside lower center", ncols=4)


TITLE = "Two photographs, by the distance of pixels to their mean"
ROW = Row(
    *("photographs", TITLE, measure, lines, draw), seeds=(0, 1), picture="png", size=(12, 3.2)
)

if __name__ == "__main__":
    run(ROW)
