"""emp-llm: Effective Model Pruning (arXiv 2509.25606) for large language models.

Names are imported when they are first used, so that ``import emp_llm`` costs nothing. It also
has transformers know packed checkpoints, whichever of the two is imported first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from emp_llm.calibration.criteria import Criterion, register_criterion
    from emp_llm.calibration.options import CalibrationOptions
    from emp_llm.controls.comparison import compare
    from emp_llm.difference import diff
    from emp_llm.errors import (
        CheckpointError,
        EmpError,
        FormatError,
        HubError,
        OptionError,
        OutputError,
    )
    from emp_llm.evaluating import EvalOptions, evaluate
    from emp_llm.inspecting import inspect
    from emp_llm.integration.adapters import merge_adapter
    from emp_llm.integration.configs import EmpConfig
    from emp_llm.integration.saving import densify
    from emp_llm.integration.training import KeepSparsity, SparsityHold
    from emp_llm.options import PruneOptions
    from emp_llm.pruning import prune
    from emp_llm.pushing import push
    from emp_llm.rule import effective_number, keep_mask
    from emp_llm.unpacking import unpack
    from emp_llm.verification import verify

__all__ = [
    "CalibrationOptions",
    "CheckpointError",
    "Criterion",
    "EmpConfig",
    "EmpError",
    "EvalOptions",
    "FormatError",
    "HubError",
    "KeepSparsity",
    "OptionError",
    "OutputError",
    "PruneOptions",
    "SparsityHold",
    "compare",
    "densify",
    "diff",
    "effective_number",
    "evaluate",
    "inspect",
    "keep_mask",
    "merge_adapter",
    "prune",
    "push",
    "register_criterion",
    "unpack",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {
    "CalibrationOptions": "calibration.options",
    "Criterion": "calibration.criteria",
    "EmpConfig": "integration.configs",
    "EvalOptions": "evaluating",
    "KeepSparsity": "integration.training",
    "PruneOptions": "options",
    "SparsityHold": "integration.training",
    "compare": "controls.comparison",
    "densify": "integration.saving",
    "diff": "difference",
    "effective_number": "rule",
    "evaluate": "evaluating",
    "inspect": "inspecting",
    "keep_mask": "rule",
    "merge_adapter": "integration.adapters",
    "prune": "pruning",
    "push": "pushing",
    "register_criterion": "calibration.criteria",
    "unpack": "unpacking",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the name stands for)
    if name not in __all__:
        raise AttributeError(f"module 'emp_llm' has no attribute {name!r}")
    return getattr(import_module(f"emp_llm.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_post_import_hook(
    "emp_llm.integration.registration:register", "transformers.modeling_utils"
)
