"""`PackedWeight`: a tensor that computes as the dense one does, from packed rows."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import bits, gaussian
from torch import Tensor

from emp_llm.errors import OptionError
from emp_llm.resident.content import Content
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.resident.weight import PackedWeight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["pruned", "turned", "whole"]


def dense_of(kind: str, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    weights = gaussian(*shape, dtype=dtype, seed=seed)
    return weights if kind == "whole" else torch.where(weights.abs() < 0.3, 0, weights)


def packed_of(kind: str, dense: Tensor) -> PackedWeight:
    """The same packed; turned: rows run along the last dimension but one."""
    planes = pack_rest(dense)
    if kind != "whole":
        planes = pack_tensor("w", dense, PackedBefore(kind == "turned"))
    assert planes is not None
    return PackedWeight(Content.of(planes))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """As near as one rounding, and float32 sums, leave it."""
    assert found.shape == expected.shape
    limit = 8 * torch.finfo(found.dtype).eps * expected.abs().max() + 1e-6
    assert (found.double() - expected.double()).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
def test_products_are_those_of_the_dense_weight(kind: str, dtype: torch.dtype, tokens: int) -> None:
    dense = dense_of(kind, 192, 256, dtype=dtype)
    weight = packed_of(kind, dense)
    x = gaussian(2, tokens, 256, dtype=dtype, seed=1)[: 1 if tokens > 3 else 2]
    bias, back = gaussian(192, dtype=dtype, seed=2), gaussian(tokens, 192, dtype=dtype, seed=3)
    exact = dense.double()
    assert_near(F.linear(x, weight), F.linear(x.double(), exact))
    assert_near(F.linear(x, weight, bias), F.linear(x.double(), exact, bias.double()))
    assert_near(x @ weight.T, x.double() @ exact.T)
    assert_near(back @ weight, back.double() @ exact)
    assert_near(torch.addmm(bias, x[0], weight.t()), bias.double() + x[0].double() @ exact.T)
    assert_near(weight @ x[0].T, exact @ x[0].double().T)
    with torch.inference_mode():
        assert_near(F.linear(x, weight, bias), F.linear(x.double(), exact, bias.double()))
        assert_near(torch.matmul(x, weight.mT), x.double() @ exact.T)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_bit_for_bit_the_dense_weight(kind: str) -> None:
    dense = dense_of(kind, 192, 256)
    weight = packed_of(kind, dense)
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.stride()) == (dense.shape, dense.dtype, (256, 1))
    assert bits(weight.unpacked()) == bits(dense)
    assert weight.packed_bytes < 0.8 * dense.nbytes
    assert "PackedWeight([192, 256], bfloat16" in repr(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up(kind: str) -> None:
    dense = dense_of(kind, 192, 256)
    weight = packed_of(kind, dense)
    ids = torch.tensor([[3, 191, 0], [7, 3, 3]])
    assert bits(F.embedding(ids, weight)) == bits(dense[ids])
    assert bits(weight[ids]) == bits(dense[ids])
    assert bits(weight[-1]) == bits(dense[-1])


@pytest.mark.parametrize("kind", ["pruned", "whole"])
def test_a_row_that_is_not_there_is_an_error_as_of_a_dense_weight(kind: str) -> None:
    weight = packed_of(kind, dense_of(kind, 192, 256))
    for each in (weight, torch.cat([weight, weight])[:200]):
        for row in (-1, len(each)):
            with pytest.raises(IndexError):
                F.embedding(torch.tensor([0, row]), each)


def test_autocast_casts_activations_and_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of("pruned", 192, 256)
    weight, x = packed_of("pruned", dense), gaussian(3, 256, seed=1).float().requires_grad_()
    bias = gaussian(192, dtype=torch.float32, seed=2)
    with torch.autocast("cpu", dtype=torch.float16):
        found = F.linear(x, weight, bias)
        assert_near(found, F.linear(x.half(), dense.half(), bias.half()))
    monkeypatch.setattr(PackedWeight, "unpacked", lambda _: pytest.fail("it was decoded"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = F.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert_near(found, F.linear(x.double(), dense.double(), bias.double()))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "an expert": lambda w: w[2],
    "some experts": lambda w: w[1:3],
    "experts by number": lambda w: w[torch.tensor([3, 0, 0])],
    "turned": lambda w: w.transpose(1, 2),
    "one made two": lambda w: w.unsqueeze(1),
    "flat": lambda w: w.reshape(-1, w.shape[-1]),
}
SPLITS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "chunks of experts": lambda w: list(torch.chunk(w, 2)),
    "unbound": lambda w: list(w.unbind()),
    "split": lambda w: list(w.split([1, 3])),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("turned", [False, True])
def test_experts_are_selected_without_being_decoded(view: str, turned: bool) -> None:
    dense = dense_of("pruned", 4, 24, 32)
    weight = packed_of("turned" if turned else "pruned", dense)
    found, expected = VIEWS[view](weight), VIEWS[view](dense)
    if view == "flat" and turned:  # no whole rows
        assert bits(found) == bits(expected)
        return
    assert isinstance(found, PackedWeight)
    assert found.stride() == expected.stride() or view == "turned"
    assert bits(found.unpacked().contiguous()) == bits(expected.contiguous())


@pytest.mark.parametrize("split", SPLITS)
def test_experts_are_split_and_joined_again(split: str) -> None:
    dense = dense_of("pruned", 4, 24, 32)
    weight = packed_of("pruned", dense)
    parts = SPLITS[split](weight)
    for part, expected in zip(parts, SPLITS[split](dense), strict=True):
        assert isinstance(part, PackedWeight)
        assert bits(part.unpacked()) == bits(expected)
    again = torch.stack(parts) if split == "unbound" else torch.cat(parts)
    assert isinstance(again, PackedWeight)
    assert bits(again.unpacked()) == bits(dense)


@pytest.mark.parametrize("turned", [False, True])
def test_gates_and_ups_of_experts_are_fused_and_taken_apart(turned: bool) -> None:
    kind, dim = ("turned", 2) if turned else ("pruned", 1)
    shape = (32, 24) if turned else (24, 32)
    dense = [[dense_of(kind, *shape, seed=seed + 10 * e) for e in range(3)] for seed in (0, 1)]
    stacks = [torch.stack([packed_of(kind, one) for one in part]) for part in dense]
    fused = torch.cat(stacks, dim=dim)
    expected = torch.cat([torch.stack(part) for part in dense], dim=dim)
    assert isinstance(fused, PackedWeight)
    assert bits(fused.unpacked()) == bits(expected)
    x = gaussian(5, 32, seed=9)
    product = x @ fused[1] if turned else F.linear(x, fused[1])
    exact = expected[1].double()
    assert_near(product, x.double() @ (exact if turned else exact.T))
    gates, ups = torch.chunk(fused, 2, dim=dim)
    for part, whole in zip((gates, ups), dense, strict=True):
        for expert, one in zip(part.unbind(), whole, strict=True):
            assert isinstance(expert, PackedWeight)
            assert expert.content.is_whole_planes
            assert bits(expert.unpacked()) == bits(one)


def test_only_called_experts_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of("pruned", 4, 24, 32)
    weight = packed_of("pruned", dense)
    called = []
    monkeypatch.setattr(
        "emp_llm.resident.products.multiply_held",
        lambda held, _x, out, _bias: (called.append(int(held.offsets[0])), out.zero_()),
    )
    x = gaussian(3, 32)
    F.grouped_mm(x, weight.transpose(1, 2), offs=torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    starts = weight.content.planes[0].held.offsets
    assert called == [starts[24], starts[72]]


@pytest.mark.parametrize("turned", [False, True])
def test_tokens_are_multiplied_by_their_experts(turned: bool) -> None:
    dense = dense_of("pruned", 4, 24, 32)
    weight, exact = packed_of("turned" if turned else "pruned", dense), dense.double()
    x, ends = gaussian(6, 32, seed=1), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    expected = torch.cat([x[:2].double() @ exact[1].T, x[2:].double() @ exact[3].T])
    assert_near(F.grouped_mm(x, weight.transpose(1, 2), offs=ends), expected)
    chosen = torch.tensor([1, 3])
    found = torch.bmm(weight[chosen], x[:2, :, None])
    assert_near(found[..., 0], torch.bmm(exact[chosen], x[:2, :, None].double())[..., 0])


def test_whatever_else_is_done_gets_the_dense_weight() -> None:
    dense = dense_of("pruned", 24, 32)
    weight = packed_of("pruned", dense)
    assert (weight == 0).sum() == (dense == 0).sum()
    assert bits(weight + 1) == bits(dense + 1)
    assert bits(torch.einsum("ij,j->i", weight, dense[0])) == bits(dense @ dense[0])
    assert weight.float().norm() == dense.float().norm()
    assert torch.equal(torch.zeros_like(dense).copy_(weight), dense)
    assert type(weight * 2) is Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(24, 32)),
        lambda w: torch.nn.init.normal_(w),
        lambda w: torch.mul(w, 2, out=w),
    ],
)
def test_it_cannot_be_written_to(write: Callable[[Tensor], object]) -> None:
    weight = packed_of("pruned", dense_of("pruned", 24, 32))
    with pytest.raises(OptionError, match="stays packed in memory cannot be changed, as aten"):
        write(weight)


def test_its_data_is_that_of_another_packed_weight_or_stays() -> None:
    dense = dense_of("pruned", 24, 32)
    parameter = torch.nn.Parameter(packed_of("pruned", dense), requires_grad=False)
    for other in (torch.zeros(24, 32), packed_of("pruned", dense_of("pruned", 20, 32))):
        with pytest.raises(OptionError, match=r"cannot be changed, as \.data = would"):
            parameter.data = other
    assert torch.equal(parameter.unpacked(), dense)
    parameter.data = packed_of("pruned", -dense)
    assert torch.equal(parameter.unpacked(), -dense)


def test_it_cannot_be_trained() -> None:
    weight = packed_of("pruned", dense_of("pruned", 24, 32))
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    for ask in (
        lambda: torch.nn.Parameter(weight),
        lambda: parameter.requires_grad_(True),
        lambda: setattr(parameter, "requires_grad", True),
    ):
        with pytest.raises(OptionError, match="cannot be trained: train adapters on top"):
            ask()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_it(kind: str) -> None:
    dense = dense_of(kind, 192, 256)
    weight = packed_of(kind, dense)
    grads = []
    for w in (weight, dense.double()):
        x = gaussian(5, 256, seed=1).to(w.dtype).requires_grad_()
        (F.linear(x, w) * gaussian(5, 192, seed=2).to(w.dtype)).sum().backward()
        grads.append(x.grad)
    assert_near(grads[0], grads[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("now", DTYPES, ids=str)
def test_it_is_cast_and_packed_again(kind: str, now: torch.dtype) -> None:
    dense = dense_of(kind, 192, 256, dtype=torch.float32)
    found = packed_of(kind, dense).to(now)
    assert isinstance(found, PackedWeight)
    assert bits(found.unpacked()) == bits(dense.to(now))


def test_what_cannot_be_packed_becomes_dense() -> None:
    dense = dense_of("pruned", 24, 32, dtype=torch.float32)
    dense[0, 0] = 1e30
    weight = packed_of("pruned", dense)
    assert torch.equal(weight.double(), dense.double())
    assert torch.equal(weight.half(), dense.half())
    assert weight.to("meta").is_meta


def test_copies_and_pickles_are_the_same(tmp_path: Path) -> None:
    dense = dense_of("pruned", 4, 24, 32)
    weight = torch.nn.Parameter(packed_of("pruned", dense)[1:3], requires_grad=False)
    torch.save({"w": weight}, tmp_path / "state.pt")
    for again in (
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),  # noqa: S301 (written one line ago)
        torch.load(tmp_path / "state.pt", weights_only=True)["w"],
    ):
        assert isinstance(again, PackedWeight)
        assert isinstance(again, torch.nn.Parameter)
        assert bits(again.unpacked()) == bits(dense[1:3])


def test_it_is_moved_to_memory_that_processes_share() -> None:
    dense = dense_of("pruned", 24, 32)
    weight = packed_of("pruned", dense)
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    assert bits(weight.unpacked()) == bits(dense)


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_and_exports(kind: str) -> None:
    dense = dense_of(kind, 192, 256)
    layer = torch.nn.Linear(256, 192, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(packed_of(kind, dense), requires_grad=False)
    x = gaussian(3, 256, seed=1)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), expected)
