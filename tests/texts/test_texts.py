"""The texts of perplexities by name: how rows are joined, local files, what cannot be read."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from emp_llm import HubError, OptionError
from emp_llm.texts.texts import Text, read_text

ROWS = ["", " = Title = \n", "It rains . \n", "é\n"]


class Loaded:
    """Stands in for ``load_dataset``, and remembers what it was asked for."""

    def __init__(self, columns: dict[str, list[str]]) -> None:
        self.columns = columns
        self.asked: dict[str, Any] = {}

    def __call__(self, **arguments: Any) -> datasets.Dataset:
        assert arguments.pop("trust_remote_code") is False
        self.asked = arguments
        return datasets.Dataset.from_dict(self.columns)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    stand_in = Loaded({"text": ROWS})
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize("protocol", ["paper", "gptq"])
def test_wikitext2_is_the_rows_of_the_raw_test_set_joined_by_blank_lines(
    loaded: Loaded, protocol: Any
) -> None:
    text = read_text("wikitext2", protocol=protocol)

    assert text == Text("wikitext2", "\n\n = Title = \n\n\nIt rains . \n\n\né\n")
    assert loaded.asked == {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "split": "test",
    }


def test_ptb_is_joined_by_spaces_in_gptq_and_by_blank_lines_in_paper(loaded: Loaded) -> None:
    loaded.columns = {"sentence": ["no it was n't", "black monday"]}

    assert read_text("ptb", protocol="gptq").text == "no it was n't black monday"
    assert read_text("ptb", protocol="paper").text == "no it was n't\n\nblack monday"
    assert loaded.asked == {
        "path": "ptb-text-only/ptb_text_only",
        "revision": "refs/convert/parquet",
        "data_files": {"test": "penn_treebank/test/0000.parquet"},
        "split": "test",
    }


def test_c4_is_1100_documents_of_the_first_validation_shard(loaded: Loaded) -> None:
    loaded.columns = {"text": ["One.", "Two."], "url": ["a", "b"]}

    assert read_text("c4", protocol="gptq") == Text("c4", "One. Two.", 256)
    assert read_text("c4", protocol="paper") == Text("c4", "One.\n\nTwo.")
    assert loaded.asked == {
        "path": "allenai/c4",
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "split": "validation[:1100]",
    }


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        (
            "wikitext2",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
        ),
        (
            "ptb",
            {
                "path": "ptb-text-only/ptb_text_only",
                "revision": "refs/convert/parquet",
                "data_files": {"train": "penn_treebank/train/0000.parquet"},
                "split": "train",
            },
        ),
        (
            "c4",
            {
                "path": "allenai/c4",
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "split": "train[:4000]",
            },
        ),
        ("me/data", {"path": "me/data", "name": None, "split": "train"}),
        ("me/data:part:test", {"path": "me/data", "name": "part", "split": "test"}),
    ],
)
def test_the_part_to_calibrate_on_is_that_for_training_unless_another_is_named(
    loaded: Loaded, name: str, asked: dict[str, Any]
) -> None:
    loaded.columns = {"text": ["One.", "Two."]}

    text = read_text(name, protocol="gptq", part="train")

    join = " " if name in ("ptb", "c4") else "\n\n"
    assert text == Text(name, f"One.{join}Two.")
    assert loaded.asked == asked


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("me/data", None, "test"),
        ("me/data:part", "part", "test"),
        ("me/data:part:train[:10]", "part", "train[:10]"),
        ("me/data::validation", None, "validation"),
    ],
)
def test_a_data_set_of_the_hub_with_its_configuration_and_split(
    loaded: Loaded, name: str, config: str | None, split: str
) -> None:
    assert read_text(name, protocol="gptq").name == name
    assert loaded.asked == {"path": "me/data", "name": config, "split": split}


@pytest.mark.parametrize("protocol", ["paper", "gptq"])
def test_a_local_text_is_taken_as_it_is(tmp_path: Path, protocol: Any) -> None:
    content = " \n = Title = \n \r\n It rains é . \n"
    (tmp_path / "wiki.txt").write_bytes(content.encode())

    assert read_text(str(tmp_path / "wiki.txt"), protocol=protocol) == Text("wiki.txt", content)


def test_rows_of_local_files_are_joined_by_blank_lines_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    rows = [{"id": 1, "text": "One.\n"}, {"id": 2, "text": "Zwei é"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sentences = datasets.Dataset.from_dict({"sentence": [row["text"] for row in rows]})
    sentences.to_parquet(tmp_path / "rows.parquet")

    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        text = read_text(str(tmp_path / name), protocol="gptq")
        assert text == Text(name, "One.\n\n\nZwei é")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "cache").exists()


def refusal(name: object, kind: type[Exception] = OptionError) -> str:
    with pytest.raises(kind) as caught:
        read_text(str(name), protocol="paper")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.json").write_text("not JSON")
    (tmp_path / "broken.parquet").write_text("not")
    (tmp_path / "other.jsonl").write_text('{"content": "One.", "id": 1}\n')

    assert "latin.txt: is not a text in UTF-8" in refusal(tmp_path / "latin.txt")
    assert re.search("broken.json: cannot be read: .*JSON", refusal(tmp_path / "broken.json"))
    assert "broken.parquet: cannot be read: Parquet" in refusal(tmp_path / "broken.parquet")
    found = refusal(tmp_path / "other.jsonl")
    assert "has the columns content, id; none of them is text or sentence" in found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no.txt", "no.txt: there is no such file; give a text, parquet or JSON file"),
        ("./no", "./no: there is no such file"),
        ("", "'': there is no such file"),
        (":b:c", "':b:c' is neither a file nor a data set"),
        ("a/b/c", "'a/b/c' is neither a file nor a data set"),
    ],
)
def test_a_name_that_can_be_nothing_is_refused(name: str, reason: str) -> None:
    assert reason in refusal(name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}: is a folder; give a text" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4", "me/data:part"])
def test_without_a_network_it_says_to_give_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    message = refusal(name, HubError)

    assert message.startswith(f"{name} cannot be fetched (")
    assert "--perplexity FILE" in message
    with pytest.raises(HubError, match="--calibration FILE"):
        read_text(name, protocol="paper", part="train")


def test_a_split_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_arguments: object) -> None:
        raise ValueError("Unknown split \"test\". Should be one of ['train'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert refusal("me/data") == (
        "me/data: cannot be read: Unknown split \"test\". Should be one of ['train']."
    )


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['datasets'] = None\n"
        "from emp_llm.texts.texts import read_text\n"
        "read_text('wikitext2', protocol='paper')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last == (
        "emp_llm.errors.OptionError: datasets is not installed, which this needs: "
        "run pip install 'emp-llm[eval]'"
    )
