"""Packed weights in a GPU's memory: its kernels compute with them, and nothing else is unpacked.

But in the last tests Triton's interpreter stands in for the GPU: it works on tensors of the CPU,
and packed weights are told that these lie there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import bits, gaussian
from torch import Tensor

from emp_llm.resident.content import Content, of_buffers
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.resident.weight import PackedWeight

interpreter = pytest.mark.interpreter
kinds = pytest.mark.parametrize("kind", ["pruned", "whole"])


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """All that is packed lies in a GPU's memory; the kernels of the CPU are out of reach."""

    def refuse(*_: object) -> None:
        raise AssertionError("the CPU's kernels were asked")

    for module in ("held_planes", "products"):
        monkeypatch.setattr(f"emp_llm.resident.{module}.is_there", lambda _tensor: True)
    for name in ("hold_rows", "hold_whole"):
        monkeypatch.setattr(f"emp_llm.resident.held_planes.{name}", refuse)
    return monkeypatch


@pytest.fixture(autouse=True)
def small_ones_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each row."""
    monkeypatch.setattr("emp_llm.pruning.rest_job.SMALLEST_PACKED", 0)


def dense_of(kind: str, *shape: int) -> Tensor:
    weights = gaussian(*shape)
    return weights if kind == "whole" else torch.where(weights.abs() < 0.3, 0, weights)


def packed_of(kind: str, dense: Tensor) -> PackedWeight:
    planes = pack_rest(dense) if kind == "whole" else pack_tensor("w", dense, PackedBefore(False))
    assert planes is not None
    assert planes.is_whole == (kind == "whole")
    return PackedWeight(Content.of(planes))


def assert_near(found: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of a sum in float32 and of its result."""
    wide, exact = x.double(), dense.double()
    added = torch.zeros(len(dense)).double() if bias is None else bias.double()
    expected = F.linear(wide, exact, added)
    off = (dense.shape[1] + 1) * 2**-24 * F.linear(wide.abs(), exact.abs(), added.abs())
    bound = torch.finfo(found.dtype).eps / 2 * expected.abs() + 2 * off
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound).all()


@interpreter
@kinds
def test_few_tokens_are_multiplied_from_packed_rows(kind: str, there: pytest.MonkeyPatch) -> None:
    dense = dense_of(kind, 2, 24)
    weight, bias = packed_of(kind, dense), gaussian(2, seed=2)
    there.setattr(Content, "unpack", lambda *_: pytest.fail("rows were decoded to memory"))
    for tokens in (1, 4):
        x = gaussian(tokens, 24, seed=1)
        assert_near(F.linear(x, weight, bias), x, dense, bias)
    assert F.linear(x[:0], weight, bias).shape == (0, 2)


@interpreter
@kinds
@pytest.mark.usefixtures("there")
def test_rows_are_decoded_for_many_tokens_and_looked_up(kind: str) -> None:
    dense = dense_of(kind, 2, 24)
    weight, x, ids = packed_of(kind, dense), gaussian(17, 24, seed=1), torch.tensor([[1, 0, 1]])
    assert_near(F.linear(x, weight), x, dense)
    assert bits(F.embedding(ids, weight)) == bits(dense[ids])


@interpreter
@kinds
@pytest.mark.usefixtures("there")
def test_experts_are_multiplied_and_joined(kind: str) -> None:
    dense = dense_of(kind, 3, 1, 24)
    weight, x = packed_of(kind, dense), gaussian(1, 24, seed=1)
    assert_near(F.linear(x, weight[2]), x, dense[2])
    assert_near(F.linear(x, torch.cat([weight[2], weight[0]])), x, torch.cat([dense[2], dense[0]]))


@kinds
def test_experts_that_share_planes_share_them_on_another_device(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.resident.content.device_of_kernels", lambda device: device)
    first, second = packed_of(kind, dense_of(kind, 2, 2, 24)).unbind()
    moved = [it.content.moved(torch.device("meta")) for it in (first, second)]
    assert moved[0].buffers[0].is_meta
    assert moved[0].planes == moved[1].planes
    assert first.content.moved(torch.device("cpu")).planes == second.content.planes


def test_weights_are_dense_where_no_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emp_llm.resident.content.device_of_kernels", lambda _device: None)
    weight = packed_of("whole", dense_of("whole", 2, 24))
    with pytest.warns(UserWarning, match="cannot stay packed on meta, on which none of emp-llm's"):
        moved = weight.content.moved(torch.device("meta"))
    assert type(moved) is Tensor
    assert (moved.shape, moved.device.type) == (weight.shape, "meta")


@kinds
def test_a_compiled_model_takes_rows_that_have_been_checked(kind: str) -> None:
    content = packed_of(kind, dense_of(kind, 2, 24)).content
    again = of_buffers([it.detach() for it in content.buffers], content.text)
    assert again.planes == content.planes


# On a real device


@contextmanager
def nothing_waits() -> Iterator[None]:
    """What has the CPU wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_products_are_captured_in_graphs(kind: str, tokens: int) -> None:
    dense = dense_of(kind, 192, 1000)
    weight, x = packed_of(kind, dense).to("cuda"), gaussian(tokens, 1000, seed=1).cuda()
    ids = torch.tensor([5, 191], device="cuda")
    assert isinstance(weight, PackedWeight)
    for _ in range(2):  # kernels are compiled
        F.linear(x, weight), F.embedding(ids, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, rows = F.linear(x, weight), F.embedding(ids, weight)
    for seed in (2, 3):
        x.copy_(gaussian(tokens, 1000, seed=seed))
        F.linear(gaussian(500, 1000).cuda(), weight)  # which decodes to memory of its own
        graph.replay()
        assert_near(out.cpu(), x.cpu(), dense)
    assert bits(rows.cpu()) == bits(dense[[5, 191]])


@pytest.mark.gpu
@kinds
def test_streams_decode_to_memory_of_their_own(kind: str) -> None:
    dense = [dense_of(kind, 1024, 1000), dense_of(kind, 1024, 1000).flip(0)]
    weights, x = [packed_of(kind, it).to("cuda") for it in dense], gaussian(64, 1000).cuda()
    expected = [F.linear(x, it) for it in weights]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    with nothing_waits():
        for _ in range(50):
            for stream, weight, outs in zip(streams, weights, found, strict=True):
                with torch.cuda.stream(stream):
                    outs.append(F.linear(x, weight))
    torch.cuda.synchronize()
    for outs, one, weight in zip(found, expected, dense, strict=True):
        assert_near(one.cpu(), x.cpu(), weight)
        assert all(torch.equal(out, one) for out in outs)
