"""The page as people use it, in a headless Chromium where there is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from support.pages import LEAVES, write_three_blocks

from emp_llm import inspect
from emp_llm.report.page.content import page_content
from emp_llm.report.page.page import write_page

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

EVIL = "<img src=x onerror=document.title='bad'>"
ROWS = "[...document.querySelectorAll('#tensors tbody tr')]"
FIRST_NAME = f"{ROWS}[0].querySelector('.name').textContent"
SHOWN = "document.querySelector('#tensors .count').textContent"
COMMAND = "document.querySelector('.command code').textContent"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    source = write_three_blocks(tmp_path_factory.mktemp("browser") / "source")
    found = inspect(source)
    found["tensors"][EVIL] = found["tensors"]["model.norm.weight"] | {"reason": EVIL}
    found["standing_out"] = [
        {"tensor": EVIL, "row": 3, "why": EVIL, "n_eff_fraction": 0.05, "mass_ratio": 2.0}
    ]
    found["standing_out_counts"] = {EVIL: 1}
    return found


@pytest.fixture
def browser(report: dict[str, Any], tmp_path: Path) -> Iterator[Browser]:
    """A browser with the page open, which must not have done anything it should not."""
    write_page(report, tmp_path / "page.html", model="my model")
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        browser.look(1280, 900)
        browser.open(tmp_path / "page.html")
        yield browser
        assert browser.faults() == []
        assert browser.run("document.title") == "source: Effective Model Pruning"
        assert browser.run("document.querySelectorAll('img').length") == 0


def press(browser: Browser, key: str, times: int = 1) -> None:
    """Press a key, as often as that, where the focus is."""
    for _ in range(times):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key=key)


def test_the_curve_is_walked_by_keys_and_the_command_follows(
    browser: Browser, report: dict[str, Any]
) -> None:
    curve = page_content(report)["curve"]
    at = curve["beta"].index(1.0)
    assert browser.run(COMMAND) == "emp-llm prune 'my model' --out ./source-emp --beta 1"
    browser.run("document.querySelector('.slider').focus()")
    press(browser, "ArrowLeft", 3)
    beta = curve["beta"][at - 3]
    assert browser.run(COMMAND).endswith(f" --beta {beta}")
    told = browser.run("document.querySelector('.readout').textContent")
    sparsity = curve["parts"][0]["sparsity"][at - 3]
    assert f"β = {beta}sparsity{100 * sparsity:.2f}%" in told
    press(browser, "Home")
    assert browser.run(COMMAND).endswith(f" --beta {curve['beta'][0]}")


def test_a_kind_has_a_curve_of_its_own(browser: Browser, report: dict[str, Any]) -> None:
    curve = page_content(report)["curve"]
    browser.run("document.querySelectorAll('#curve .chips button')[2].click()")
    told = browser.run("document.querySelector('.readout').textContent")
    sparsity = curve["parts"][2]["sparsity"][curve["beta"].index(1.0)]
    assert f"sparsity{100 * sparsity:.2f}%" in told


def test_the_table_is_sorted_and_filtered(browser: Browser, report: dict[str, Any]) -> None:
    table = page_content(report)["tensors"]
    click = "document.querySelectorAll('#tensors th button')[2].click()"
    for choose in (min, max):
        browser.run(click)
        place = table["n_eff_fraction_mean"].index(choose(table["n_eff_fraction_mean"]))
        assert browser.run(FIRST_NAME) == table["name"][place]
    assert browser.run(SHOWN) == "9 tensors"
    search = "document.querySelector('#tensors input')"
    browser.run(f"{search}.value = 'LAYERS.1'; {search}.dispatchEvent(new Event('input'))")
    assert browser.run(SHOWN) == "3 of 9 tensors"


def test_a_cell_chosen_by_keys_shows_its_tensor(browser: Browser) -> None:
    browser.run("document.querySelector('.map').focus()")
    press(browser, "ArrowRight", 2)
    press(browser, "ArrowDown")
    assert browser.run("document.querySelector('#tip b').textContent") == "block 2 · gate_proj"
    press(browser, "Enter")
    assert browser.run(SHOWN) == "1 of 9 tensors"
    assert browser.run(FIRST_NAME) == f"model.layers.2.mlp.{LEAVES[1]}.weight"
    press(browser, "Escape")
    assert browser.run(SHOWN) == "9 tensors"


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_it_fits_every_window(browser: Browser, width: int) -> None:
    browser.look(width, 800)
    browser.settle()
    assert browser.run("document.documentElement.scrollWidth") == width


def test_every_theme_has_readable_text(browser: Browser) -> None:
    for dark in (False, True):
        browser.look(1280, 900, dark=dark)
        browser.settle()
        paper, ink = (
            browser.run(f"getComputedStyle(document.body).{name}")
            for name in ("backgroundColor", "color")
        )
        light, text = (sum(map(int, color[4:-1].split(", "))) for color in (paper, ink))
        assert (light < text) == dark
        assert abs(light - text) > 500
