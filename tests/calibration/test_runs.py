"""Every run of a calibration gives the same bytes, however it is run and whatever stops it."""

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support.calibrated import calibration, save_model, save_text
from support.checkpoints import files
from support.processes import free_port, rank_environment, start

from emp_llm import PruneOptions, prune, verify
from emp_llm.output.output_folder import STAGING_NAME

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


OPTIONS = {
    "wanda": {"criterion": "wanda"},
    "obs": {"criterion": "obs", "repair": "obs", "granularity": "layer"},
    "taylor": {"criterion": "taylor", "repair": "obs"},
    "swaps": {"criterion": "obs", "count_by": "magnitude", "repair": "swaps"},
    "loss": {"allocate": "loss", "repair": "obs"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_run_gives_the_same_bytes_wherever_activations_wait(
    llama: Path, text: Path, tmp_path: Path, name: str
) -> None:
    runs = {
        "expected": {},
        "again": {"threads": 1},
        "on disk": {"activation_memory": 0},
        "partly": {"activation_memory": 7000, "threads": 1},
    }
    for out, changes in runs.items():
        threads = changes.pop("threads", 2)
        options = PruneOptions(calibration=calibration(text, **changes), **OPTIONS[name])
        prune(llama, tmp_path / out, options, threads=threads)
    expected = files(tmp_path / "expected")
    for out in runs:
        assert files(tmp_path / out) == expected, out
    verify(tmp_path / "expected")


def test_inputs_that_are_those_of_the_block_itself_may_wait_on_disk(
    text: Path, tmp_path: Path
) -> None:
    # without a norm before them, attention's projections are multiplied by the block's own input
    model = save_model(tmp_path / "opt", "opt", do_layer_norm_before=False)
    for out, changes in {"expected": {}, "on disk": {"activation_memory": 0}}.items():
        options = PruneOptions(
            targets="all-linear", repair="obs", calibration=calibration(text, **changes)
        )
        prune(model, tmp_path / out, options)
    assert files(tmp_path / "on disk") == files(tmp_path / "expected")


@pytest.mark.parametrize(
    ("name", "mode"), [("taylor", torch.no_grad), ("obs", torch.inference_mode)]
)
def test_a_caller_that_records_no_gradients_gets_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, name: str, mode: type[AbstractContextManager[None]]
) -> None:
    options = PruneOptions(calibration=calibration(text), **OPTIONS[name])
    prune(llama, tmp_path / "expected", options)
    with mode():
        prune(llama, tmp_path / "out", options)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def calibrate(source: Path, out: Path, options: PruneOptions, distributed: bool) -> None:
    torch.set_num_threads(1)
    prune(source, out, options, distributed=distributed)


@pytest.mark.parametrize(("name", "step"), [("obs", 25), ("taylor", 38), ("loss", 30)])
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, name: str, step: int
) -> None:
    options = PruneOptions(calibration=calibration(text), **OPTIONS[name])
    prune(llama, tmp_path / "expected", options)
    expected, out = files(tmp_path / "expected"), tmp_path / "out"
    run = start(calibrate, llama, out, options, False, killed_at=step)
    run.join()
    assert run.exitcode == -9
    kept = len(list((out / STAGING_NAME).rglob("*.data")))
    assert kept > 0
    prune(llama, out, options)
    assert files(out) == expected


def test_two_ranks_give_the_bytes_of_one(llama: Path, text: Path, tmp_path: Path) -> None:
    options = PruneOptions(calibration=calibration(text), **OPTIONS["wanda"])
    prune(llama, tmp_path / "alone", options)
    port = free_port()
    ranks = [
        start(
            *(calibrate, llama, tmp_path / "out", options, True),
            environment=rank_environment(rank, 2, port),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert files(tmp_path / "out") == files(tmp_path / "alone")
