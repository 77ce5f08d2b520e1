"""The settings of a comparison: as its results tell them, and as they decide whether to go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp_llm.comparison.saved import content_of
from emp_llm.errors import OptionError
from emp_llm.evaluation.model_loading import check_dtype
from emp_llm.messages import encodable
from emp_llm.options import CalibrationOptions
from emp_llm.runtime.device_choice import check_device
from emp_llm.texts.texts import Text, read_text

__all__ = ["check_runs", "depends_on", "described"]


def check_runs(
    seed: int, random_runs: int, dtype: str, calibration: CalibrationOptions | None
) -> None:
    """Check what all comparisons are asked for; a calibration's text is read, hours ahead.

    Raises:
        OptionError: If a number is negative, torch has no such dtype, the calibration has no text,
            or there is none of its name, or the machine has no device of that name.
    """
    for name, number in (("seed", seed), ("random_runs", random_runs)):
        if number < 0:
            raise OptionError(f"{name} is {number}; give 0 or more")
    check_dtype(dtype)
    if calibration is not None:
        if calibration.text is None:
            raise OptionError("calibration has no text; give one, such as wikitext2 or a file")
        check_device(calibration.device)
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
