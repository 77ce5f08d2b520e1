"""Tiny models of classes that are unlike each other come through pruning to the last bit.

`benchmarks/check_architectures.py` does the same with all classes; the models of
`support/architectures.py` are tested in more ways.
"""

from functools import partial
from pathlib import Path

import architecture_check
import pytest
from architecture_check import FAILED, ROUND_TRIP, check_class

from emp_llm import EmpConfig

CLASSES = [
    "AriaForConditionalGeneration",  # experts that lie [.., in, out]
    "Gemma3ForConditionalGeneration",  # three parts under other names than in the checkpoint
    "Wav2Vec2ForCTC",  # weight norm
    "XLNetLMHeadModel",  # attention in three dimensions, which is left as it is
    "Zamba2ForCausalLM",  # one decoder block at several places, and state space layers
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "JetMoeForCausalLM",  # experts in attention
            "NllbMoeForConditionalGeneration",  # experts one by one, encoder and decoder
            "WhisperForConditionalGeneration",  # speech
        )
    ),
]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", CLASSES)
def test_every_output_is_verified_and_loads_to_the_same_bits(tmp_path: Path, name: str) -> None:
    outcome = check_class(name, tmp_path, ["all-linear"])
    assert (outcome.status, outcome.cause) == (ROUND_TRIP, "")


def test_the_check_finds_a_model_that_was_pruned_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture_check, "EmpConfig", partial(EmpConfig, beta=0.5))
    outcome = check_class("LlamaForCausalLM", tmp_path, ["mlp"])
    assert outcome.status == FAILED
    assert outcome.cause.startswith("mlp: EmpConfig: 6 parameters differ, such as model.layers.0.")
