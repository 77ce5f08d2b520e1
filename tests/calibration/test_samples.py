"""The samples of a calibration: the same ones everywhere, and what cannot be sampled."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from emp_llm import CheckpointError, OptionError
from emp_llm.calibration.samples import Samples, read_samples
from emp_llm.options import CalibrationOptions
from emp_llm.texts.texts import Text
from emp_llm.texts.tokenizer import load_tokenizer

SIZE = 50
TEXT = Text("counted", " ".join(str(i % SIZE) for i in range(1000)))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the number i."""
    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(SIZE)}, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=numbers, model_max_length=8)


def samples_of(
    tokenizer: Any, text: Text = TEXT, positions: int | None = 64, **options: Any
) -> Samples:
    asked = CalibrationOptions(**({"text": text.name, "samples": 16, "length": 8} | options))
    return read_samples(text, tokenizer, asked, positions=positions, embeddings=SIZE)


def test_every_sample_is_a_stretch_of_the_text(tokenizer: Any) -> None:
    ids = samples_of(tokenizer, samples=200).ids_NL

    assert (ids.dtype, ids.shape) == (torch.int64, (200, 8))
    assert torch.equal((ids[:, 1:] - ids[:, :-1]) % SIZE, torch.ones(200, 7, dtype=torch.int64))
    assert len(ids[:, 0].unique()) > SIZE // 2


def test_samples_begin_where_the_documented_generator_says(tokenizer: Any) -> None:
    # numpy.random.PCG64(7).random_raw(3), as NumPy keeps it from release to release
    raw = [11530976094092348043, 16550673365885938325, 14308875409591826786]

    ids = samples_of(tokenizer, samples=3, seed=7).ids_NL

    assert ids[:, 0].tolist() == [number % (1000 - 8 + 1) % SIZE for number in raw]


def test_the_same_seed_gives_the_same_samples_and_more_of_them_begin_alike(tokenizer: Any) -> None:
    four, sixteen = (samples_of(tokenizer, samples=count, seed=3) for count in (4, 16))

    assert torch.equal(four.ids_NL, sixteen.ids_NL[:4])
    again = samples_of(tokenizer, samples=16, seed=3)
    assert again.description() == sixteen.description()
    other = samples_of(tokenizer, samples=16, seed=4)
    assert other.description()["hash"] != sixteen.description()["hash"]


def test_the_first_and_the_last_place_are_among_those_chosen(tokenizer: Any) -> None:
    ten = Text("ten", "0 1 2 3 4 5 6 7 8 9")

    starts = samples_of(tokenizer, ten, samples=100).ids_NL[:, 0]

    assert starts.unique().tolist() == [0, 1, 2]


def test_a_text_of_one_sample_gives_that_sample(tokenizer: Any) -> None:
    eight = Text("eight", "0 1 2 3 4 5 6 7")

    assert samples_of(tokenizer, eight, samples=2).ids_NL.tolist() == [list(range(8))] * 2


def test_special_tokens_are_added_once_at_the_start_of_the_text(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="0 $A", special_tokens=[("0", 0)]
    )
    seven = Text("seven", "1 2 3 4 5 6 7 8")

    ids = samples_of(tokenizer, seven, samples=50).ids_NL

    assert ids.unique(dim=0).tolist() == [list(range(8)), list(range(1, 9))]


@pytest.mark.parametrize(("positions", "length"), [(64, 64), (4096, 2048), (None, 2048)])
def test_the_length_is_by_default_2048_or_the_models_positions(
    tokenizer: Any, positions: int | None, length: int
) -> None:
    long = Text("long", TEXT.text + " " + TEXT.text + " " + TEXT.text)

    samples = samples_of(tokenizer, long, positions=positions, length=None, samples=2)

    assert samples.ids_NL.shape == (2, length)


def test_the_description_tells_the_samples_by_a_hash_of_their_tokens(tokenizer: Any) -> None:
    samples = samples_of(tokenizer, seed=5)

    numbers = np.array([16, 8, *samples.ids_NL.flatten().tolist()], "<i8")
    assert samples.description() == {
        "text": "counted",
        "samples": 16,
        "length": 8,
        "seed": 5,
        "hash": f"xxh3-128:{xxhash.xxh3_128_hexdigest(numbers.tobytes())}",
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"length": 65},
            "calibration: length is 65; this model has 64 positions: give 64 or less",
        ),
        (
            {"text": Text("short", "1 2 3 4 5")},
            "calibration: short is 5 tokens long, shorter than one sample of 8: give a longer "
            "text or a smaller length",
        ),
        ({"text": Text("none", "")}, "calibration: none is 0 tokens long, shorter than one"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    tokenizer: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OptionError) as caught:
        samples_of(tokenizer, **options)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples": 0}, "samples is 0; give a whole number, 1 or more"),
        ({"samples": 2.5}, "samples is 2.5; give a whole number, 1 or more"),
        ({"samples": True}, "samples is True; give a whole number, 1 or more"),
        ({"samples": 10**12}, "samples is 1000000000000, and each one needs a thread of its own"),
        ({"length": math.nan}, "length is nan; give a whole number, 2 or more"),
        ({"seed": "1"}, "seed is '1'; give a whole number, 0 or more"),
    ],
)
def test_numbers_that_no_calibration_can_take_are_one_line(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OptionError) as caught:
        CalibrationOptions(text="counted", **options)
    assert str(caught.value).startswith(f"calibration: {reason}")


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    asked = CalibrationOptions(text="counted", length=8)

    with pytest.raises(OptionError, match="gives token 49 for counted, the model has 40 embed"):
        read_samples(TEXT, tokenizer, asked, positions=None, embeddings=40)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(CheckpointError) as caught:
        load_tokenizer("mine", tmp_path, trust_remote_code=False)

    message = str(caught.value)
    assert message.startswith("mine: transformers does not load its tokenizer: ")
    assert message.endswith(
        "; put the model's own (tokenizer.json, tokenizer_config.json) in its folder"
    )
