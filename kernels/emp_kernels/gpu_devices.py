"""Which GPUs Triton's kernels can run on, and why there are none.

With ``TRITON_INTERPRET=1`` Triton's interpreter runs the kernels on the CPU, slowly: so they are
tested where there is no GPU.
"""

import torch

from emp_kernels.errors import NoDeviceError

__all__ = ["find_devices", "interpreted", "visible_gpus"]

_LEAST_CAPABILITY = (8, 0)
"""Ampere: the oldest GPUs that the tests compile the kernels for."""

_LEAST_TRITON = (3, 4)
"""The kernels use `tl.histogram` with a mask, which is new in 3.4."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU.

    Raises:
        NoDeviceError: If Triton is not installed, or too old.
    """
    try:
        import triton
    except ImportError as error:
        raise NoDeviceError(
            "the kernels for GPUs need Triton, which is not installed (pip install triton)"
        ) from error
    if tuple(map(int, triton.__version__.split(".")[:2])) < _LEAST_TRITON:
        raise NoDeviceError(
            "the kernels for GPUs need Triton 3.4, which comes with torch 2.8; this is Triton "
            f"{triton.__version__}"
        )
    return bool(triton.knobs.runtime.interpret)


def find_devices(asked: str = "cuda") -> list[torch.device]:
    """The devices that a user asked for.

    Args:
        asked: ``cuda`` (all GPUs that this process sees) or ``cuda:N``.

    Returns:
        At least one; the CPU where Triton's interpreter stands in for a GPU.

    Raises:
        NoDeviceError: If there is none, or the kernels cannot run on it.
    """
    try:
        if interpreted():
            return [torch.device("cpu")]
    except NoDeviceError:
        visible_gpus(asked)  # what torch lacks is reported first: Triton alone would not help
        raise
    devices = visible_gpus(asked)
    if torch.version.cuda is None:
        raise NoDeviceError(f"torch {torch.__version__} is not built for CUDA, as the kernels are")
    for device in devices:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise NoDeviceError(
                f"{device} is a {name} of compute capability {capability[0]}.{capability[1]}; the "
                f"kernels need {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} or more"
            )
    return devices


def visible_gpus(asked: str = "cuda") -> list[torch.device]:
    """The GPUs that a user asked for, whatever is to run on them; needs no Triton.

    Args:
        asked: As for `find_devices`.

    Returns:
        At least one.

    Raises:
        NoDeviceError: If torch finds no such GPU, or cannot use it.
    """
    version = torch.__version__
    count = torch.cuda.device_count()
    if not count:
        raise NoDeviceError(
            f"torch {version} finds no GPU, or no driver of one"
            if torch.version.cuda
            else f"torch {version} is built without CUDA"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # GPUs are counted even where their driver is too old for torch
        reason = str(error).partition("\n")[0]
        raise NoDeviceError(f"torch {version} cannot use the GPU ({reason})") from error
    _, colon, number = asked.partition(":")
    if not colon:
        return [torch.device("cuda", n) for n in range(count)]
    if not number.isdecimal() or int(number) >= count:
        raise NoDeviceError(f"torch {version} sees no more than {count} GPUs, from cuda:0 on")
    return [torch.device("cuda", int(number))]
