"""The benchmark of the GPU kernels runs to its end, proves them right first, and needs a GPU."""

import json
import sys

import bench_gpu
import gpu_kernels
import pytest
import torch
from emp_kernels.gpu_devices import find_devices
from emp_kernels.gpu_workspace import DeviceWorkspace

interpreter = pytest.mark.interpreter


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *options])
    bench_gpu.main()


def small_case(dtype):
    device = find_devices()[0]
    pool = gpu_kernels.random_patterns(dtype, 100, device)
    return gpu_kernels.Case(dtype, (2, 40), pool, torch.empty_like(pool), DeviceWorkspace(device))


@interpreter
@pytest.mark.slow
def test_interpreted_it_runs_to_its_end_and_writes_no_result(monkeypatch, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    run(monkeypatch, "--quick", "--dtypes", "bf16", "fp32", "--json", str(out))
    printed = capsys.readouterr().out
    for shown in (
        "bf16 1×40",
        "fp32 2×1×24",
        "packed on the device",
        "from host to host",
        "records  tokens",
        "  whole ",
    ):
        assert shown in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.splitlines()[-1].startswith("Triton interpreted the kernels: no time here")
    assert not out.exists()


@interpreter
def test_interpreted_it_takes_quick_only(monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch)
    assert str(ended.value).startswith("bench_gpu.py needs a CUDA device: TRITON_INTERPRET is set")


def flip_a_bit(packed):
    packed.payload[-1] ^= 1
    return packed


def count_one_more(counts):
    counts[..., 1] += 1
    return counts


@interpreter
@pytest.mark.parametrize(
    ("kernel", "made_wrong"),
    [
        ("pack", lambda pack: lambda *args, **kwargs: flip_a_bit(pack(*args, **kwargs))),
        ("prune", lambda _prune: lambda *_args, **_kwargs: None),
        ("unpack", lambda _unpack: lambda *_args: None),
        ("count_keys", lambda count: lambda *args: count_one_more(count(*args))),
    ],
    ids=["pack", "prune", "unpack", "count_keys"],
)
def test_a_kernel_that_is_wrong_is_not_timed(kernel, made_wrong, monkeypatch):
    case = small_case("bf16")
    case.check()
    monkeypatch.setattr(gpu_kernels, kernel, made_wrong(getattr(gpu_kernels, kernel)))
    with case.workspace.active(), pytest.raises(AssertionError, match="differs from"):
        case.check()


@interpreter
def test_times_are_given_as_copies_of_as_many_bytes():
    copy = gpu_kernels.Timed(10**9, 2 * 10**9, [1.0, 0.5, 0.25])  # median 4 GB/s moved
    timed = gpu_kernels.Timed(10**9, 10**9, [0.5])
    assert (copy.rate, timed.rate) == (2.0, 2.0)
    assert timed.copies(copy) == 2.0


@pytest.mark.gpu
def test_on_a_device_quick_writes_the_figures(monkeypatch, tmp_path):
    out = tmp_path / "gpu.json"
    run(monkeypatch, "--quick", "--json", str(out))
    written = json.loads(out.read_text())
    assert written["results"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert len(written["results"]["cases"]) == 6
    assert all(
        rate > 0 for case in written["results"]["cases"] for rate in case["gb_per_second"].values()
    )
