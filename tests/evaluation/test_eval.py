"""Evaluating models: scores worked out by hand, one model in memory, what is refused."""

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_tiny_model
from support.checkpoints import files
from support.hub_server import HubServer
from support.word_models import ODDS, TEXT, WORDS, known_model, save_words, word_model, words
from transformers import AutoModelForCausalLM, AutoTokenizer

import emp_llm
from emp_llm import (
    CheckpointError,
    EmpError,
    EvalOptions,
    FormatError,
    HubError,
    OptionError,
    evaluate,
    prune,
    unpack,
)
from emp_llm.entrypoints import evaluate as evaluating
from emp_llm.evaluation.tasks import PAPER7, find_tasks

# scores


def test_perplexity_of_a_model_whose_predictions_are_known(known: Path, text: str) -> None:
    """Blocks of four words: the sky blue the | grass blue the snow | white the sky red.

    After sky and grass blue is expected; everything else is one of twelve, of those behind sky,
    grass and snow one of 11 + ODDS.
    """
    total, even = math.log(11 + ODDS), math.log(12)
    expected = total - math.log(ODDS)
    losses = [even + expected + even, expected + even + even, even + even + total]

    found = evaluate(known, EvalOptions(texts=(text,), context=4)).model

    score = found.texts["short.txt"]
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / 9), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / len(TEXT), rel=1e-5)
    assert (found.packed, found.dtype, found.device) == (False, "float32", "cpu")


def test_accuracy_of_a_model_whose_answers_are_known(known: Path) -> None:
    """Right on sky, snow and coal; it thinks that grass is blue and the sea green."""
    score = evaluate(known, words()).model.tasks["words"]

    assert score.metrics == {"acc": 3 / 5}
    assert score.stderr["acc"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert (score.num_fewshot, score.samples, score.dataset) == (0, 5, "words")


def test_limit_fewshot_and_batch_reach_the_task(known: Path) -> None:
    limited = evaluate(known, words(limit=2, batch_size=4)).model.tasks["words"]
    automatic = evaluate(known, words(limit=2, batch_size=None)).model.tasks["words"]

    assert limited.metrics == automatic.metrics == {"acc": 1 / 2}
    assert (limited.samples, limited.num_fewshot) == (2, 0)
    shots = evaluate(known, words(num_fewshot=1, limit=3)).model.tasks["words"]
    assert shots.num_fewshot == 1


@pytest.mark.parametrize("protocol", ["paper", "gptq"])
def test_a_packed_model_and_its_unpacked_twin_score_the_same(
    packed: Path, tmp_path: Path, text: str, protocol: Any
) -> None:
    unpack(packed, tmp_path / "unpacked")
    options = words(texts=(text,), context=4, protocol=protocol)

    found = evaluate(packed, options, against=tmp_path / "unpacked")

    assert found.against is not None
    assert found.model.packed
    assert not found.against.packed
    assert found.model.texts == found.against.texts
    assert found.model.tasks == found.against.tasks
    assert {score.difference for score in found.scores()} == {0.0}


def test_against_tells_both_and_the_difference(packed: Path, tmp_path: Path, text: str) -> None:
    options = words(texts=(text,), context=4)

    found = evaluate(packed, options, against=tmp_path / "dense")

    pruned, dense = evaluate(packed, options), evaluate(tmp_path / "dense", options)
    assert found.model == pruned.model
    assert found.against == dense.model
    content = found.to_dict()
    for metric in ("perplexity", "bits_per_byte"):
        ours = content["model"]["texts"]["short.txt"][metric]
        theirs = content["against"]["texts"]["short.txt"][metric]
        assert ours != theirs
        assert content["difference"]["texts"]["short.txt"][metric] == ours - theirs
    accuracy = content["model"]["tasks"]["words"]["acc"]
    other = content["against"]["tasks"]["words"]["acc"]
    assert content["difference"]["tasks"]["words"] == {"acc": accuracy - other}


def test_a_loaded_model_is_measured_as_it_is_and_left_so(known: Path, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(known).train()
    tokenizer = AutoTokenizer.from_pretrained(known)
    before = {name: weights.data_ptr() for name, weights in model.named_parameters()}
    options = words(texts=(text,), context=4)

    found = evaluate(model, options, tokenizer=tokenizer)

    assert found.model.tasks == evaluate(known, options).model.tasks
    assert found.model.model == "LlamaForCausalLM"
    assert all(part.training for part in model.modules())
    assert {name: weights.data_ptr() for name, weights in model.named_parameters()} == before
    assert tokenizer.pad_token is None


def test_what_is_infinite_is_null_in_json(tmp_path: Path, text: str) -> None:
    model = known_model()
    model.lm_head.weight.data.fill_(math.nan)
    save_words(tmp_path / "broken", model)

    found = evaluate(tmp_path / "broken", EvalOptions(texts=(text,), context=4))

    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["model"]["texts"]["short.txt"]["perplexity"] is None
    assert found.results() == ()


def test_a_dtype_can_be_chosen(known: Path, text: str) -> None:
    options = EvalOptions(texts=(text,), context=4, dtype="bfloat16", device="cpu")
    assert evaluate(known, options).model.dtype == "bfloat16"


# memory


def weights_alive() -> int:
    """Bytes of all parameters there are."""
    found = [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]
    return sum(one.nbytes for one in found)


def test_there_is_one_model_at_a_time_and_no_copy_of_it(
    packed: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before = weights_alive()
    size = sum(weights.nbytes for weights in word_model().parameters())
    most: list[int] = []

    class Watching:
        def begin(self, *_stage: object) -> None:
            self.looked = False

        def advance(self, _count: int) -> None:
            if not self.looked:
                most.append(weights_alive() - before)
                self.looked = True

    loaded: list[weakref.ref[Any]] = []
    load = evaluating.load_model

    def watch(*args: Any, **options: Any) -> Any:
        assert [one for one in loaded if one() is not None] == []
        model, tokenizer = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluating, "load_model", watch)
    gc.collect()
    options = words(texts=(text,), context=4)
    evaluate(packed, options, against=tmp_path / "dense", progress=Watching())

    assert len(loaded) == 2
    assert most == [0, *[size] * 4]  # verified; then text and task, of either model
    assert [one for one in loaded if one() is not None] == []


# where models come from


def test_a_packed_model_of_the_hub(
    hub: HubServer, packed: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    commit = hub.commit("me/packed", files(packed), branch="v1")
    options = EvalOptions(texts=(text,), context=4)

    found = evaluate("me/packed", options, revision="v1")

    assert (found.model.model, found.model.revision) == ("me/packed", commit)
    assert found.model.texts == evaluate(packed, options).model.texts


def test_a_packed_folder_that_save_pretrained_wrote_has_no_report_and_is_measured(
    tmp_path: Path, text: str
) -> None:
    source = save_words(tmp_path / "source", word_model())
    config = emp_llm.EmpConfig()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    save_words(tmp_path / "saved", model)
    prune(source, tmp_path / "pruned")
    options = EvalOptions(texts=(text,), context=4)

    found = evaluate(tmp_path / "saved", options, against=tmp_path / "pruned")

    assert found.model.packed
    assert found.against is not None
    assert found.model.texts == found.against.texts


# bad input


def refusal(
    model: object, options: EvalOptions, kind: type[EmpError] = OptionError, **more: Any
) -> str:
    with pytest.raises(kind) as caught:
        evaluate(model, options, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_packed_folder_is_refused_before_anything_is_loaded(
    packed: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((packed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (packed / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(evaluating, "load_model", None)
    options = EvalOptions(texts=(text,), context=4)

    assert "the folder is not as it was written" in refusal(packed, options, FormatError)
    again = refusal(tmp_path / "dense", options, FormatError, against=packed)
    assert "the folder is not as it was written" in again


def test_a_task_that_does_not_exist_is_told_with_the_nearest_names(known: Path) -> None:
    """Those of the paper before it are there."""
    message = refusal(known, EvalOptions(tasks=("paper7", "hellaswagg")))
    assert message.startswith("there is no task 'hellaswagg', the nearest are hellaswag")
    assert "--include-path FOLDER adds your own" in message


def test_tasks_without_a_network_say_which_option_to_use(known: Path) -> None:
    message = refusal(known, EvalOptions(tasks=("openbookqa",)), HubError)
    assert message.startswith("task openbookqa cannot be fetched (")
    assert "--include-path FOLDER" in message


def test_paper7_is_the_seven_tasks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Manager:
        task_index = all_tasks = dict.fromkeys(PAPER7)

        def load(self, names: list[Any]) -> dict[str, Any]:
            asked.extend(name for name in names if isinstance(name, str))
            return {"tasks": {name: object() for name in names}}

    monkeypatch.setattr("emp_llm.evaluation.tasks._default_manager", Manager)
    assert find_tasks(["boolq", "paper7"]).names == PAPER7
    assert asked == [
        *("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    ]


def test_bad_options_are_told_at_once(known: Path, tmp_path: Path, text: str) -> None:
    many = torch.cuda.device_count()
    cases: list[tuple[Callable[[], object], str]] = [
        (EvalOptions, "nothing to measure"),
        (lambda: EvalOptions(texts="wikitext2"), "texts is a single string"),
        (lambda: EvalOptions(texts=(text,), protocol="wanda"), "protocol is 'wanda'"),
        (lambda: EvalOptions(texts=(text,), dtype="int8"), "dtype is 'int8'; choose one of auto"),
        (lambda: EvalOptions(texts=(text,), context=1), "context is 1; give 2 or more"),
        (lambda: words(limit=0), "limit is 0; give 1 or more"),
        (lambda: words(num_fewshot=-1), "num_fewshot is -1"),
        (lambda: words(batch_size=0), "batch_size is 0"),
        (lambda: evaluate(known, words(device="gpu")), "device is 'gpu'; choose one of auto"),
        (lambda: evaluate(known, words(device="cuda:x")), "device is 'cuda:x'; choose"),
        (lambda: evaluate(known, words(device=f"cuda:{many}")), f"device is 'cuda:{many}'; torch"),
        (
            lambda: evaluate(known, EvalOptions(tasks=("words",), include_path=tmp_path / "no")),
            "is not a folder; give one with lm-eval YAML files",
        ),
        (lambda: evaluate(known_model(), words()), "tokenizer is missing"),
    ]
    for call, message in cases:
        with pytest.raises(OptionError) as caught:
            call()
        assert message in str(caught.value)


def test_texts_of_one_name_are_refused(known: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "short.txt").write_text("the sky")
    options = EvalOptions(texts=(text, str(tmp_path / "other" / "short.txt")))
    assert "two texts are called short.txt: rename" in refusal(known, options)


def test_a_short_text_and_a_long_context_are_refused(known: Path, text: str) -> None:
    short = EvalOptions(texts=(text,), context=13, protocol="gptq")
    assert "short.txt is 12 tokens long, shorter than one window of 13" in refusal(known, short)
    long = EvalOptions(texts=(text,), context=33)
    assert "context is 33; this model has 32 positions" in refusal(known, long)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    folder = save_words(tmp_path / "small", known_model())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = len(WORDS)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    message = refusal(folder, EvalOptions(texts=(text,), context=4), CheckpointError)

    assert "its tokenizer has 13 tokens, the model 12 embeddings" in message


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    known_model().save_pretrained(tmp_path / "alone")
    message = refusal(tmp_path / "alone", EvalOptions(texts=(text,), context=4), CheckpointError)
    assert f"{tmp_path / 'alone'}: transformers does not load its tokenizer: " in message


def test_a_model_that_does_not_predict_the_next_token_is_refused(tmp_path: Path, text: str) -> None:
    folder = save_tiny_model(tmp_path / "bert", "bert")
    message = refusal(folder, EvalOptions(texts=(text,), context=4), CheckpointError)
    assert "is a BertFor" in message
    assert "models that predict the next token" in message


def test_weights_that_transformers_would_make_up_are_refused(known: Path, text: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(known / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, known / "model.safetensors", {"format": "pt"})
    message = refusal(known, EvalOptions(texts=(text,), context=4), CheckpointError)
    assert "has no weights for 'lm_head.weight' (1 missing)" in message


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, text: str) -> None:
    options = EvalOptions(texts=(text,), context=4)
    assert "there is no such folder" in refusal(tmp_path / "no", options, CheckpointError)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty", options, CheckpointError)
