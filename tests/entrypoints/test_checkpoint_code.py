"""Code that comes with a checkpoint is run only if the user says so, whatever stdin says."""

import ast
import builtins
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emp_cli
import pytest
import transformers
from support.word_models import TASKS, TEXT, known_model, save_words, words

import emp_llm
from emp_llm import CalibrationOptions, CheckpointError, EvalOptions, OutputError, PruneOptions

_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
with Path({marker!r}).open("a") as file:
    file.write("tokenizer ")
class Words(PreTrainedTokenizerFast):
    pass
"""
_MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
with Path({marker!r}).open("a") as file:
    file.write("model ")
class Config(LlamaConfig):
    model_type = "words99"
class Model(LlamaForCausalLM):
    config_class = Config
"""
_LOADS = {"from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "pipeline"}


@pytest.fixture(autouse=True)
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stdin says yes to every question; a question that is asked fails the test."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(TASKS)
    yield asked
    assert asked == []


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "short.txt").write_text(TEXT)
    return str(tmp_path / "short.txt")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Where code of the checkpoint writes what it is, when it is run."""
    return tmp_path / "was run"


@pytest.fixture
def own_tokenizer(tmp_path: Path, marker: Path) -> Path:
    """A model with a tokenizer whose class is in the folder."""
    folder = save_words(tmp_path / "own tokenizer", known_model())
    (folder / "tok.py").write_text(_TOKENIZER.format(marker=str(marker)))
    _edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Words",
        auto_map={"AutoTokenizer": [None, "tok.Words"]},
    )
    return folder


@pytest.fixture
def own_model(tmp_path: Path, marker: Path) -> Path:
    """A model of a type that transformers does not have, with its classes in the folder."""
    folder = save_words(tmp_path / "own model", known_model())
    (folder / "mine.py").write_text(_MODEL.format(marker=str(marker)))
    _edit(
        folder / "config.json",
        model_type="words99",
        architectures=["Model"],
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    return folder


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _calibrate(folder: Path, text: str, *, trust: bool = False) -> object:
    data = CalibrationOptions(text=text, samples=1, length=4, trust_remote_code=trust)
    options = PruneOptions(criterion="wanda", calibration=data)
    return emp_llm.prune(folder, folder.parent / "out", options)


def _evaluate(folder: Path, text: str, *, trust: bool = False) -> object:
    options = EvalOptions(texts=(text,), context=4, trust_remote_code=trust)
    return emp_llm.evaluate(folder, options).model.texts["short.txt"].perplexity


def _answer(folder: Path, _text: str, *, trust: bool = False) -> object:
    return emp_llm.evaluate(folder, words(trust_remote_code=trust)).model.tasks["words"].metrics


def _compare(folder: Path, text: str, *, trust: bool = False) -> object:
    return emp_llm.compare(
        folder,
        Path(text).read_text(),
        betas=[1.0],
        context=4,
        random_runs=0,
        trust_remote_code=trust,
    )


_USES = pytest.mark.parametrize("use", [_calibrate, _evaluate, _answer, _compare])
Use = Callable[..., object]


@_USES
def test_a_tokenizer_that_is_code_is_refused_with_the_option(
    use: Use, own_tokenizer: Path, text: str, marker: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"would run code .* --trust-remote-code") as caught:
        use(own_tokenizer, text)

    assert str(caught.value).startswith(str(own_tokenizer))
    assert not marker.exists()
    assert not (own_tokenizer.parent / "out").exists()


@_USES
def test_a_tokenizer_that_is_code_is_run_if_it_is_trusted(
    use: Use, own_tokenizer: Path, text: str, marker: Path
) -> None:
    use(own_tokenizer, text, trust=True)

    assert set(marker.read_text().split()) == {"tokenizer"}


@_USES
def test_code_beside_classes_that_transformers_has_is_not_run(
    use: Use, own_tokenizer: Path, text: str, marker: Path
) -> None:
    _edit(own_tokenizer / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (own_tokenizer / "mine.py").write_text(_MODEL.format(marker=str(marker)))
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    _edit(own_tokenizer / "config.json", auto_map=auto_map)

    use(own_tokenizer, text)

    assert not marker.exists()


@pytest.mark.parametrize("use", [_evaluate, _answer])
def test_a_model_that_is_code_is_evaluated_only_if_it_is_trusted(
    use: Use, own_model: Path, text: str, marker: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"would run code .* --trust-remote-code"):
        use(own_model, text)
    assert not marker.exists()

    trusted = use(own_model, text, trust=True)

    assert set(marker.read_text().split()) == {"model"}
    plain = save_words(own_model.parent / "plain", known_model())
    assert trusted == use(plain, text)


@pytest.mark.parametrize("use", [_calibrate, _compare])
def test_a_model_that_is_code_is_not_run_to_prune_it(
    use: Use, own_model: Path, text: str, marker: Path
) -> None:
    with pytest.raises(CheckpointError, match="runs no code from a checkpoint to prune it"):
        use(own_model, text, trust=True)

    assert not marker.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"attn_implementation": {"": "someone/kernel@main"}},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
    ],
)
def test_a_kernel_of_the_hub_that_the_config_names_is_code(
    tmp_path: Path, text: str, fields: dict[str, object]
) -> None:
    known = save_words(tmp_path / "known", known_model())
    _edit(known / "config.json", **fields)

    with pytest.raises(CheckpointError, match=r"someone/kernel.* --trust-remote-code"):
        _evaluate(known, text)


def test_an_unfinished_run_is_not_resumed_with_code_that_it_did_not_run(
    own_tokenizer: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code may make other tokens of the text, and so other masks."""

    def full(*_: object) -> None:
        raise OutputError("the disk is full")

    _edit(own_tokenizer / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with monkeypatch.context() as patch:
        patch.setattr("emp_llm.entrypoints.prune._publish", full)
        with pytest.raises(OutputError):
            _calibrate(own_tokenizer, text)

    with pytest.raises(OutputError, match="an unfinished run that differs"):
        _calibrate(own_tokenizer, text, trust=True)


def test_every_call_that_could_run_a_checkpoints_code_says_whether_it_may() -> None:
    found = []
    for package in (emp_llm, emp_cli):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            for call in _calls(path):
                found.append(call)
                given = {word.arg: word.value for word in call.keywords}
                assert "trust_remote_code" in given, f"{path}:{call.lineno}"
                value = given["trust_remote_code"]
                is_false = isinstance(value, ast.Constant) and value.value is False
                assert is_false or "trust_remote_code" in ast.unparse(value)
    assert len(found) >= 6


def _calls(path: Path) -> Iterator[ast.Call]:
    """Calls of transformers, datasets, PEFT and lm-eval that load something by its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        is_lm_eval = any(word.arg == "pretrained" for word in node.keywords)
        if name in _LOADS or is_lm_eval:
            yield node


def test_transformers_still_asks_where_it_is_not_told(
    own_tokenizer: Path, questions: list[str], marker: Path
) -> None:
    """So that the tests above would notice a call that does not say whether code may be run."""
    transformers.AutoTokenizer.from_pretrained(own_tokenizer)

    assert len(questions) == 1
    assert marker.exists()
    questions.clear()
