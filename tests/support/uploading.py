"""What tests of uploads ask."""

from pathlib import Path

import pytest

from emp_llm import EmpError, HubError, push

REPO = "me/model"

# huggingface_hub hands over files as httpx wanted it once
LEGACY_UPLOAD = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def refusal(folder: Path, kind: type[EmpError] = HubError, repo: str = REPO, **options) -> str:
    """The one line that push refuses with."""
    with pytest.raises(kind) as caught:
        push(folder, repo, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_card(content: dict[str, bytes]) -> dict[str, bytes]:
    """All but the model card, which names the repository where it is uploaded."""
    return {name: data for name, data in content.items() if name != "README.md"}
