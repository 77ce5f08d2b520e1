"""``emp-llm prune``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import (
    AllocateOption,
    Base,
    BetaOrAuto,
    Calibration,
    CountByOption,
    Criterion,
    DiscardSource,
    GranularityOption,
    Ignore,
    Json,
    KernelDevice,
    Length,
    MaxLossIncrease,
    Model,
    NoSequential,
    Out,
    Overwrite,
    PresetOption,
    Private,
    Recover,
    RepairOption,
    RestOption,
    Revision,
    Samples,
    Seed,
    Targets,
    TargetSparsity,
    Threads,
    TrustTokenizerCode,
)
from emp_cli.console import Clock, command, leads_team, print_json, shown_progress
from emp_cli.option_parsing import beta_options, calibration_options, preset_fields
from emp_cli.push import send, show_sent
from emp_llm.hub.address import read_address
from emp_llm.options import OutputFormat, PruneOptions

if TYPE_CHECKING:
    from emp_llm.report.fields import Report

__all__ = ["prune"]


@command
def prune(
    model: Model,
    out: Out,
    beta: BetaOrAuto = None,
    target_sparsity: TargetSparsity = None,
    max_loss_increase: MaxLossIncrease = None,
    granularity: GranularityOption = "row",
    allocate: AllocateOption = "emp",
    count_by: CountByOption = None,
    preset: PresetOption = None,
    criterion: Criterion = None,
    repair: RepairOption = None,
    recover: Recover = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    no_sequential: NoSequential = False,
    trust_remote_code: TrustTokenizerCode = False,
    targets: Targets = "mlp",
    ignore: Ignore = None,
    output_format: Annotated[
        OutputFormat,
        typer.Option(
            "--format",
            metavar="packed|dense",
            help="A smaller checkpoint, or an ordinary one with zeros in it.",
        ),
    ] = "packed",
    rest: RestOption = "packed",
    base: Base = None,
    revision: Revision = None,
    discard_source: DiscardSource = False,
    overwrite: Overwrite = False,
    device: KernelDevice = "auto",
    threads: Threads = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Upload the result to USER/NAME on the Hub, as push does.",
        ),
    ] = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint and write the result, smaller.

    If a run is interrupted or killed, the same command resumes it. Several
    processes share the work if torchrun, accelerate launch or srun starts them.
    """
    if private and push_to_hub is None:
        raise typer.BadParameter("goes with --push-to-hub only", param_hint="--private")
    branch = None
    if push_to_hub is not None:
        push_to_hub, branch = read_address(push_to_hub)
        if push_to_hub == read_address(model)[0]:
            raise typer.BadParameter("is the model that is pruned", param_hint="--push-to-hub")
    clock = Clock()
    single = {"criterion": criterion, "count_by": count_by, "repair": repair, "recover": recover}
    options = PruneOptions(
        **preset_fields(preset, single, calibration, max_loss_increase),
        granularity=granularity,
        allocate=allocate,
        targets=targets,
        ignore=tuple(ignore or ()),
        output_format=output_format,
        rest=rest,
        calibration=calibration_options(
            criterion or PruneOptions.criterion,
            calibration,
            seed,
            sequential=not no_sequential,
            samples=samples,
            length=length,
            device=device,
            trust_remote_code=trust_remote_code,
        ),
        **beta_options(beta, target_sparsity, max_loss_increase),
    )
    leads = leads_team()
    if push_to_hub is not None:
        # before the work begins, so that a missing token does not show only at its end
        push_to_hub = _open_repository(push_to_hub, branch, device, private=private)
    import emp_llm

    with shown_progress(leads) as progress:
        report = emp_llm.prune(
            model,
            out,
            options,
            base=base,
            revision=revision,
            discard_source=discard_source,
            overwrite=overwrite,
            device=device,
            threads=threads,
            progress=progress,
            distributed=True,
        )
    if not leads:  # the first process reports what all have done
        return
    written = clock.to_dict()
    if as_json:
        from emp_llm.report.totals import kinds

        summary = {name: part for name, part in report.items() if name != "tensors"}
        content = {"out": str(out)} | summary | {"kinds": kinds(report)} | written
        if push_to_hub is not None:
            content["pushed"] = send(out, push_to_hub, private=private, revision=branch)
        print_json(content)
        return
    _show(report, model, out, clock)
    if push_to_hub is not None:
        show_sent(send(out, push_to_hub, private=private, revision=branch))


def _show(report: "Report", model: str, out: Path, clock: Clock) -> None:
    from emp_cli.tables import (
        bytes_before,
        cost_lines,
        file_lines,
        found_lines,
        pruned_kinds,
        search_table,
        totals_line,
        written_line,
    )

    pruned_kinds(report)
    search_table(report)
    beside = file_lines(report.get("carried"), report.get("left_behind"))
    for line in (*found_lines(report), *beside):
        typer.echo(line)
    typer.echo(totals_line(report))
    typer.echo(written_line(out, bytes_before(report), clock.seconds, clock.peak_bytes))
    for line in cost_lines(report, model, out):
        typer.echo(line)


def _open_repository(repo: str, branch: str | None, device: str, *, private: bool) -> str:
    """Have the first process open or create the repository; if it fails, all processes fail.

    The device is looked for first: no repository is created for a run that cannot begin.
    """
    from emp_llm.hub.destination import open_destination
    from emp_llm.runtime.device_choice import find_gpus
    from emp_llm.runtime.launcher import meeting_of
    from emp_llm.runtime.ranks import join_team

    with join_team(meeting_of(os.environ)) as team:
        find_gpus(device)
        return team.share(
            lambda: open_destination(repo, private=private or None, revision=branch).repo_id
        )
