"""The settings of a comparison: as its results tell them, and as they decide whether to go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp_llm.comparison.saved import content_of
from emp_llm.errors import OptionError
from emp_llm.messages import encodable
from emp_llm.options import CalibrationOptions
from emp_llm.texts.texts import Text, read_text

__all__ = ["check_calibration", "depends_on", "described"]


def check_calibration(calibration: CalibrationOptions | None) -> None:
    """Read the text of a calibration, hours before it is needed.

    Raises:
        OptionError: If it has none, or there is no such text.
    """
    if calibration is not None:
        if calibration.text is None:
            raise OptionError("calibration has no text; give one, such as wikitext2 or a file")
        _text(calibration)


def described(calibration: CalibrationOptions | None) -> dict[str, Any]:
    """The data as settings for JSON; none where there is none."""
    if calibration is None:
        return {}
    names = ("samples", "length", "seed", "sequential")
    fields = {name: getattr(calibration, name) for name in names}
    return {"calibration": {"text": encodable(Path(str(calibration.text)).name), **fields}}


def depends_on(
    settings: Mapping[str, Any],
    text: str | Text,
    calibration: CalibrationOptions | None,
    device: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The options that results depend on, with checksums of the texts."""
    flat = {name: value for name, value in settings.items() if name != "calibration"}
    flat |= {f"calibration {name}": of for name, of in settings.get("calibration", {}).items()}
    if calibration is not None:
        flat["content of the calibration text"] = content_of(_text(calibration))
    return flat | {
        "content of the text": content_of(text if isinstance(text, str) else text.text),
        "device": device,
        "trust_remote_code": trust_remote_code,
    }


def _text(calibration: CalibrationOptions) -> str:
    return read_text(str(calibration.text), protocol="paper", part="train").text
