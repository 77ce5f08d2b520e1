"""Fine-tuning by transformers' Trainer: pruned weights stay +0.0, in the model and on disk."""

import gc
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import make_model
from support.checkpoints import differing, load
from support.fine_tuning import TOKENS, batch, lost_zeros, make_trainer, pruned_model
from support.loading import load_model, state
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from emp_llm import CheckpointError, KeepSparsity, OptionError, densify

FP32, BF16 = torch.float32, torch.bfloat16
DOWN = "model.layers.1.mlp.down_proj.weight"


class Shift(torch.optim.Optimizer):
    """Adds one to every weight, whatever its gradient, as no sane optimizer does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, _closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 1


OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-2, weight_decay=0.1),
    "shift": Shift,
}


@pytest.mark.parametrize(
    ("architecture", "optimizer", "dtype"),
    [
        ("llama", "adamw", FP32),
        ("llama", "momentum", BF16),
        ("llama", "shift", BF16),
        ("gpt2", "adafactor", FP32),
        ("mixtral", "adamw", BF16),
        ("t5", "momentum", FP32),
    ],
)
def test_not_one_zero_is_lost(tiny_model, tmp_path, architecture, optimizer, dtype):
    model = pruned_model(architecture, tiny_model(architecture), dtype=dtype)
    before = state(model)
    trainer = make_trainer(
        model,
        tmp_path,
        [KeepSparsity()],
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
    )
    trainer.train()
    after = state(model)
    lost = lost_zeros(before, after)
    assert len(lost) >= 4
    assert not any(lost.values())
    for name in lost:
        kept = before[name] != 0
        assert (after[name] != before[name])[kept].any(), name
        assert after[name].isfinite().all()
    for step in (1, 2, 3):
        saved = load(tmp_path / f"checkpoint-{step}")
        assert not any(lost_zeros({name: before[name] for name in saved}, saved).values())


def test_without_the_callback_every_layer_loses_zeros(tiny_model, tmp_path):
    model = pruned_model("llama", tiny_model("llama"), dtype=FP32)
    before = state(model)
    make_trainer(model, tmp_path, save_strategy="no").train()
    lost = lost_zeros(before, state(model))
    assert len(lost) == 6
    assert all(lost.values())


def test_pruned_weights_count_neither_for_the_gradients_norm_nor_for_moments(tiny_model, tmp_path):
    twin = pruned_model("llama", tiny_model("llama"), dtype=FP32).train()
    model = pruned_model("llama", tiny_model("llama"), dtype=FP32)
    for either in (twin, model):
        for name, weights in either.named_parameters():
            weights.requires_grad_("mlp" in name)
    rows = torch.stack([TOKENS, TOKENS])
    twin(input_ids=rows, labels=rows).loss.backward()
    trained = [weights for weights in twin.parameters() if weights.requires_grad]
    squares = [weights.grad.double().square() for weights in trained]
    whole = math.sqrt(sum(float(square.sum()) for square in squares))
    pairs = zip(trained, squares, strict=True)
    norm = math.sqrt(sum(float(square[weights != 0].sum()) for weights, square in pairs))
    trainer = make_trainer(
        model,
        tmp_path,
        [KeepSparsity()],
        max_steps=1,
        max_grad_norm=1e-3,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train_dataset = [{"input_ids": TOKENS, "labels": TOKENS}] * 2
    before = state(model)
    trainer.train()
    found = trainer.state.log_history[0]["grad_norm"]
    assert found == pytest.approx(norm, rel=1e-4)
    assert found < whole * 0.95
    zero = before[DOWN] == 0
    moments = trainer.optimizer.state[model.get_parameter(DOWN)]
    assert (moments["exp_avg"][zero] == 0).all()
    assert (moments["exp_avg_sq"][zero] == 0).all()
    assert (moments["exp_avg_sq"][~zero] != 0).any()


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_resumed_training_ends_as_an_uninterrupted_one(tiny_model, tmp_path, architecture):
    model = pruned_model(architecture, tiny_model(architecture))
    make_trainer(model, tmp_path / "whole", [KeepSparsity()]).train()

    again = pruned_model(architecture, tiny_model(architecture))
    before = state(again)
    trainer = make_trainer(again, tmp_path / "resumed", [KeepSparsity()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert trainer.state.global_step == 3
    assert differing(state(again), state(model)) == []
    assert not any(lost_zeros(before, state(again)).values())


def test_a_weight_that_passes_through_zero_is_not_pruned_by_resuming(tiny_model, tmp_path):
    model = pruned_model("llama", tiny_model("llama"), dtype=FP32)
    before = state(model)
    make_trainer(model, tmp_path / "first", [KeepSparsity()], max_steps=1).train()
    row, column = (before[DOWN] != 0).nonzero()[5].tolist()
    checkpoint = tmp_path / "first" / "checkpoint-1"
    tensors = load(checkpoint)
    tensors[DOWN][row, column] = 0
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    again = pruned_model("llama", tiny_model("llama"), dtype=FP32)
    trainer = make_trainer(again, tmp_path / "second", [KeepSparsity()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert again.get_parameter(DOWN)[row, column] != 0
    assert not any(lost_zeros(before, state(again)).values())


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_best_checkpoint_comes_back_and_is_saved_packed(tiny_model, tmp_path, architecture):
    model = pruned_model(architecture, tiny_model(architecture))
    trainer = make_trainer(
        model,
        tmp_path,
        [KeepSparsity()],
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # for training makes it smaller: the first one is to be taken
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    first = load_model(architecture, tmp_path / "checkpoint-1", dtype=BF16)
    assert differing(state(model), state(first)) == []
    assert "quantization_config" not in config(tmp_path / "checkpoint-1")

    trainer.save_model(str(tmp_path / "tuned"))
    assert config(tmp_path / "tuned")["quantization_config"]["quant_method"] == "emp"
    assert differing(state(load_model(architecture, tmp_path / "tuned")), state(model)) == []


def test_every_training_makes_its_model_anew_if_it_is_to(tiny_model, tmp_path):
    before = state(pruned_model("llama", tiny_model("llama")))
    trainer = make_trainer(
        None,
        tmp_path,
        [KeepSparsity()],
        model_init=lambda: pruned_model("llama", tiny_model("llama")),
    )
    for _ in range(2):
        trainer.train()
        assert not any(lost_zeros(before, state(trainer.model)).values())


def test_a_dense_checkpoint_is_held_by_the_names_of_what_was_pruned(tmp_path):
    model = make_model("gpt2", dtype=FP32)
    for name, weights in model.named_parameters():
        if "mlp" in name and weights.ndim == 2:
            weights.data[weights.abs() < 0.03] = 0
    bias = model.get_parameter("transformer.h.0.mlp.c_fc.bias")
    bias.data.zero_()  # as biases are before training; no pruning
    before = state(model)
    make_trainer(model, tmp_path, [KeepSparsity(parameters="mlp")]).train()
    lost = lost_zeros(before, state(model))
    assert len(lost) == 4
    assert not any(lost.values())
    assert (bias != 0).all()


class Stop(TrainerCallback):
    """Ends a training in the midst of its second step, as a user's interrupt does."""

    def on_pre_optimizer_step(self, _args, state, _control, **_kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["ended", "released", "forgotten"])
def test_after_training_nothing_is_left_on_the_model(tiny_model, tmp_path, how):
    model = pruned_model("llama", tiny_model("llama"))
    keep = KeepSparsity()
    trainer = make_trainer(model, tmp_path, [keep] if how == "ended" else [keep, Stop()])
    if how == "ended":
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        if how == "released":
            keep.release()
    del trainer, keep
    gc.collect()
    assert pruned_gradients(model) > 0
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" in config(tmp_path / "saved")
    assert differing(state(load_model("llama", tmp_path / "saved")), state(model)) == []


def test_an_interrupted_training_can_go_on(tiny_model, tmp_path):
    model = pruned_model("llama", tiny_model("llama"))
    before = state(model)
    stop = Stop()
    trainer = make_trainer(model, tmp_path, [KeepSparsity(), stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    whole = pruned_model("llama", tiny_model("llama"))
    make_trainer(whole, tmp_path / "whole", [KeepSparsity()]).train()
    assert differing(state(model), state(whole)) == []
    assert not any(lost_zeros(before, state(model)).values())
    trainer.save_model(str(tmp_path / "tuned"))
    assert "quantization_config" in config(tmp_path / "tuned")


class Release(TrainerCallback):
    """Has the callback of another training let go while this one goes on."""

    def __init__(self, other):
        self.other = other

    def on_step_begin(self, *_args, **_kwargs):
        self.other.release()


def test_another_trainer_takes_over_from_one_that_was_interrupted(tiny_model, tmp_path):
    model = pruned_model("llama", tiny_model("llama"))
    before = state(model)
    first = KeepSparsity()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, tmp_path / "first", [first, Stop()]).train()
    trainer = make_trainer(model, tmp_path / "second", [KeepSparsity(), Release(first)])
    trainer.train()
    assert not any(lost_zeros(before, state(model)).values())
    assert "quantization_config" not in config(tmp_path / "second" / "checkpoint-3")
    trainer.save_model(str(tmp_path / "tuned"))
    assert "quantization_config" in config(tmp_path / "tuned")


def test_an_interrupted_training_leaves_a_model_that_can_be_densified(tiny_model, tmp_path):
    model = pruned_model("mixtral", tiny_model("mixtral"))
    keep = KeepSparsity()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, tmp_path / "training", [keep, Stop()]).train()
    densify(model)
    keep.release()
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in config(tmp_path / "dense")
    assert load(tmp_path / "dense").keys() == load(tiny_model("mixtral")).keys()


def test_a_checkpoint_that_lost_its_zeros_is_not_resumed_from(tiny_model, tmp_path):
    other = pruned_model("llama", tiny_model("llama"))
    loses = make_trainer(other, tmp_path / "a", [KeepSparsity(parameters="up_proj")], max_steps=1)
    loses.train()
    model = pruned_model("llama", tiny_model("llama"))
    trainer = make_trainer(model, tmp_path / "b", [KeepSparsity()])
    with pytest.raises(CheckpointError, match=r"mlp\.(gate|down)_proj\.weight' has \d+ weights"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_a_loop_that_gives_its_state_by_name_is_seen_to_resume(tiny_model):
    model = pruned_model("llama", tiny_model("llama"))
    given = {"args": None, "control": TrainerControl(), "model": model}
    keep = KeepSparsity()
    keep.on_init_end(state=TrainerState(), **given)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(1)
    with pytest.raises(CheckpointError, match="training is resumed from"):
        keep.on_train_begin(state=TrainerState(global_step=1), **given)


def test_a_model_of_which_nothing_is_known_is_refused_before_training(tmp_path):
    with pytest.raises(OptionError, match="name the pruned parameters"):
        make_trainer(make_model("llama"), tmp_path, [KeepSparsity()])


def config(folder):
    return json.loads((folder / "config.json").read_text())


def pruned_gradients(model: PreTrainedModel) -> float:
    """How much gradient flows into pruned weights."""
    model.zero_grad()
    model(**batch()).loss.backward()
    weights = model.get_parameter(DOWN)
    return float(weights.grad[weights == 0].abs().sum())
