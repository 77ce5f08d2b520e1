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

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from types import ModuleType

from emp_llm._version import __version__

__all__ = ["watch_imports"]

Take = Callable[[ModuleType], None]

_STEPS = {
    "transformers.configuration_utils": "wrap_configs",
    "transformers.quantizers.auto": "register_configs",
    "transformers.modeling_utils": "register_quantizers",
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
    unfinished = {}
    for name, step in _STEPS.items():
        if _is_unfinished(name):
            unfinished[name] = _taking(step)
        else:
            register_post_import_hook(_taking(step), name)
    if unfinished:
        sys.meta_path.insert(0, _Unfinished(unfinished))


def _taking(step: str) -> Take:
    def take(module: ModuleType) -> None:
        try:
            from emp_llm.integration import registration

            getattr(registration, step)(module)
        except Exception as error:
            _warn(error, "install versions that go together, by 'pip install --upgrade emp-llm'")

    return take


def _is_unfinished(name: str) -> bool:
    """Whether a module is being imported: it is known by its name, but not all of it is there."""
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


class _Unfinished(MetaPathFinder):
    """Waits for modules that were being imported when this was made.

    transformers may be the one that imports torch, and Python tells nobody when such a module is
    finished. But it asks this for every module that is looked for, and a model's own modules are
    looked for when transformers' are finished, whose classes they derive from.

    Args:
        waiting: What to do when each is imported, by its name.
    """

    def __init__(self, waiting: dict[str, Take]) -> None:
        self._waiting = waiting

    def find_spec(
        self, _name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> None:
        """Find nothing, but see which modules are finished."""
        for name in [name for name in self._waiting if not _is_unfinished(name)]:
            take = self._waiting.pop(name, None)
            if take is not None:  # no other thread was faster
                from wrapt import register_post_import_hook

                register_post_import_hook(take, name)


def _warn(error: Exception, remedy: str) -> None:
    found = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"emp-llm {__version__} cannot have transformers load packed models ({found}): {remedy}",
        stacklevel=2,
    )
