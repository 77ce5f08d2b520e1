"""Activations that wait are what they were when they are brought back, whoever holds them."""

import errno
from pathlib import Path

import pytest
import torch

from emp_llm import OutputError
from emp_llm.calibration.activations import Activations


def on_disk(folder: Path) -> Activations:
    return Activations(0, folder)


@pytest.mark.parametrize("memory", [0, 100, 1 << 20])
def test_what_waits_comes_back_to_the_bit_through_every_view_of_it(
    tmp_path: Path, memory: int
) -> None:
    waiting = Activations(memory, tmp_path)
    tensors = {key: torch.randn(7, 5).bfloat16() for key in range(4)}
    expected = {key: tensor.clone() for key, tensor in tensors.items()}
    rows = {key: tensor[2:4].T for key, tensor in tensors.items()}
    for _ in range(2):
        for key, tensor in tensors.items():
            waiting.put_away(key, [rows[key], tensor])
        for key in (3, 0, 2, 1):
            waiting.bring_back(key)
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    assert all(torch.equal(rows[key], expected[key][2:4].T) for key in tensors)
    assert waiting.spilled == (0 if memory == 1 << 20 else 4 * 70 if memory < 70 else 3 * 70)
    waiting.close()


def test_what_waits_on_disk_takes_no_memory_and_its_place_is_used_again(tmp_path: Path) -> None:
    waiting = on_disk(tmp_path)
    for _ in range(5):
        tensors = [torch.randn(9), torch.randn(3, 3)]
        waiting.put_away("sample", tensors)
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
        waiting.bring_back("sample")
    assert waiting.spilled == 2 * 36
    assert list(tmp_path.iterdir()) == []
    waiting.close()


def test_what_several_samples_have_is_there_for_each_of_them(tmp_path: Path) -> None:
    waiting = on_disk(tmp_path)
    mask, own = torch.arange(6.0), torch.ones(3)
    part = mask[1:]
    waiting.put_away(0, [mask])
    waiting.put_away(1, [own, part])
    assert torch.equal(mask, torch.arange(6.0))
    waiting.bring_back(1)
    waiting.put_away(1, [own, mask])
    waiting.bring_back(0)
    assert torch.equal(mask, torch.arange(6.0))
    waiting.bring_back(1)
    assert torch.equal(own, torch.ones(3))
    assert torch.equal(mask, torch.arange(6.0))
    waiting.close()


def test_what_is_left_never_waits(tmp_path: Path) -> None:
    waiting = on_disk(tmp_path)
    buffer, own = torch.arange(4.0), torch.ones(2)
    waiting.exempt([buffer[2:]])
    waiting.put_away(0, [buffer, own])
    assert torch.equal(buffer, torch.arange(4.0))
    assert own.untyped_storage().nbytes() == 0
    waiting.close()


def test_a_tensor_that_numpy_shares_stays_in_memory(tmp_path: Path) -> None:
    waiting = on_disk(tmp_path)
    array = torch.ones(4).numpy()
    shared = torch.from_numpy(array)
    waiting.put_away(0, [shared])
    assert array.tolist() == [1, 1, 1, 1]
    waiting.bring_back(0)
    assert shared.tolist() == [1, 1, 1, 1]


def test_a_disk_that_is_full_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def seek(self, _: int) -> None:
            pass

        def write(self, _: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("emp_llm.calibration.activations.TemporaryFile", lambda **_: Full())
    with pytest.raises(OutputError) as caught:
        on_disk(tmp_path).put_away(0, [torch.ones(300)])
    assert str(caught.value) == (
        f"{tmp_path}: 1,200 bytes of activations cannot be written: No space left on device; free "
        "some disk, or take fewer or shorter samples"
    )
