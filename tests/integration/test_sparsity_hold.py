"""Zeros held in a loop of one's own: which they are, how they come back, and at what cost."""

import pickle

import pytest
import torch
import torch.distributed as dist
from support.architectures import make_model
from support.checkpoints import differing
from support.fine_tuning import batch, lost_zeros, pruned_model
from support.loading import state
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from emp_llm import OptionError, SparsityHold
from emp_llm.integration.zero_mask import Mask

DOWN = "model.layers.1.mlp.down_proj.weight"
LEAVES = ("gate", "up", "down")
PARTLY_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def model(tiny_model):
    return pruned_model("llama", tiny_model("llama"), dtype=torch.float32)


@pytest.fixture
def group():
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 8), (7, 13), (2, 3, 9), (2, 2, 3, 4), (0, 4)])
def test_a_mask_puts_back_zeros_whatever_is_there(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    was = torch.randint(-1, 2, shape, generator=generator).to(dtype)
    was[was == 0] *= -1  # half of the ways to be zero
    mask = Mask(was)
    assert mask.zeros == (was == 0).sum()
    for value in (-3.0, float("nan"), float("-inf")):
        now = torch.full(shape, value, dtype=dtype)
        assert mask.lost(now) == mask.zeros
        mask.clear(now)
        expected = torch.full(shape, value, dtype=dtype)
        expected[was == 0] = 0.0
        assert differing({"w": now}, {"w": expected}) == []
        assert mask.lost(now) == 0


def test_a_mask_sees_a_tensor_as_it_is_and_not_as_it_lies():
    was = torch.randint(0, 2, (6, 5, 11)).float()
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        mask = Mask(was.permute(order))
        now = torch.ones(6, 5, 11).permute(order)
        mask.clear(now)
        assert torch.equal(now, was.permute(order))


def test_a_mask_takes_a_sixteenth_of_bfloat16_and_reads_in_blocks():
    was = torch.randn(600, 4096).to(torch.bfloat16)
    was[was.abs() < 0.5] = 0
    mask = Mask(was)  # more than two blocks of 2²⁰ weights
    assert len(pickle.dumps(mask)) < was.nbytes / 16 + 1000
    now = torch.ones_like(was)
    mask.clear(now)
    assert torch.equal(now == 0, was == 0)


def test_a_loop_of_ones_own_loses_no_zero(model):
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with SparsityHold(model) as hold:
        for _ in range(3):
            model(**batch()).loss.backward()
            optimizer.step()
            hold.apply()
            optimizer.zero_grad()
    lost = lost_zeros(before, state(model))
    assert len(lost) == 6
    assert not any(lost.values())
    model(**batch()).loss.backward()
    zero = before[DOWN] == 0
    assert model.get_parameter(DOWN).grad[zero].abs().sum() > 0  # released


def test_weights_that_are_not_trained_are_left_alone(model):
    weights = model.get_parameter(DOWN)
    hold = SparsityHold(model)
    weights.requires_grad_(False).add_(1)
    before = state(model)
    hold.apply()
    assert differing(state(model), before) == []


def in_a_module(model):
    outer = nn.Module()
    outer.policy = model
    return outer


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a module": in_a_module,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("parameters", [None, r"mlp", DOWN])
@pytest.mark.usefixtures("group")
def test_wrapped_models_are_held_by_the_same_names(model, wrapper, parameters):
    before = state(model)
    wrapped = WRAPPERS[wrapper](model)
    SparsityHold(wrapped, parameters=parameters)  # gone at once, and its hooks with it
    hold = SparsityHold(wrapped, parameters=parameters)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 1
    hold.apply()
    lost = {name for name, count in lost_zeros(before, state(model)).items() if count}
    everything = {f"model.layers.{i}.mlp.{leaf}_proj.weight" for i in (0, 1) for leaf in LEAVES}
    assert lost == (everything - {DOWN} if parameters == DOWN else set())


@pytest.mark.usefixtures("group")
def test_gradients_are_zero_before_ddp_averages_them(model):
    before = state(model)
    wrapped = DistributedDataParallel(model)
    hold = SparsityHold(wrapped)
    wrapped(**batch()).loss.backward()
    gradient = model.get_parameter(DOWN).grad
    zero = before[DOWN] == 0
    assert (gradient[zero] == 0).all()
    assert (gradient[~zero] != 0).all()
    hold.release()


def test_parts_of_compiled_layers_are_held_too(model):
    before = state(model)
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    hold = SparsityHold(model)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 1
    hold.apply()
    after = {name.replace("._orig_mod", ""): tensor for name, tensor in state(model).items()}
    assert not any(lost_zeros(before, after).values())


def test_a_tied_matrix_is_held_under_either_name():
    model = make_model("llama-tied")
    tied = model.get_input_embeddings().weight
    tied.data[:, 3] = 0
    for name in ("lm_head.weight", "model.embed_tokens.weight", "embed|lm_head"):
        hold = SparsityHold(model, parameters=name)
        tied.data.add_(1)
        hold.apply()
        assert (tied[:, 3] == 0).all()
        assert (tied[:, 4] != 0).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, r"^this LlamaForCausalLM does not say what was pruned in it.*parameters=\['mlp'\]$"),
        ("mpl", r"^parameters: 'mpl' matches no matrix.* it has 16, such as '.*lm_head.weight'$"),
        (["down_proj", "("], r"^parameters: '\(' is not a regular expression: "),
        (
            "mlp",
            r"gate_proj.weight' holds no zero \(4 of 6 parameters do not\).*narrow parameters$",
        ),
        ("norm", r"^parameters: 'norm' matches no matrix"),
    ],
)
def test_refusals_name_what_is_wrong(parameters, message):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[0] = 0
    with pytest.raises(OptionError, match=message) as caught:
        SparsityHold(model, parameters=parameters)
    assert "\n" not in str(caught.value)


def test_a_pruned_model_without_any_zero_left_is_refused(model):
    with torch.no_grad():
        for weights in model.parameters():
            weights += 1
    with pytest.raises(OptionError, match=r"holds no zero \(6 of 6 parameters do not\)"):
        SparsityHold(model)


def test_weights_that_are_not_here_are_refused(tiny_model, tmp_path):
    offloaded = AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"),
        device_map=PARTLY_ON_DISK,
        offload_folder=tmp_path,
    )
    with pytest.raises(OptionError, match=r"layers\.1\..*meta device.*device_map"):
        SparsityHold(offloaded, parameters=r"layers\.1\.mlp")


@pytest.mark.usefixtures("group")
def test_weights_split_over_processes_are_refused(model):
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(OptionError, match=r"split over several processes \(DTensor.*DDP"):
        SparsityHold(model)
