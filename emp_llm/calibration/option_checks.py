"""Which options can be combined, where scores come from data or β is searched for."""

from emp_llm.errors import OptionError
from emp_llm.options import CalibrationOptions, PruneOptions, counts_magnitudes

__all__ = ["check_options"]

_WITHOUT_SEQUENTIAL = "give --no-sequential (sequential=False)"


def check_options(options: PruneOptions) -> None:
    """Refuse options that cannot be combined, before any work is done.

    For the criterion magnitude, nothing has to be imported for it.

    Raises:
        OptionError: If the criterion or the device does not exist; if data is needed and not given,
            or given and not needed; if all scores are needed before the first mask, and are not
            known by then; or if how many weights stay cannot be allocated as asked.
    """
    if options.allocate != "emp":
        _check_allocation(options)
    user = _user_of_data(options)
    calibration = options.calibration
    text = calibration.text if calibration is not None else None
    if user is not None and text is None:
        raise OptionError(
            f"{user} needs data: give a text to calibrate on (--calibration), such as wikitext2 or "
            "a file"
        )
    if user is None and text is not None:
        raise OptionError(
            f"calibration {text!r} would not be used: criterion {options.criterion!r} without "
            "repair or recovery needs no data; leave it out, or give --repair obs as well"
        )
    if calibration is not None and user is not None:
        _check_all_known(options, calibration)
        _check_swaps(options)
        from emp_llm.runtime.device_choice import check_device

        check_device(calibration.device)


def _user_of_data(options: PruneOptions) -> str | None:
    """What needs data, as errors say it; None if nothing does."""
    if options.criterion != "magnitude" and _needs(options.criterion):
        return f"criterion {options.criterion!r}"
    if options.repair != "none":
        return f"repair {options.repair!r}"
    if options.recover:
        return "recover"
    if options.allocate == "loss":
        return "allocate 'loss'"
    if options.max_loss_increase is not None:
        return "max_loss_increase, for which β is searched,"
    return None


def _check_allocation(options: PruneOptions) -> None:
    """Refuse what has no total that is known ahead, or nothing to spread it over."""
    asked = f"allocate {options.allocate!r}"
    if options.granularity == "model":
        raise OptionError(
            f"{asked} spreads weights over groups, and granularity 'model' has one group: choose "
            "granularity 'row' or 'layer'"
        )
    if options.max_loss_increase is not None:
        raise OptionError(
            f"{asked} spreads a number of weights, which a search by max_loss_increase does not "
            "know yet: give a β or a target sparsity"
        )
    if not counts_magnitudes(options):
        raise OptionError(
            f"{asked} spreads as many weights as the effective numbers of all groups give, but "
            f"those of criterion {options.criterion!r} are not known ahead: give --count-by "
            "magnitude"
        )
    if options.allocate == "loss" and "gradient" in _needs(options.criterion):
        raise OptionError(
            f"{asked} predicts the loss from inputs of layers, and criterion "
            f"{options.criterion!r} needs gradients: choose another criterion, such as obs"
        )


def _needs(criterion: str) -> frozenset[str]:
    from emp_llm.calibration.criterion_registry import find_criterion

    return frozenset(find_criterion(criterion).needs)


def _check_all_known(options: PruneOptions, calibration: CalibrationOptions) -> None:
    """Refuse what needs all scores first, where they depend on decoder blocks pruned before."""
    if not calibration.sequential or options.criterion == "magnitude":
        return
    needs = _needs(options.criterion)
    # gradients are those of the dense model, known before any decoder block is pruned
    if not needs or "gradient" in needs:
        return
    if options.granularity == "model":
        raise OptionError(
            f"granularity 'model' ranks the scores of all decoder blocks together, but those of "
            f"criterion {options.criterion!r} depend on the blocks that were pruned before: "
            f"{_WITHOUT_SEQUENTIAL}, or choose granularity 'row' or 'layer'"
        )
    if options.target_sparsity is not None and not counts_magnitudes(options):
        raise OptionError(
            f"target_sparsity needs the scores of all decoder blocks to find β, but those of "
            f"criterion {options.criterion!r} depend on the blocks that were pruned before: "
            f"{_WITHOUT_SEQUENTIAL}, or --count-by magnitude, which the weights alone decide"
        )


def _check_swaps(options: PruneOptions) -> None:
    """Refuse to swap weights whose scores are not known any more when they are repaired."""
    if options.repair != "swaps":
        return
    if options.granularity == "model":
        together = "granularity 'model'"
    elif "gradient" in _needs(options.criterion):
        together = f"criterion {options.criterion!r}"
    elif options.target_sparsity is not None and not counts_magnitudes(options):
        together = "target_sparsity"
    else:
        return
    raise OptionError(
        f"repair 'swaps' changes masks decoder block by decoder block, but {together} needs all of "
        "them before the first repair: choose --repair obs"
        + ("" if together != "target_sparsity" else ", or give --count-by magnitude")
    )
