"""Options of the command line as the library takes them; contradictions are wrong usage."""

from collections.abc import Mapping
from typing import Any, TypedDict

import typer

from emp_llm.options import PRESETS, CalibrationOptions, Preset, PruneOptions

__all__ = ["BetaFields", "beta_options", "calibration_options", "preset_fields"]


class BetaFields(TypedDict, total=False):
    """Fields of PruneOptions; those that were not given are left out or None."""

    beta: float
    target_sparsity: float | None
    max_loss_increase: float | None


def beta_options(
    beta: str | float | None, target_sparsity: float | None, max_loss_increase: float | None
) -> BetaFields:
    """The options that say how many weights stay, as fields of PruneOptions.

    Raises:
        typer.BadParameter: If they contradict each other, or β is not a number.
    """
    if beta is not None and target_sparsity is not None:
        raise typer.BadParameter("finds β: leave --beta out", param_hint="--target-sparsity")
    if beta == "auto" and max_loss_increase is None:
        raise typer.BadParameter("auto goes with --max-loss-increase", param_hint="--beta")
    if beta != "auto" and max_loss_increase is not None:
        raise typer.BadParameter("goes with --beta auto only", param_hint="--max-loss-increase")
    found: BetaFields = {"target_sparsity": target_sparsity, "max_loss_increase": max_loss_increase}
    if beta is None or beta == "auto":
        return found
    try:
        return {**found, "beta": float(beta)}
    except ValueError as error:
        raise typer.BadParameter(
            f"{beta!r} is neither a number nor auto", param_hint="--beta"
        ) from error


def preset_fields(
    preset: Preset | None,
    single: Mapping[str, object],
    text: str | None,
    max_loss_increase: float | None,
) -> dict[str, Any]:
    """Fields of PruneOptions that a preset stands for, with single options in their place.

    Args:
        preset: The preset; None if it is not given.
        single: The options that a preset may set; None where they are not given.
        text: The data; None if it is not given. With it, but neither preset nor other options that
            use it, the preset is ``repaired``.
        max_loss_increase: Another use of the data.
    """
    given = {name: value for name, value in single.items() if value is not None}
    alone = text is not None and not given and max_loss_increase is None
    usual: Preset = "repaired" if alone else "paper"
    return {**PRESETS[preset or usual], **given}


def calibration_options(
    criterion: str,
    text: str | None,
    seed: int | None,
    *,
    sequential: bool,
    samples: int | None,
    length: int | None,
    device: str,
    trust_remote_code: bool,
) -> CalibrationOptions | None:
    """The options of a calibration; None if there is none.

    Args:
        criterion: How weights are ranked.
        text: The data; None if it is not given.
        seed: None if it is not given.
        sequential: Whether decoder blocks get the outputs of the pruned blocks before them.
        samples: None if it is not given.
        length: None if it is not given.
        device: Where the work is done.
        trust_remote_code: Whether code that comes with the tokenizer may be run.

    Raises:
        typer.BadParameter: If options of the data are given without data.
    """
    others = {"samples": samples, "length": length}
    given = {name: value for name, value in others.items() if value is not None}
    if text is None:
        asked = [*given, *([] if sequential else ["no-sequential"])]
        asked += ["trust-remote-code"] if trust_remote_code else []
        if criterion == PruneOptions.criterion and seed is not None:
            asked.append("seed")
        if asked:
            raise typer.BadParameter("goes with --calibration only", param_hint=f"--{asked[0]}")
        if seed is None:
            return None
    return CalibrationOptions(
        text=text,
        seed=seed or 0,
        sequential=sequential,
        device=device,
        trust_remote_code=trust_remote_code,
        **given,
    )
