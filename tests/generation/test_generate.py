"""Texts that a model generates: known ones, their end, what is refused, who hears them."""

import json
import os
from pathlib import Path

import pytest
from support.word_models import WORDS, known_model, save_words

from emp_llm import CheckpointError, GenerateOptions, OptionError, generate, prune


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def begin(self, model: str, weights: str) -> None:
        self.calls.append((Path(model).name, weights))

    def hear(self, text: str) -> None:
        self.calls.append((text,))

    def end(self) -> None:
        self.calls.append(())


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A model whose predictions are known; after a colour it ends the text."""
    return save_words(tmp_path / "known", known_model())


def set_template(folder: Path, template: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def test_the_most_probable_tokens_up_to_the_one_that_ends_the_text(known: Path) -> None:
    found = generate(known, "the sky").model

    assert (found.text, found.ended) == ("blue", "text")
    assert [WORDS[i] for i in found.prompt_ids] == ["the", "sky"]
    assert [WORDS[i] for i in found.new_ids] == ["blue", "<s>"]
    assert (found.weights, found.dtype, found.device) == ("dense", "float32", "cpu")
    assert 0 < found.bytes_before <= found.resident_bytes <= found.peak_bytes
    assert found.gpu_peak_bytes is None


def test_a_packed_model_is_unpacked_while_it_is_loaded(known: Path, tmp_path: Path) -> None:
    prune(known, tmp_path / "packed")
    found = generate(tmp_path / "packed", "the coal").model
    assert (found.text, found.weights) == ("black", "unpacked")


def test_weights_stay_packed_of_a_packed_model_and_of_one_that_is_pruned_first(
    known: Path, tmp_path: Path
) -> None:
    prune(known, tmp_path / "packed")
    plain = generate(tmp_path / "packed", "the sea").model
    kept = GenerateOptions(keep_packed=True)

    packed = generate(tmp_path / "packed", "the sea", kept).model
    pruned = generate(known, "the sea", kept).model

    assert [one.text for one in (plain, packed, pruned)] == ["green"] * 3
    assert [one.weights for one in (plain, packed, pruned)] == ["unpacked", "packed", "pruned"]
    assert packed.weights_bytes == pruned.weights_bytes < plain.weights_bytes


def test_no_more_tokens_than_asked_for(known: Path) -> None:
    found = generate(known, "the grass", GenerateOptions(max_new_tokens=1)).model
    assert (found.text, found.ended, found.decode_rate) == ("blue", "max_new_tokens", None)


def test_a_text_ends_at_the_last_position(known: Path) -> None:
    """The model has 32."""
    found = generate(known, "the " * 30 + "sky").model
    assert (found.text, found.ended) == ("blue", "positions")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("the " * 32, r"32 tokens long; .*known has 32 positions: give a prompt of 31 tokens"),
        ("", "the prompt has no tokens"),
        (os.fsdecode(b"caf\xe9"), r"the prompt is not UTF-8 \(at character 4\)"),
    ],
)
def test_a_prompt_too_long_or_empty_or_no_text_is_refused(
    known: Path, prompt: str, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        generate(known, prompt)


def test_an_empty_prompt_is_told_before_the_model_is_loaded(
    known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.generation.run.load_model", None)
    with pytest.raises(OptionError, match="the prompt has no tokens: give some text to continue"):
        generate(known, "")


def test_a_message_goes_into_the_chat_template(known: Path) -> None:
    set_template(
        known,
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} snow{% endif %}",
    )

    found = generate(known, "the sea", GenerateOptions(chat=True)).model

    # the words have no "user"
    assert [WORDS[i] for i in found.prompt_ids] == ["<s>", "the", "sea", "snow"]
    assert found.text == "white"


def test_chat_without_a_template_is_refused(known: Path) -> None:
    with pytest.raises(OptionError, match="has no chat template"):
        generate(known, "the sky", GenerateOptions(chat=True))


def test_a_template_that_takes_no_message_is_refused_in_one_line(known: Path) -> None:
    set_template(known, "{{ raise_exception('only a system may speak') }}")
    with pytest.raises(CheckpointError, match="not take a user's message: only a system may speak"):
        generate(known, "the sky", GenerateOptions(chat=True))


def test_tokens_are_drawn_at_a_temperature_as_the_seed_says(known: Path) -> None:
    """At such a temperature all words are about as likely."""

    def drawn(seed: int) -> tuple[int, ...]:
        options = GenerateOptions(max_new_tokens=1, temperature=1e6, seed=seed)
        return generate(known, "the sky", options).model.new_ids

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(8)}) > 1


def test_a_listener_hears_the_text_as_it_is_generated(known: Path) -> None:
    heard = Heard()
    generate(known, "the snow", listener=heard)
    assert heard.calls == [("known", "dense"), ("white",), ()]


def test_threads_are_those_asked_for_and_afterwards_as_before(known: Path) -> None:
    import torch

    before = torch.get_num_threads()
    found = generate(known, "the sky", GenerateOptions(threads=before + 1)).model
    assert (found.threads, torch.get_num_threads()) == (before + 1, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give 1 or more"),
        ({"threads": 0}, "threads is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GenerateOptions(**options)


def test_a_device_that_is_not_there_is_refused(known: Path) -> None:
    with pytest.raises(OptionError, match="device is 'cuda:99'"):
        generate(known, "the sky", GenerateOptions(device="cuda:99"))


def test_drawn_texts_are_not_compared(known: Path) -> None:
    with pytest.raises(OptionError, match="two models are compared without"):
        generate(known, "the sky", GenerateOptions(temperature=1.0), against=known)
