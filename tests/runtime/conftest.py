"""A machine with GPUs."""

from collections.abc import Callable

import pytest
from support.gpus import Find

from emp_llm.runtime import device_choice, device_trial


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Find], None]:
    """Has the driver see a GPU, Triton compile for it, and a function find the devices, empty."""

    def has(find: Find) -> None:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (80 << 30, 80 << 30))
        monkeypatch.setattr(device_choice, "_driver_has_gpu", lambda: True)
        monkeypatch.setattr("emp_kernels.gpu_devices.interpreted", lambda: False)
        monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", find)
        monkeypatch.setattr(device_trial, "pack_rows", lambda *_, **__: None)

    return has
