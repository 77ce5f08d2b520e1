"""The table of quality goes on where it was interrupted; its second text and task are as told."""

import json
import sys

import pytest
import quality_table
from offline_task import TASK, write_task
from quality_rows import selected
from second_text import second_text
from support.word_models import known_model, save_words

from emp_llm import EvalOptions, evaluate


class Run:
    """The table of a model that nobody prunes: every row has the perplexity that is said here."""

    def __init__(self, folder, monkeypatch):
        self.folder, self._patch = folder, monkeypatch
        self.model, self.json = folder / "model", folder / "q.json"
        self.texts = [folder / "t.txt", folder / "u.txt"]
        self.model.mkdir()
        (self.model / "config.json").write_text('{"num_hidden_layers": 4}')
        for text in self.texts:
            text.write_text("some text")
        self.made, self.measured = [], []
        self.perplexities = iter([8.0, 10.0, 12.0])
        monkeypatch.setattr(quality_table, "make", self._make)
        monkeypatch.setattr(quality_table, "perplexity", self._perplexity)

    def _make(self, row, folder, _args):
        self.made.append(row.name)
        folder.mkdir()
        return {"cpu_seconds": 20.0, "peak_bytes": 3e9, "sparsity": 0.375, "bytes_ratio": 0.5}

    def _perplexity(self, folder, text, _args):
        self.measured.append((folder.name, text.name))
        found = next(self.perplexities, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    def __call__(self, *options, texts=1):
        paths = [str(path) for path in (self.model, self.texts[0], *self.texts[:texts])]
        more = ["--json", str(self.json), "--folders", str(self.folder / "made")]
        self._patch.setattr(sys, "argv", ["quality_table.py", *paths, *more, "--rows", *options])
        quality_table.main()


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path, monkeypatch)


def test_rows_that_are_there_are_not_made_again(run):
    run("magnitude@1")
    run("magnitude@1", "obs@1")
    assert run.made == ["magnitude@1", "obs@1"]
    assert list(json.loads(run.json.read_text())["results"]) == run.made
    run("magnitude@1", "--again")
    assert run.made == ["magnitude@1", "obs@1", "magnitude@1"]
    assert not list((run.folder / "made").iterdir())


def test_an_interrupted_row_goes_on_with_the_text_where_it_was(run):
    run.perplexities = iter([8.0])
    with pytest.raises(KeyboardInterrupt):
        run("wanda@1", texts=2)
    run.perplexities = iter([10.0])
    run("wanda@1", texts=2)
    assert run.made == ["wanda@1"]
    assert run.measured == [("wanda@1", name) for name in ("t.txt", "u.txt", "u.txt")]
    row = json.loads(run.json.read_text())["results"]["wanda@1"]
    assert row["perplexity"] == {"t.txt": 8.0, "u.txt": 10.0}


def test_rows_that_were_measured_differently_are_not_mixed(run):
    run("dense")
    with pytest.raises(SystemExit, match="give the same or another --json"):
        run("dense", "--context", "64")


def test_the_table_has_seconds_a_block_and_means_over_seeds(run, capsys):
    run("preset-repaired@1#*")
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == ("| preset-repaired@1#0 | 37.50% | 0.500 |  | 8.00 |  | 20 | 5.0 | 3000 |")
    # of 8, 10 and 12: the mean is 10, the squares add up to 8 over 2
    assert printed[5].startswith("| preset-repaired@1, 3 seeds |  |  |  | 10.00 ± 2.00 |")


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match="no row is called magnitude@2: choose among dense, "):
        selected(["magnitude@2"])


def test_the_second_text_is_100_kb_of_whole_characters():
    text = second_text()
    assert text.startswith('The "assert" statement')
    assert 100_000 - 3 <= len(text.encode()) <= 100_000


def test_the_task_asks_what_the_package_asks(tmp_path):
    """The model expects blue after sky and grass, white after snow."""
    questions = [
        {"input": " the sky ", "target_scores": {"green": 0, "blue": 1}},
        {"input": "the grass", "target_scores": {"blue": 0, "green": 1}},
        {"input": "the snow", "target_scores": {"white": 1, "red": 0, "green": 0}},
    ]
    write_task(tmp_path / "tasks", questions)
    known = save_words(tmp_path / "known", known_model())
    options = EvalOptions(tasks=(TASK,), include_path=tmp_path / "tasks")
    assert evaluate(known, options).model.tasks[TASK].metrics["acc"] == pytest.approx(2 / 3)
