"""What cannot be calibrated is one clear line, and nothing is left behind."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.architectures import V
from support.calibrated import calibration, save_model, save_text, save_tokenizer
from support.checkpoints import load, refusal, visible
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaMLP

import emp_llm
from emp_llm import CheckpointError, OptionError, OutputError, PruneOptions, prune
from emp_llm.calibration.criteria import Criterion
from emp_llm.output.output_folder import STAGING_NAME

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tmp_path / "llama", "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "words.txt")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith("sample")] == []


def refused(
    source: Path, text: Path, kind: type[emp_llm.EmpError] = CheckpointError, **options: Any
) -> str:
    """The one line; the folder is not there."""
    given = options.pop("calibrated", {})
    asked = {"criterion": "wanda", "calibration": calibration(text, **given), **options}
    out = text.parent / "out"
    line = refusal(source, out, kind, **asked)
    assert not out.exists()
    return line


def change(folder: Path, name: str, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load(folder)
    tensors[name] = values(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_text_that_is_too_short(llama: Path, text: Path) -> None:
    text.write_text("w5 w6 w7")
    assert refused(llama, text, OptionError) == (
        "calibration: words.txt is 3 tokens long, shorter than one sample of 24: give a longer "
        "text or a smaller length"
    )


def test_samples_longer_than_the_model_has_positions(llama: Path, text: Path) -> None:
    line = refused(llama, text, OptionError, calibrated={"length": 65})
    assert line == "calibration: length is 65; this model has 64 positions: give 64 or less"


def test_a_model_without_a_tokenizer(llama: Path, text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    assert refused(llama, text).startswith(f"{llama}: transformers does not load its tokenizer: ")


def test_the_tokenizer_of_another_model(llama: Path, text: Path) -> None:
    save_tokenizer(llama, 50)
    text.write_text(" ".join(f"w{number}" for number in range(50)))
    assert refused(llama, text, OptionError) == (
        "the tokenizer gives token 49 for words.txt, the model has 32 embeddings: it is the "
        "tokenizer of another model, give the model's own"
    )


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "obs"])
def test_activations_that_overflow(tmp_path: Path, text: Path, criterion: str) -> None:
    source = save_model(tmp_path / "half", "llama", dtype=torch.float16)
    change(source, "model.layers.1.mlp.down_proj.weight", lambda w: w.sign() * 60000)
    change(source, "model.layers.1.mlp.up_proj.weight", lambda w: w.sign() * 1000)
    line = refused(source, text, criterion=criterion)
    assert line == (
        "sample 0 of words.txt in float16: model.layers.1 gives NaN or infinity: give a checkpoint "
        "whose dtype the model was trained in, or another text"
    )


def test_a_loss_that_overflows(tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "half", "llama", dtype=torch.float16)
    change(source, "lm_head.weight", lambda w: torch.full_like(w, 60000))
    change(source, "model.norm.weight", lambda w: torch.full_like(w, 60000))
    line = refused(source, text, criterion="taylor")
    assert line.startswith("sample 0 of words.txt in float16: the model's loss is NaN or infinite")


def test_inputs_whose_products_overflow(llama: Path, text: Path) -> None:
    change(llama, "model.layers.0.mlp.up_proj.weight", lambda w: w.sign() * 1e25)
    change(llama, "model.layers.0.mlp.down_proj.weight", lambda w: w * 1e-25)
    assert refused(llama, text, criterion="obs") == (
        "'model.layers.0.mlp.down_proj.weight': inputs of its layer are so large that sums of "
        "their products overflow float32: choose a criterion and repair that need none, such as "
        "wanda without repair, or another text"
    )


@pytest.mark.parametrize("repair", ["none", "obs"])
def test_a_weight_that_is_not_a_number(llama: Path, text: Path, repair: str) -> None:
    def spoil(w: torch.Tensor) -> torch.Tensor:
        w[3, 4] = float("nan")
        return w

    change(llama, "model.layers.1.mlp.up_proj.weight", spoil)
    assert refused(llama, text, repair=repair) == (
        "'model.layers.1.mlp.up_proj.weight' holds NaN or infinity, which no model can compute "
        "with: repair the checkpoint"
    )


class Raises(Criterion):
    needs = frozenset({"norms"})

    def scores(self, _weight_RC, _found):
        raise RuntimeError("not my day\nat all")


class Negative(Criterion):
    def scores(self, weight_RC, _found):
        return weight_RC


class Wrong(Criterion):
    needs = frozenset({"norms"})

    def scores(self, weight_RC, _found):
        return weight_RC.double()


@pytest.mark.parametrize(
    ("criterion", "shown"),
    [
        ("Raises", "scores() fails with RuntimeError: not my day"),
        ("Negative", "scores are from -"),
        ("Wrong", "scores are float64 [16, 24]; return float32 [16, 24] as the weights are"),
        ("Missing", "has no Missing: name a class of it"),
    ],
)
def test_a_criterion_of_the_users_own_that_fails(
    llama: Path, text: Path, criterion: str, shown: str
) -> None:
    data = None if criterion == "Negative" else text
    options = {"criterion": f"{__name__}:{criterion}", "calibration": calibration(data)}
    out = text.parent / "out"
    line = refusal(llama, out, OptionError, **options)
    assert line.startswith(f"criterion '{__name__}:{criterion}'")
    assert shown in line
    assert not out.exists()


def test_a_model_that_cannot_be_run_on_tokens_alone(tmp_path: Path, text: Path) -> None:
    config = WhisperConfig(
        vocab_size=V,
        d_model=16,
        max_target_positions=64,
        num_mel_bins=4,
        **{f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in PARTS},
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    )
    source = tmp_path / "whisper"
    WhisperForConditionalGeneration(config).save_pretrained(source)
    save_tokenizer(source, V)
    line = refused(source, text)
    assert line.startswith(
        f"WhisperForConditionalGeneration: transformers {transformers.__version__} does not run it "
        "on tokens alone ("
    )
    assert line.endswith("): choose a criterion that needs no data, such as magnitude")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_gradients_of_a_model_that_predicts_no_next_token(
    tmp_path: Path, text: Path, architecture: str
) -> None:
    source = save_model(tmp_path / "model", architecture)
    line = refused(source, text, criterion="taylor")
    assert line.endswith(
        "ForMaskedLM: predicts no next token, so that there is no loss on a text, nor gradients "
        "of it: choose another criterion, such as wanda"
    )


def test_a_model_whose_code_computes_no_gradients(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(mlp: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        up = mlp.up_proj(x).exp()
        down: torch.Tensor = mlp.down_proj(up)
        up.add_(1)  # the gradient of exp needs what exp gave
        return down

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    line = refused(llama, text, criterion="taylor")
    assert line.startswith("LlamaForCausalLM: ")
    assert "modified by an inplace operation" in line


def test_bias_repair_of_a_model_without_biases(llama: Path, text: Path) -> None:
    line = refused(llama, text, OptionError, repair="bias")
    assert line == (
        "repair 'bias' changes the biases of pruned layers, and these have none: choose --repair "
        "obs"
    )


def test_weights_that_are_missing(llama: Path, text: Path) -> None:
    tensors = load(llama)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    assert refused(llama, text) == (
        f"{llama}: has no weights for 'model.layers.1.input_layernorm.weight', which the model "
        "needs: give a checkpoint with all of its weights"
    )


class Spied:
    """A file without a name."""

    def __init__(self, **options: Any) -> None:
        self.file: Any = TemporaryFile(**options)  # noqa: SIM115 (it is closed by who asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def written(out: Path) -> list[str]:
    """All that is below a folder, hidden or not; nothing if it is not there."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*")) if out.exists() else []


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_a_disk_too_full_for_activations(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    room = iter(range(6))

    class Full(Spied):
        def write(self, data: memoryview) -> int:
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    monkeypatch.setattr("emp_llm.calibration.activations.TemporaryFile", Full)
    out = text.parent / "out"
    options = PruneOptions(criterion=criterion, calibration=calibration(text, activation_memory=0))
    with pytest.raises(OutputError, match="of activations cannot be written: No space left"):
        prune(llama, out, options)
    assert not out.exists()


def test_a_disk_that_does_not_give_activations_back(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgets(Spied):
        def readinto(self, _: memoryview) -> int:
            return 0

    monkeypatch.setattr("emp_llm.calibration.activations.TemporaryFile", Forgets)
    out = text.parent / "out"
    options = PruneOptions(criterion="wanda", calibration=calibration(text, activation_memory=0))
    with pytest.raises(OutputError, match="activations stored there are gone: run the"):
        prune(llama, out, options)
    assert not out.exists()


def test_a_source_that_cannot_be_read_any_more(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, calls = os.preadv, iter(range(1 << 20))

    def read(*args: Any) -> int:
        if next(calls) > 25:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*args)

    monkeypatch.setattr("os.preadv", read)
    options = PruneOptions(criterion="wanda", calibration=calibration(text))
    with pytest.raises(emp_llm.errors.SourceReadError, match="Input/output error"):
        prune(llama, text.parent / "out", options)


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
@pytest.mark.parametrize("call", [1, 6, 11])
def test_ctrl_c_ends_all_threads(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, criterion: str, call: int
) -> None:
    forward, calls = LlamaMLP.forward, iter(range(1, 1 << 20))

    def interrupted(self: Any, x: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)  # what the terminal sends, to the main thread
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", interrupted)
    out = text.parent / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(llama, out, PruneOptions(criterion=criterion, calibration=calibration(text)))
    assert visible(out) == {}
    assert [name for name in written(out) if not name.startswith(STAGING_NAME)] == []
