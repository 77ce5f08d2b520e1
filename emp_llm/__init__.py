"""emp-llm: Effective Model Pruning (arXiv 2509.25606) for large language models.

Names are imported when they are first used, so that ``import emp_llm`` costs nothing. It also
has transformers know packed checkpoints, whichever of the two is imported first. Where emp-llm is
installed, ``import torch`` does that as well: see `emp_llm.integration.autoload`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from emp_llm._version import __version__ as __version__
from emp_llm.integration.autoload import watch_imports

if TYPE_CHECKING:
    from emp_llm.calibration.criteria import Criterion
    from emp_llm.calibration.criterion_registry import register_criterion
    from emp_llm.entrypoints.compare import compare
    from emp_llm.entrypoints.compare_structures import compare_structures
    from emp_llm.entrypoints.diff import diff
    from emp_llm.entrypoints.evaluate import evaluate
    from emp_llm.entrypoints.generate import generate
    from emp_llm.entrypoints.inspect import inspect
    from emp_llm.entrypoints.pack import pack
    from emp_llm.entrypoints.prune import prune
    from emp_llm.entrypoints.push import push
    from emp_llm.entrypoints.shrink import shrink
    from emp_llm.entrypoints.structures import inspect_structures
    from emp_llm.entrypoints.unpack import unpack
    from emp_llm.entrypoints.verify import verify
    from emp_llm.errors import (
        CheckpointError,
        EmpError,
        FormatError,
        HubError,
        OptionError,
        OutputError,
    )
    from emp_llm.evaluation.options import EvalOptions
    from emp_llm.generation.options import GenerateOptions
    from emp_llm.integration.adapters import merge_adapter
    from emp_llm.integration.configs import EmpConfig
    from emp_llm.integration.saving import densify
    from emp_llm.integration.training import KeepSparsity, SparsityHold
    from emp_llm.options import CalibrationOptions, PruneOptions
    from emp_llm.rule import effective_number, keep_mask
    from emp_llm.shrink_options import ShrinkOptions
    from emp_llm.shrinking.expert_criteria import ExpertCriterion
    from emp_llm.shrinking.expert_criterion_registry import register_expert_criterion

__all__ = [
    "CalibrationOptions",
    "CheckpointError",
    "Criterion",
    "EmpConfig",
    "EmpError",
    "EvalOptions",
    "ExpertCriterion",
    "FormatError",
    "GenerateOptions",
    "HubError",
    "KeepSparsity",
    "OptionError",
    "OutputError",
    "PruneOptions",
    "ShrinkOptions",
    "SparsityHold",
    "compare",
    "compare_structures",
    "densify",
    "diff",
    "effective_number",
    "evaluate",
    "generate",
    "inspect",
    "inspect_structures",
    "keep_mask",
    "merge_adapter",
    "pack",
    "prune",
    "push",
    "register_criterion",
    "register_expert_criterion",
    "shrink",
    "unpack",
    "verify",
]

_HOMES = {
    "CalibrationOptions": "options",
    "Criterion": "calibration.criteria",
    "EmpConfig": "integration.configs",
    "EvalOptions": "evaluation.options",
    "ExpertCriterion": "shrinking.expert_criteria",
    "GenerateOptions": "generation.options",
    "KeepSparsity": "integration.training",
    "PruneOptions": "options",
    "ShrinkOptions": "shrink_options",
    "SparsityHold": "integration.training",
    "compare": "entrypoints.compare",
    "compare_structures": "entrypoints.compare_structures",
    "densify": "integration.saving",
    "diff": "entrypoints.diff",
    "effective_number": "rule",
    "evaluate": "entrypoints.evaluate",
    "generate": "entrypoints.generate",
    "inspect": "entrypoints.inspect",
    "inspect_structures": "entrypoints.structures",
    "keep_mask": "rule",
    "merge_adapter": "integration.adapters",
    "pack": "entrypoints.pack",
    "prune": "entrypoints.prune",
    "push": "entrypoints.push",
    "register_criterion": "calibration.criterion_registry",
    "register_expert_criterion": "shrinking.expert_criterion_registry",
    "shrink": "entrypoints.shrink",
    "unpack": "entrypoints.unpack",
    "verify": "entrypoints.verify",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'emp_llm' has no attribute {name!r}")
    found: object = getattr(import_module(f"emp_llm.{_HOMES.get(name, 'errors')}"), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


watch_imports()
