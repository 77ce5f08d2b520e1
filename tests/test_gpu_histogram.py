"""Histograms made on a device count what plain counting does, for weights of any kind and size."""

import numpy as np
import pytest
import torch
from emp_kernels.device_workspace import DeviceWorkspace
from emp_kernels.devices import find_devices
from emp_kernels.gpu.histogram import count_equal_rows
from rows import NUMBER_FORMATS, make_rows

pytestmark = pytest.mark.interpreter

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)


@pytest.fixture
def workspace():
    return DeviceWorkspace(find_devices()[0])


def on_device(bits, workspace):
    """Bit patterns as a tensor of the workspace's device, in memory of their own."""
    signed = bits.view(np.int16 if bits.itemsize == 2 else np.int32)
    return torch.from_numpy(signed.copy()).to(workspace.device)


@formats
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33])
def test_weights_that_equal_a_key_are_counted_row_by_row(number_format, columns, workspace):
    bits = make_rows("ties", number_format, (5, columns))
    keys = bits & number_format.storage.type(number_format.key_mask)
    weights = on_device(bits, workspace)
    for key in {0, int(keys[0, 0]), int(keys.max()), number_format.key_mask}:
        with workspace.active():
            counts = count_equal_rows(weights, number_format, key, workspace, tile=16)
        assert counts.tolist() == [list(row).count(key) for row in keys]
