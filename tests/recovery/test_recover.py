"""Recovery of whole tiny models, against a plain loop of torch, and its runs against each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.calibrated import LENGTH, SEED, calibration, pruned, save_model, save_text
from support.checkpoints import Tensors, bits, files, load
from support.processes import start
from support.streaming import load_whole
from torch.nn.functional import kl_div

from emp_llm import OptionError, PruneOptions, prune, verify
from emp_llm.calibration.target_pruner import TargetPruner
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.recovery import memory, training
from emp_llm.recovery.training import relative_rate
from emp_llm.report.prune_command import prune_words
from emp_llm.runtime.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt", 400)


def telling(folder: Path) -> Path:
    """Make the weights of a model so large that its predictions depend on those of its MLPs."""
    tensors = {name: t * 30 if t.ndim > 1 else t for name, t in load(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "mixtral", "gpt2")
    return {name: telling(save_model(tmp_path_factory.mktemp(name), name)) for name in names}


def samples_of(text: Path) -> torch.Tensor:
    """Those of the training, two for a step: drawn by the seed after that of the calibration."""
    ids = [int(word[1:]) for word in text.read_text().split()]
    starts = np.random.PCG64(SEED + 1).random_raw(2 * STEPS) % np.uint64(len(ids) - LENGTH + 1)
    return torch.tensor([ids[int(start) :][:LENGTH] for start in starts])


def divergences(
    dense: torch.nn.Module, model: torch.nn.Module, ids_NL: torch.Tensor
) -> torch.Tensor:
    """In nats per token, of all samples together."""
    with torch.no_grad():
        wanted = dense(input_ids=ids_NL).logits.log_softmax(-1)
    found = model(input_ids=ids_NL).logits.log_softmax(-1)
    return kl_div(found, wanted, log_target=True, reduction="sum") / ids_NL.numel()


def trained(source: Path, start_from: Path, ids_NL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of a pruned Llama after some steps of torch's Adam."""
    dense, model = load_whole("llama", source), load_whole("llama", start_from)
    model.requires_grad_(False)
    groups, kept = [], {}
    for name, parameter in model.named_parameters():
        if "mlp" not in name and parameter.ndim > 1:
            continue
        parameter.requires_grad = True
        kept[parameter] = parameter.detach() != 0
        size = parameter[kept[parameter]].square().mean().sqrt().item()
        groups.append({"params": [parameter], "size": size})
    adam = torch.optim.Adam(groups, lr=1, betas=(0.9, 0.95), eps=1e-10)
    for step in range(1, STEPS + 1):
        divergences(dense, model, ids_NL[2 * step - 2 : 2 * step]).backward()
        for group in adam.param_groups:
            group["lr"] = group["size"] * relative_rate(step, STEPS)
        for parameter, keep in kept.items():
            if parameter.grad is not None:
                parameter.grad *= keep
        adam.step()
        adam.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_weights_are_those_of_a_plain_loop_of_torch(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    source, options = models["llama"], {"criterion": "wanda", "repair": "obs", "targets": "mlp"}
    before = pruned(source, tmp_path / "before", text, options=options)
    after = pruned(source, tmp_path / "after", text, options={**options, "recover": STEPS})
    expected = trained(source, tmp_path / "before", samples_of(text))
    for name, tensor in after.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-5), name
    changed = [name for name in after if bits(after[name]) != bits(before[name])]
    assert changed == [name for name in after if "mlp" in name or "norm" in name]


def nearer(source: Path, before: Path, after: Path, architecture: str, text: Path) -> bool:
    dense, *others = (load_whole(architecture, folder) for folder in (source, before, after))
    first, second = (divergences(dense, model, samples_of(text)).item() for model in others)

    return second < first


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"criterion": "taylor", "granularity": "model"}])
def test_predictions_come_nearer_and_zeros_stay(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    architecture: str,
    options: dict[str, str],
) -> None:
    source, asked = models[architecture], {**options, "beta": 0.7, "targets": "mlp"}
    data = text if options else None
    plain = pruned(source, tmp_path / "plain", data, options=asked)
    recovered = pruned(source, tmp_path / "out", text, options={**asked, "recover": STEPS})
    dense: Tensors = load(source)
    for name, tensor in recovered.items():
        if bits(plain[name]) != bits(dense[name]):  # a target
            assert torch.equal(tensor != 0, plain[name] != 0), name
        elif tensor.ndim > 1:
            assert bits(tensor) == bits(dense[name]), name
    assert nearer(source, tmp_path / "plain", tmp_path / "out", architecture, text)
    found = verify(tmp_path / "out", against=source)
    assert found["repaired_tensors"] == sum(bits(recovered[n]) != bits(dense[n]) for n in dense)


def recover(source: Path, out: Path, options: PruneOptions, save_seconds: float) -> None:
    torch.set_num_threads(1)
    training._SAVE_SECONDS = save_seconds
    prune(source, out, options)


def recovering(text: Path, **options: object) -> PruneOptions:
    asked = {"criterion": "obs", "repair": "obs", "recover": STEPS, **options}
    return PruneOptions(calibration=calibration(text), **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "step", [60, *(pytest.param(step, marks=pytest.mark.slow) for step in (38, 76))]
)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(
    models: dict[str, Path], text: Path, tmp_path: Path, step: int
) -> None:
    options, out = recovering(text), tmp_path / "out"
    prune(models["llama"], tmp_path / "expected", options)
    run = start(recover, models["llama"], out, options, 0.0, killed_at=step)
    run.join()
    assert run.exitcode == -9
    prune(models["llama"], out, options)
    assert files(out) == files(tmp_path / "expected")


def test_every_run_gives_the_same_bytes_and_they_say_what_was_done(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = recovering(text, criterion="magnitude", repair="none")
    report = prune(models["llama"], tmp_path / "out", options)
    prune(models["llama"], tmp_path / "again", options, threads=1)
    assert files(tmp_path / "again") == files(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["recover"] == report["rule"]["recover"] == STEPS
    changed = [name for name, fields in report["tensors"].items() if fields.get("repaired")]
    assert (
        f"- recovery: for {STEPS} steps, the weights that stay, norms and biases were trained "
        "towards the predictions of the dense model on the calibration text "
        f"({len(changed)} tensors)"
    ) in " ".join((tmp_path / "out" / "README.md").read_text().split("\n"))
    # without scores from data, the only samples are those of the training
    assert report["rule"]["calibration"]["samples"] == 2 * STEPS
    assert report["rule"]["calibration"]["seed"] == SEED
    command = prune_words(report, out="out")
    assert command[5:7] == ["--recover", str(STEPS)]


def test_a_checkpoint_in_float16_is_trained_in_float32(text: Path, tmp_path: Path) -> None:
    source = telling(save_model(tmp_path / "source", "llama", dtype=torch.float16))
    before = pruned(source, tmp_path / "before", None, options={"targets": "mlp"})
    after = pruned(source, tmp_path / "after", text, options={"targets": "mlp", "recover": STEPS})
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert any(bits(after[name]) != bits(before[name]) for name in after)
    assert nearer(source, tmp_path / "before", tmp_path / "after", "llama", text)


def test_an_interrupted_training_leaves_the_masks_to_go_on_from(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = recovering(text), tmp_path / "out"
    prune(models["llama"], tmp_path / "expected", options)
    with monkeypatch.context() as patch:
        patch.setattr("emp_llm.recovery.recover.train", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            prune(models["llama"], out, options)
    # two blocks, each in two stages
    assert caught.value.__notes__ == [
        f"the masks of 4 parts of the model are kept in {out}: the same command goes on from there"
    ]
    assert list((out / STAGING_NAME).rglob("*.data"))
    monkeypatch.setattr(TargetPruner, "prune", None)  # no target is pruned again
    prune(models["llama"], out, options)
    assert files(out) == files(tmp_path / "expected")


class Interrupting(Silent):
    """Ctrl-C after so many steps of a training."""

    def __init__(self, steps: int) -> None:
        self._stage, self._left = "", steps

    def begin(self, stage: str, *_: object) -> None:
        self._stage = stage

    def advance(self, count: int) -> None:
        if self._stage == "recovering":
            self._left -= count
            if not self._left:
                raise KeyboardInterrupt


def test_an_interruption_tells_that_the_state_of_a_training_is_kept(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(models["llama"], tmp_path / "out", recovering(text), progress=Interrupting(3))
    assert caught.value.__notes__ == [
        "the masks of the model and the state of its training are kept in "
        f"{tmp_path / 'out'}: the same command goes on from there"
    ]


@pytest.mark.parametrize("damaged", [False, True])
def test_what_was_trained_is_used_again_if_it_is_whole(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: bool,
) -> None:
    options, out = recovering(text), tmp_path / "out"
    prune(models["llama"], tmp_path / "expected", options)
    with monkeypatch.context() as patch:
        patch.setattr("emp_llm.entrypoints.prune._write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(models["llama"], out, options)
    trained = next(iter(sorted((out / STAGING_NAME / ".masks").glob("*.data"))))
    if damaged:
        data = bytearray(trained.read_bytes())
        data[-1] ^= 1
        trained.write_bytes(data)
    else:
        monkeypatch.setattr("emp_llm.recovery.recover.train", None)
    prune(models["llama"], out, options)
    assert files(out) == files(tmp_path / "expected")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_does_not_fit_in_memory_is_refused_before_any_work(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _device: 100_000)
    monkeypatch.setattr("emp_llm.recovery.recover.calibrate", None)
    with pytest.raises(OptionError, match=r"takes about 0\.0 GB, and cpu has 0\.0 GB free: leave"):
        prune(models["llama"], tmp_path / "out", recovering(text))
    assert not (tmp_path / "out").exists()
