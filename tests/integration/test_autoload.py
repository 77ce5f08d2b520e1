"""emp-llm waits for transformers, and what fails then ends no other program."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import wrapt
from transformers import modeling_utils
from transformers.quantizers import auto

from emp_llm.integration import registration
from emp_llm.integration.autoload import watch_imports

Hook = Callable[[ModuleType], None]


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Hook]:
    """What is called after a module is imported, by its name, in a process that begins."""
    found: dict[str, Hook] = {}
    monkeypatch.setattr(
        wrapt, "register_post_import_hook", lambda hook, name: found.update({name: hook})
    )
    watch_imports.__wrapped__()
    return found


def test_a_registration_that_fails_is_a_warning_that_says_why_and_what_to_do(
    hooks: dict[str, Hook], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: ModuleType) -> None:
        raise AttributeError("no save_pretrained")

    monkeypatch.setattr(registration, "register_quantizers", fail)
    with pytest.warns(UserWarning, match="no save_pretrained.*pip install --upgrade emp-llm"):
        hooks["transformers.modeling_utils"](modeling_utils)


def test_without_the_package_that_waits_for_imports_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wrapt", None)
    with pytest.warns(UserWarning, match="wrapt.*install emp-llm again"):
        watch_imports.__wrapped__()


def test_a_module_that_imports_torch_itself_is_taken_when_it_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "transformers.configuration_utils"
    unfinished = importlib.util.module_from_spec(ModuleSpec(name, None))
    unfinished.__spec__._initializing = True  # as long as Python runs it
    monkeypatch.setitem(sys.modules, name, unfinished)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    taken: list[ModuleType] = []
    monkeypatch.setattr(registration, "wrap_configs", taken.append)
    monkeypatch.setattr(registration, "register_configs", lambda _: None)
    monkeypatch.setattr(registration, "register_quantizers", lambda _: None)
    watch_imports.__wrapped__()
    assert importlib.util.find_spec("no_such_module") is None
    assert taken == []
    unfinished.__spec__._initializing = False
    for _ in range(2):
        assert importlib.util.find_spec("no_such_module") is None
        assert taken == [unfinished]


def test_a_transformers_that_could_not_save_packed_models_loads_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", {})
    with pytest.raises(AttributeError):
        registration.register_quantizers(SimpleNamespace(PreTrainedModel=object))
    assert auto.AUTO_QUANTIZER_MAPPING == {}
