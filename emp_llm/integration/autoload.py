"""Has transformers know packed checkpoints, in programs that never import emp-llm too.

``import torch`` ends by calling what installed packages name in the entry point group
``torch.backends``, and whatever loads weights imports torch. So `watch_imports` is named there, in
``pyproject.toml``. All it does is to wait for transformers. torch means the group for backends,
which emp-llm is not, but every other way is worse:

* transformers and accelerate have no entry points.
* A ``.pth`` file with an import line runs in every program, even one without torch. Malware has
  used such lines, so scanners report them, and Python is going to ignore them (PEP 829).
* Commands of ours that run those of others would help a few programs, and nobody's scripts.

An entry point is part of a package's metadata: an editable install has it, and nothing of it is
left when the package is uninstalled. With ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` torch calls nobody;
then packed checkpoints are known after ``import emp_llm``, as they are where torch comes later.
"""

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

from emp_llm._version import __version__

__all__ = ["watch_imports"]

_STEPS = {
    "transformers.configuration_utils": "wrap_configs",
    "transformers.modeling_utils": "register",
}
"""What `emp_llm.integration.registration` does after each of these is imported."""


@cache
def watch_imports() -> None:
    """Register with transformers as soon as it is imported; now, if it has been.

    Nothing that fails here or later may end ``import torch`` or ``import transformers``, for most
    programs that import them load no packed checkpoint. It is a warning; transformers then refuses
    packed checkpoints, as it does without emp-llm.
    """
    try:
        from wrapt import register_post_import_hook
    except ImportError as error:
        _warn(error, "install emp-llm again")
        return
    for module, step in _STEPS.items():
        register_post_import_hook(_taking(step), module)


def _taking(step: str) -> Callable[[ModuleType], None]:
    def take(module: ModuleType) -> None:
        try:
            from emp_llm.integration import registration

            getattr(registration, step)(module)
        except Exception as error:
            _warn(error, "install versions that go together, by 'pip install --upgrade emp-llm'")

    return take


def _warn(error: Exception, remedy: str) -> None:
    found = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"emp-llm {__version__} cannot have transformers load packed models ({found}): {remedy}",
        stacklevel=2,
    )
