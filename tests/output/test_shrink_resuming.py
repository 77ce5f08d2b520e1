"""A shrinking that was killed goes on, and gives the same bytes."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.calibrated import calibration, save_model, save_text
from support.checkpoints import files
from support.mixtures import make_mixture

from emp_llm import OutputError, ShrinkOptions, shrink
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.shrinking import block_choice, choosing
from emp_llm.shrinking.column_sink import ColumnSink

OPTIONS = ShrinkOptions(experts=3)

KILLED = """
import os, sys, time
import transformers  # so that no other process has to
import emp_llm

class Stop:
    def begin(self, stage, total, unit="B"):
        self.stage, self.left = stage, total // 2
    def advance(self, count):
        self.left -= count
        if self.stage == sys.argv[3] and self.left < 0:
            time.sleep(0.5)  # for the disk
            os._exit(9)

emp_llm.shrink(sys.argv[1], sys.argv[2], emp_llm.ShrinkOptions(experts=3), progress=Stop())
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_mixture("mixtral", torch.bfloat16).save_pretrained(folder, max_shard_size=6000)
    return folder


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    shrink(dense, out, OPTIONS)
    return files(out)


def kill(dense: Path, out: Path, stage: str) -> Path:
    """Kill a run half way through a stage."""
    arguments = [sys.executable, "-c", KILLED, str(dense), str(out), stage]
    assert subprocess.run(arguments, check=False).returncode == 9
    return out


@pytest.fixture(scope="module")
def killed_once(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kill(dense, tmp_path_factory.mktemp("killed") / "out", "shrinking")


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A run that was killed half way through its shards."""
    return copytree(killed_once, tmp_path / "out")


def test_it_goes_on_with_what_it_had_chosen_and_finished(
    dense: Path, whole: dict[str, bytes], killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = killed
    shards = sorted((out / STAGING_NAME).glob("*.safetensors"))
    assert 0 < len(shards) < len([name for name in whole if name.endswith(".safetensors")])
    assert not (out / "config.json").exists()
    (damaged, *others) = shards
    times = {path.name: path.stat().st_mtime_ns for path in others}
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(choosing, "ExpertScores", None)  # nothing is scored again

    shrink(dense, out, OPTIONS)

    assert files(out) == whole
    assert {path.name: (out / path.name).stat().st_mtime_ns for path in others} == times


@pytest.mark.slow
def test_killed_while_it_scores_it_begins_again(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = kill(dense, tmp_path / "out", "scoring")
    shrink(dense, out, OPTIONS)
    assert files(out) == whole


def test_other_options_do_not_go_on_from_there(dense: Path, killed: Path) -> None:
    out = killed
    with pytest.raises(OutputError, match=r"differs from this one \(experts was 3, is 2\)"):
        shrink(dense, out, ShrinkOptions(experts=2))
    with pytest.raises(OutputError, match=r"differs from this one \(width score was 'activation'"):
        shrink(dense, out, ShrinkOptions(experts=3, width_score="random"))
    report = shrink(dense, out, ShrinkOptions(experts=2), overwrite=True)
    assert report["structures"]["experts"]["kept"] == 2
    assert not (out / STAGING_NAME).exists()


def test_the_result_does_not_depend_on_threads(
    dense: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shrink(dense, tmp_path / "out", OPTIONS, threads=1)
    assert files(tmp_path / "out") == whole


def interrupted(source: Path, out: Path, options: ShrinkOptions) -> list[str]:
    """What Ctrl-C tells of a run."""
    with pytest.raises(KeyboardInterrupt) as caught:
        shrink(source, out, options)
    return caught.value.__notes__


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_text(folder / "words.txt")
    return save_model(folder / "dense", "llama", num_hidden_layers=3)


def test_ctrl_c_keeps_what_was_measured_and_says_so(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "out", llama.parent / "words.txt"
    options = ShrinkOptions(blocks=2, block_score="loss", calibration=calibration(text))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block_choice, "measure_blocks", interrupt)
        assert interrupted(llama, out, options) == ["no output was kept; run the command again"]
        assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(block_choice, "remove_next", interrupt)
        kept = f"what was measured is kept in {out}: the same command goes on from there"
        assert interrupted(llama, out, options) == [kept]
    monkeypatch.setattr(block_choice, "measure_blocks", interrupt)  # nothing is measured again
    assert shrink(llama, out, options)["structures"]["blocks"]["kept"] == 2


def test_ctrl_c_keeps_what_stays_of_blocks_that_are_done_and_says_so(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "out", llama.parent / "words.txt"
    options = ShrinkOptions(neurons="50%", multiple=2, calibration=calibration(text))
    process, left = ColumnSink.process, ["model.layers.0", "model.layers.1"]

    def at_the_third(sink: ColumnSink, unit: str, *arguments: object) -> None:
        if not left:
            raise KeyboardInterrupt
        assert unit.startswith(left.pop(0))
        process(sink, unit, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ColumnSink, "process", at_the_third)
        kept = f"what stays of 2 parts of the model is kept in {out}: the same command goes on"
        assert interrupted(llama, out, options) == [f"{kept} from there"]
    left.append("model.layers.2")
    monkeypatch.setattr(ColumnSink, "process", at_the_third)  # only what is left is chosen
    assert shrink(llama, out, options)["structures"]["neurons"]["kept"] > 0
