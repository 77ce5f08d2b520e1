"""The rows of the paper: each runs on a tiny setting, and their parts do what they say."""

import math
from pathlib import Path

import attention
import comparison
import convolutional
import digits
import fully_connected
import kan
import numpy as np
import photographs
import pytest
import row
import torch
import vision_transformer
from run_all import ROWS
from scipy.interpolate import BSpline
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
TINY = {
    "fully_connected": lambda seed: fully_connected.measure(seed, epochs=1),
    "convolutional": lambda seed: convolutional.measure(seed, epochs=1),
    "kan": lambda seed: kan.measure(seed, epochs=1),
    "photographs": photographs.measure,
    "attention": lambda seed: attention.measure(seed, windows=1),
    "vision_transformer": lambda seed: vision_transformer.measure(seed, epochs=1),
}


@pytest.fixture
def little(monkeypatch):
    """Few images, a corner of a photograph, few β and narrow nets."""
    whole = digits.load
    photograph = photographs.photograph
    monkeypatch.setattr(photographs, "photograph", lambda n: photograph(n)[:, :160, :240])
    monkeypatch.setattr(digits, "load", lambda seed: few(whole(seed)))
    monkeypatch.setattr(comparison, "BETAS", ("0.5", "1.0"))
    monkeypatch.setattr(comparison, "SPARSITIES", (50, 90))
    monkeypatch.setattr(fully_connected, "NETS", {"FC2": (64, 8, 10), "FC5": (64, 8, 8, 8, 8, 10)})
    monkeypatch.setattr(photographs, "BETAS", (0.5, 1.0))
    monkeypatch.setattr(attention, "BETAS", ("0.25", "0.5", "1", "2"))


def few(data):
    parts = (data.train_x[:640], data.train_y[:640], data.test_x[:64], data.test_y[:64])
    return digits.Digits(*parts)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("paper", ROWS, ids=lambda paper: paper.name)
def test_a_row_is_measured_told_and_drawn(paper, monkeypatch, tmp_path):
    monkeypatch.setattr(row, "RESULTS", tmp_path)
    monkeypatch.setattr(row, "PICTURES", tmp_path)
    measured = [TINY[paper.name](0)]

    row.keep(paper, measured)
    row.save_picture(paper, row.load(paper))

    lines = row.table(paper, row.load(paper)).splitlines()
    assert len(lines) == 2 + len(paper.lines(measured)) + len(paper.notes(measured))
    assert (tmp_path / f"paper_{paper.name}.{paper.picture}").stat().st_size > 5000


@pytest.mark.parametrize("paper", ROWS, ids=lambda paper: paper.name)
def test_the_page_shows_the_table_of_the_results_that_are_kept(paper):
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")

    assert row.table(paper, row.load(paper)) in page
    assert f"figures/paper_{paper.name}.{paper.picture}" in page


def test_each_script_is_shorter_than_150_lines():
    scripts = (ROOT / "examples" / "paper").glob("*.py")
    rows = [path for path in scripts if path.stem in TINY]

    assert len(rows) == len(ROWS) == len(TINY)
    assert all(path.read_text(encoding="utf-8").count("\n") < 150 for path in rows)


SCORES = {
    "a": torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),
    "b": torch.tensor([[8.0, 7.0], [6.0, 5.0]]),
}


def test_equal_shares_keep_as_many_of_each_layer_and_row():
    # half of 12; 4 of the 8 in a, 2 of the 4 in b; ties go to the first
    layers = digits.uniform(SCORES, "layer", 6)
    assert layers["a"].tolist() == [[True, True, True, True], [False] * 4]
    assert layers["b"].tolist() == [[True, True], [False, False]]
    rows = digits.uniform(SCORES, "row", 6)
    assert rows["a"].tolist() == [[True, True, False, False]] * 2
    assert rows["b"].tolist() == [[True, False]] * 2
    whole = digits.uniform(SCORES, "model", 6)
    assert whole["a"].tolist() == [[True, True, False, False], [False] * 4]
    assert whole["b"].all()


@pytest.mark.parametrize("kept", range(13))
def test_shares_that_do_not_divide_still_keep_the_whole_number(kept):
    for group in ("model", "layer", "row"):
        assert digits.count(digits.uniform(SCORES, group, kept)) == kept


def test_emp_keeps_the_effective_number_of_its_group():
    # a: 14² / 34 = 5.8; its rows 10² / 30 = 3.3 and 4; b: 26² / 174 = 3.9; its rows 1.99 and 1.98
    # all: 40² / 208 = 7.7
    counts = {group: digits.count(digits.emp(SCORES, group, 1.0)) for group in comparison.GROUPS}
    assert counts == {"model": 7, "layer": 5 + 3, "row": 3 + 4 + 1 + 1}


def test_the_point_that_is_lost_lies_between_two_shares():
    costs = ((50, 98.0), (60, 97.5), (70, 96.5))
    shares = [{"sparsity": at, "accuracy": accuracy} for at, accuracy in costs]
    run = {"dense": {"accuracy": 98.0}, "shares": shares}
    assert comparison.point_lost_at(run) == pytest.approx(65)  # 97 is half way from 97.5 to 96.5


def test_a_difference_is_told_from_chance():
    def verdict(*gaps, lower=False):
        line = row.Line("", gaps, gaps, gaps, [0.0] * len(gaps), lower_is_better=lower)
        return line.verdict().split()[-1]

    assert verdict(1.0, 1.2, 0.9, 1.1, 1.0) == "better"
    assert verdict(-1.0, -1.2, -0.9, -1.1, -1.0) == "worse"
    assert verdict(-1.0, -1.2, -0.9, -1.1, -1.0, lower=True) == "better"
    # mean 1, deviation 1.58, 2.776 · 1.58 / √5 = 1.96
    assert verdict(1.0, -1.0, 3.0, 2.0, 0.0) == "unclear"


def test_gradients_are_means_of_their_magnitudes_over_batches():
    model = torch.nn.Linear(2, 2, bias=False)
    x, y = torch.randn(128, 2), torch.randint(2, (128,))
    data = digits.Digits(x, y, x, y)

    found = convolutional.gradients(model, data, batches=2)

    # of softmax regression: (p − onehot(y)) xᵀ, the mean of a batch
    error = model(x).softmax(1) - torch.nn.functional.one_hot(y)
    per_image = torch.einsum("no,ni->noi", error, x)
    by_hand = (per_image[:64].mean(0).abs() + per_image[64:].mean(0).abs()) / 2
    torch.testing.assert_close(found["weight"], by_hand)


def test_the_notebooks_reading_prunes_what_the_rule_keeps():
    data = few(digits.load(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model[1].weight.data[:] = torch.arange(640.0).view(10, 64) - 320

    found = convolutional.by(model, digits.magnitudes(model), data)

    kept = found["keep N_eff"]["emp"]["sparsity"]
    assert found["prune N_eff"]["emp"]["sparsity"] == pytest.approx(100 - kept)
    # |w| from 0 to 320, evenly: N_eff is 3/4 of all
    assert kept == pytest.approx(25, abs=0.5)


def test_splines_are_those_of_scipy():
    cell = 2 / kan.CELLS
    knots = np.arange(-3, kan.CELLS + 4) * cell - 1
    x = np.linspace(-0.999, 0.999, 50)

    found = kan.cubic_splines(torch.tensor(x, dtype=torch.float32))

    np.testing.assert_allclose(found, BSpline.design_matrix(x, knots, 3).toarray(), atol=1e-6)


def test_a_node_is_as_important_as_its_strongest_edge_and_goes_with_its_edges():
    first, second = kan.SplineLayer(2, 3), kan.SplineLayer(3, 1)
    first.coefficients.data[:] = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.5, 0.0]])[..., None]
    second.coefficients.data[:] = torch.tensor([[-1.0, 1.0, 4.0]])[..., None]
    assert kan.importance(first, second).tolist() == [2.0, 3.0, 4.0]

    x = torch.randn(5, 2)
    hidden = first(x)
    last_alone = kan.SplineLayer(1, 1)
    last_alone.base.weight.data = second.base.weight.data[:, 2:]
    last_alone.coefficients.data = second.coefficients.data[:, 2:]
    pruned = kan.without(torch.nn.Sequential(first, second), torch.tensor([False, False, True]))
    torch.testing.assert_close(pruned(x), last_alone(hidden[:, 2:]))


def test_pixels_that_are_pruned_get_the_mean_of_their_patch():
    image = torch.zeros(3, 8, 8)
    image[1, 4:, :4] = torch.arange(16.0).view(4, 4)

    pruned, kept = photographs.pruned(image, "patches", lambda scores: scores >= 7)

    by_hand = image.clone()
    by_hand[1, 4:, :4] = 7.5
    by_hand[1, 4, 0], by_hand[1, 7, 3] = 0, 15
    assert torch.equal(pruned, by_hand)
    assert kept == 2
    assert torch.equal(photographs.put_back(photographs.channels(image), image), image)


def test_quality_is_that_of_the_mean_squared_error():
    image = torch.full((3, 16, 16), 100.0)
    other = image.clone()
    other[:, ::2] += 10  # a mean squared error of 50
    found = photographs.quality(image, other)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / 50))
    assert photographs.quality(image, other + 0.3) == found  # whole values, as in a file


WEIGHTS = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.5, 0.3, 0], [0.4, 0.1, 0.2, 0.3]])


def test_controls_keep_the_largest_and_the_latest_keys():
    # half of 10 pairs: one for every query, and one more for the last
    largest = attention.top(WEIGHTS, 0.5).int().tolist()
    assert largest == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]]
    latest = attention.window(WEIGHTS, 0.5).int().tril().tolist()
    assert latest == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("pairs", range(4, 11))
def test_controls_keep_as_many_pairs_as_asked_for(pairs):
    for control in (attention.top, attention.window):
        kept = control(WEIGHTS, pairs / 10) & torch.ones(4, 4, dtype=torch.bool).tril()
        assert int(kept.sum()) == pairs


def test_with_all_keys_the_perplexity_is_that_of_transformers(monkeypatch):
    monkeypatch.setattr(attention, "BETAS", ())
    found = attention.measure(0, windows=1)["dense"]

    folder = ROOT / "demo" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (ROOT / "demo" / "text.txt").read_text(encoding="utf-8")[:5000]
    x = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:256]])
    assert found["kept"] == 100
    assert found["perplexity"] == pytest.approx(model(x, labels=x).loss.exp().item(), rel=1e-5)
