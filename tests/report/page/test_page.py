"""The page of a report: the numbers in it, what strangers' names can do, what it asks for."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import Tensors
from support.pages import BLOCKS, LEAVES, Page, name_of, summed, three_blocks, write_three_blocks

from emp_llm import OutputError, PruneOptions, inspect, prune
from emp_llm.report.page.content import page_content
from emp_llm.report.page.page import page_html, write_page

Report = dict[str, Any]

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "a\u2028b\u2029c",
    "\x00\x1b[31m",
    "\ud800",
    '"&quot;\\',
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_blocks(tmp_path_factory.mktemp("page") / "source")


@pytest.fixture(scope="module")
def report(source: Path) -> Report:
    return inspect(source)


@pytest.fixture(scope="module")
def content(report: Report) -> Report:
    return page_content(report)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return three_blocks()


def near(figures: Any, *, rounded: int = 1) -> Any:
    """To the six digits that a report holds; sums of such numbers are rounded once more."""
    return pytest.approx(figures, rel=5.1e-6 * rounded)


# numbers


def test_each_tensor_has_its_own_figures(content: Report, tensors: Tensors) -> None:
    table = content["tensors"]
    assert table["name"] == [name_of(block, leaf) for block in range(BLOCKS) for leaf in LEAVES]
    for row, name in enumerate(table["name"]):
        expected = summed([tensors[name]], 1.0)
        assert {field: table[field][row] for field in expected.figures} == near(expected.figures)
        least, most = table["n_eff_fraction_min"][row], table["n_eff_fraction_max"][row]
        assert (least, most) == near((min(expected.fractions), max(expected.fractions)))
        assert content["shapes"][table["shape"][row]] == " × ".join(map(str, tensors[name].shape))


def test_each_cell_is_one_block_of_one_kind(content: Report, tensors: Tensors) -> None:
    assert [kind["name"] for kind in content["kinds"]] == list(LEAVES)
    assert [block["number"] for block in content["blocks"]] == [0, 1, 2]
    found = {(cell["block"], cell["kind"]): cell for cell in content["cells"]}
    assert len(found) == len(content["cells"]) == BLOCKS * len(LEAVES)
    for (block, kind), cell in found.items():
        expected = summed([tensors[name_of(block, LEAVES[kind])]], 1.0).figures
        assert {field: cell[field] for field in expected} == near(expected, rounded=2)


def test_a_kind_sums_up_its_tensors_and_counts_their_rows(
    content: Report, tensors: Tensors
) -> None:
    for kind, leaf in zip(content["kinds"], LEAVES, strict=True):
        expected = summed([tensors[name_of(block, leaf)] for block in range(BLOCKS)], 1.0)
        found = {field: kind[field] for field in expected.figures}
        assert found == near(expected.figures, rounded=2)
        counts = [0] * 50
        for fraction in expected.fractions:
            counts[int(fraction * 50)] += 1
        assert kind["histogram"]["counts"] == counts
        assert kind["histogram"]["min"] == near(min(expected.fractions))
        assert kind["histogram"]["max"] == near(max(expected.fractions))


def test_the_curve_is_what_the_rule_leaves_at_every_beta(content: Report, tensors: Tensors) -> None:
    curve = content["curve"]
    assert curve["beta"] == sorted(curve["beta"])
    assert 1.0 in curve["beta"]
    assert [part["name"] for part in curve["parts"]] == ["all targets", *LEAVES]
    for part in curve["parts"]:
        leaves = [part["name"]] if part["name"] in LEAVES else LEAVES
        chosen = [tensors[name_of(block, leaf)] for block in range(BLOCKS) for leaf in leaves]
        for i, beta in enumerate(curve["beta"]):
            expected = summed(chosen, beta).figures
            assert part["sparsity"][i] == near(expected["sparsity"])
            assert part["retained_mass"][i] == near(expected["retained_mass"])


def test_the_bytes_of_the_curve_are_those_that_prune_writes(
    content: Report, source: Path, tmp_path: Path
) -> None:
    curve = content["curve"]
    for beta in (curve["beta"][3], 1.0, curve["beta"][-1]):
        i = curve["beta"].index(beta)
        written = prune(source, tmp_path / f"{beta}", PruneOptions(beta=beta))["totals"]
        assert curve["parts"][0]["bytes"][i] == written["targets"]["bytes_after"]
        assert curve["parts"][0]["bytes_ratio"][i] == written["targets"]["bytes_ratio"]
        assert curve["model_bytes"][i] == written["model"]["bytes_after"]


def test_the_axis_of_the_curve_ends_where_nothing_more_is_pruned(content: Report) -> None:
    sparsities = content["curve"]["parts"][0]["sparsity"]
    assert [sparsity > 0.001 for sparsity in sparsities[:-1]] == [True] * (len(sparsities) - 1)
    assert sparsities[-1] <= 0.001
    assert content["curve"]["whole_at"] >= content["curve"]["beta"][-1]


def test_what_is_left_alone_is_told_with_its_reason(content: Report) -> None:
    norm = {"tensors": 1, "bytes": 64, "bytes_after": 64, "names": ["model.norm.weight"]}
    assert content["left"] == [{"reason": "norm", **norm}]


def test_a_report_of_prune_has_the_same_numbers_but_the_curve(
    content: Report, source: Path, tmp_path: Path
) -> None:
    written = page_content(prune(source, tmp_path / "out"))
    assert written["curve"] is None
    assert written["standing_out"] is None
    for part in ("cells", "kinds", "tensors", "left"):
        assert written[part] == content[part]


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_larger_groups_have_a_page_without_a_curve(source: Path, granularity: str) -> None:
    report = inspect(source, PruneOptions(granularity=granularity))
    content = Page(page_html(report)).content
    assert content["curve"] is None
    assert len(content["cells"]) == BLOCKS * len(LEAVES)


# the command


def test_the_command_is_the_one_that_prunes_so(source: Path) -> None:
    options = PruneOptions(beta=0.5, targets="gate|up", ignore=("layers.0",))
    report = inspect(source, options)
    assert page_content(report, model="my models/x")["command"] == [
        *("emp-llm", "prune", "'my models/x'", "--out", "./source-emp"),
        *("--targets", "'gate|up'", "--ignore", "layers.0"),
    ]


def test_a_model_of_the_hub_is_pruned_at_the_same_revision(report: Report) -> None:
    report = report | {"source": {"model": "me/llama", "revision": "a" * 40}}
    assert page_content(report)["command"] == [
        *("emp-llm", "prune", "me/llama", "--out", "./llama-emp", "--revision", "a" * 40)
    ]


# the file


def test_the_numbers_in_the_file_are_those_of_the_content(report: Report, content: Report) -> None:
    assert content.items() <= Page(page_html(report)).content.items()


def test_the_same_report_makes_the_same_page(report: Report) -> None:
    assert page_html(report) == page_html(json.loads(json.dumps(report)))


def renamed(report: Report, name: str) -> Report:
    """A report in which everything that a stranger chooses is this."""
    tensors = {}
    for i, (_, fields) in enumerate(report["tensors"].items()):
        block = fields["block"] and f"{name}.{i}"
        tensors[f"{name}{i}"] = fields | {"kind": name, "block": block, "reason": name}
    curve = report["curve"] | {"kinds": {name: report["curve"]["targets"]}}
    row = {"tensor": name, "row": 0, "why": name, "n_eff_fraction": 0.5, "mass_ratio": 1.0}
    return report | {
        "tensors": tensors,
        "curve": curve,
        "source": {"model": name, "revision": name},
        "rule": report["rule"] | {"targets": name, "ignore": [name]},
        "standing_out": [row],
        "standing_out_counts": {name: 1},
    }


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_stay_data(report: Report, name: str) -> None:
    plain, page = (Page(page_html(renamed(report, n), model=n)) for n in ("x", name))
    assert page.tags[: len(plain.tags)] == plain.tags
    assert len(page.tags) == len(plain.tags)
    assert page.texts["script"] == plain.texts["script"]
    assert page.content["command"][2].strip("'")[:1] == name[:1]
    printed = page.content["kinds"][0]["name"]
    assert printed.isprintable()
    assert printed == name or not name.isprintable()


def test_the_script_never_makes_elements_of_text(report: Report) -> None:
    script = Page(page_html(report)).texts["script"]
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script
    assert not re.search(r"""setAttribute\(["']on""", script)


def test_the_policy_allows_its_own_style_and_script_and_nothing_else(report: Report) -> None:
    page = Page(page_html(report))
    (policy,) = (
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy == (
        f"default-src 'none'; style-src {digest(page.texts['style'])}; "
        f"script-src {digest(page.texts['script'])}; base-uri 'none'; form-action 'none'"
    )
    assert not any(name == "style" for _, attributes in page.tags for name in attributes)


def test_nothing_in_it_leads_to_the_network_but_a_link_to_the_paper(report: Report) -> None:
    html = page_html(report)
    assert set(re.findall(r"\w+://[^\s\"'<>;)]+", html)) == {
        "https://arxiv.org/abs/2509.25606",
        "http://www.w3.org/2000/svg",  # the name of a language, which nobody asks for
    }
    assert not re.search(
        r"\b(src|srcset|data|action)=|url\(|@import|fetch\(|XMLHttp|import\(", html
    )
    links = [attributes for tag, attributes in Page(html).tags if "href" in attributes]
    assert [link["href"] for link in links] == ["https://arxiv.org/abs/2509.25606"]


def test_a_page_takes_the_place_of_an_older_one(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("older")
    write_page(report, path)
    assert path.read_text(encoding="utf-8") == page_html(report)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_one_line(report: Report, tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match=r"page\.html: cannot be written: Is a directory"):
        write_page(report, tmp_path / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_thousands_of_tensors_stay_a_small_file_of_few_cells(report: Report) -> None:
    (one,) = (f for name, f in report["tensors"].items() if name == name_of(0, "up_proj"))
    tensors = {
        f"model.layers.{block}.mlp.experts.{expert}.up_proj.weight": one
        | {"block": f"model.layers.{block}", "kind": "experts.up_proj"}
        for block in range(12)
        for expert in range(256)
    }
    line = report["curve"]["targets"]
    curve = report["curve"] | {"kinds": {"experts.up_proj": line}}
    html = page_html(report | {"tensors": tensors, "curve": curve})
    content = Page(html).content
    assert [block["number"] for block in content["blocks"]] == list(range(12))
    assert [cell["tensors"] for cell in content["cells"]] == [256] * 12
    assert len(content["tensors"]["name"]) == 12 * 256
    assert len(html) < 100_000 + 160 * 12 * 256
