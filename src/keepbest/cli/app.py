"""The commands and their options."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer

from keepbest import __version__
from keepbest.average import average
from keepbest.cli.console import say
from keepbest.cli.exit_status import run_command
from keepbest.cli.launch_script import print_launch_script
from keepbest.cli.numbers import parse_numbers, parse_top
from keepbest.cli.pictures import plot, report
from keepbest.cli.table import print_checkpoints, print_history, print_history_json, print_json
from keepbest.cli.tolerance import print_tolerances
from keepbest.cli.work import evaluate, train
from keepbest.errors import KeepBestError
from keepbest.export import export
from keepbest.ranks import LONGEST_TIMEOUT
from keepbest.remote.storage import local_path
from keepbest.remote.upload import upload
from keepbest.remote.verify import verify_run
from keepbest.run.maintenance import repair
from keepbest.run.verify import Fault, verify

app = typer.Typer(
    help="Train, and keep the best checkpoints. Start train and eval with torchrun or srun to use several processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _refuse_nan(seconds: float) -> float:
    if math.isnan(seconds):  # which older versions of click take for a number between any two others
        raise typer.BadParameter("nan is no number of seconds")
    return seconds


Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run, or the URL of its remote copy.")]
LocalRun = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  # typer reads this on Python 3.10
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the file: trainer.epochs=3"),
]
Timeout = Annotated[
    float,
    typer.Option(
        min=1.0,
        max=LONGEST_TIMEOUT,
        callback=_refuse_nan,
        help="Seconds that a rank waits for the others in a collective of torch's own.",
    ),
]
Destination = Annotated[
    str, typer.Option("--to", help="File that ends in .pt, .pth or .safetensors, or a folder for safetensors files.")
]
OnePart = Annotated[
    Optional[str],  # noqa: UP045  # as above
    typer.Option(help="Submodel to write alone, with keys of its own."),
]
Only = Annotated[
    Optional[list[str]],  # noqa: UP045  # as above
    typer.Option(help="Dotted path of what is written, such as encoder.layers.0; may be repeated."),
]


def _print_version(asked: bool) -> None:
    if asked:
        say(f"keepbest {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001  # its callback prints it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""
    context.obj = debug


@app.command("train")
def train_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")],
    overrides: Overrides = None,
    timeout: Timeout = 600.0,
) -> None:
    """Train as CONFIG says, and show the checkpoints that were kept.

    The exit status is 75 if a signal (SIGTERM, SIGUSR1, SIGINT) ended training early. Start it again with
    trainer.resume=auto to continue.
    """
    run_command(lambda: train(local_path(config), overrides or []), timeout=timeout, debug=context.obj)


@app.command("eval")
def eval_command(
    context: typer.Context,
    run: LocalRun,
    overrides: Overrides = None,
    ref: Annotated[
        Optional[str],  # noqa: UP045  # as above
        typer.Option(help="Name of the checkpoint. The default is the best of a run that monitors one metric."),
    ] = None,
    config: Annotated[
        Optional[str],  # noqa: UP045  # as above
        typer.Option(help="YAML file to use in the place of the config.yaml of RUN, whose classes would be run."),
    ] = None,
    timeout: Timeout = 600.0,
) -> None:
    """Evaluate a checkpoint of RUN with the callbacks of its config, and print the metrics.

    This runs the classes and functions that the config names. Of a run that you do not trust, pass --config.
    """

    def evaluate_run() -> None:
        evaluate(local_path(run, "run"), ref, overrides or [], config=None if config is None else local_path(config))

    run_command(evaluate_run, timeout=timeout, debug=context.obj)


@app.command("show")
def show_command(
    context: typer.Context,
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Show every observation instead.")] = False,
) -> None:
    """Show the checkpoints that RUN keeps. Of a folder of runs, show them, the best first."""
    tables = {
        (False, False): print_checkpoints,
        (False, True): print_json,
        (True, False): print_history,
        (True, True): print_history_json,
    }
    run_command(lambda: tables[history, as_json](run), debug=context.obj)


@app.command("plot")
def plot_command(
    context: typer.Context,
    run: Run,
    to: Annotated[str, typer.Option("--output", "-o", help="The picture, .png or .svg.")],
) -> None:
    """Draw each metric of RUN over its iterations: every new best, what each tolerance kept, and restarts."""
    run_command(lambda: _say_written([plot(run, local_path(to, "--output"))]), debug=context.obj)


@app.command("report")
def report_command(
    context: typer.Context,
    run: Run,
    to: Annotated[str, typer.Option("--output", "-o", help="The report, an HTML file.")],
) -> None:
    """Write a report on RUN for the browser: the picture of plot, and the table of show, in one file."""
    run_command(lambda: _say_written([report(run, local_path(to, "--output"))]), debug=context.obj)


@app.command("tolerance")
def tolerance_command(
    context: typer.Context,
    run: Run,
    tolerances: Annotated[str, typer.Argument(metavar="TOLERANCES", help="Like 0..20, or 1,2,5.")] = "0..20",
) -> None:
    """Show what any tolerance would have kept in RUN, and whether its weights are there."""
    run_command(lambda: print_tolerances(run, parse_numbers(tolerances, "tolerances")), debug=context.obj)


@app.command("verify")
def verify_command(context: typer.Context, run: Run) -> None:
    """Compare every file that RUN needs with what was written, and its refs with the ledger.

    It prints a line for each fault. The exit status is 1 if there is one. Damage is permanent. Unfinished work is left
    from a crash, and the next resume, or repair, finishes or removes it.
    """

    def check() -> None:
        faults = verify_run(run)
        for fault in faults:
            say(f"{fault.kind}: {fault.message}")
        say(f"{run}: {len(faults)} faults" if faults else f"{run}: everything is as the ledger says")
        _say_what_to_do(faults)
        if faults:
            raise typer.Exit(1)

    run_command(check, debug=context.obj)


@app.command("export")
def export_command(
    context: typer.Context,
    run: Run,
    ref: Annotated[str, typer.Argument(metavar="REF", help="Name of the checkpoint, as show prints it.")],
    to: Destination,
    part: OnePart = None,
    only: Only = None,
) -> None:
    """Write a checkpoint of RUN, of any format, to a file or a folder that others read, with little memory."""
    run_command(lambda: _say_written(export(run, ref, to, part=part, only=only or None)), debug=context.obj)


@app.command("average")
def average_command(
    context: typer.Context,
    run: Run,
    which: Annotated[
        str,
        typer.Argument(metavar="[NAME.]top=PLACES", help="Places among the best, like top=1..5, and whose best."),
    ],
    to: Destination,
    part: OnePart = None,
    only: Only = None,
) -> None:
    """Write the average of the best checkpoints of RUN, which keep_top_k keeps, to a file or a folder."""

    def write() -> None:
        keeper, places = parse_top(which)
        _say_written(average(run, to, top=places, keeper=keeper, part=part, only=only or None))

    run_command(write, debug=context.obj)


@app.command("repair")
def repair_command(context: typer.Context, run: LocalRun) -> None:
    """Finish or undo what a crash left in RUN. Weights that a ref needs are never removed."""

    def repair_and_report() -> None:
        directory = local_path(run, "run")
        before = verify(directory)
        repair(directory)
        after = verify(directory)
        for fault in before:
            say(f"{'left' if fault in after else 'repaired'}: {fault.message}")
        say(f"{run}: {len(before) - len(after)} repaired, {len(after)} left")
        _say_what_to_do(after)
        if after:
            raise typer.Exit(1)

    run_command(repair_and_report, debug=context.obj)


@app.command("upload")
def upload_command(
    context: typer.Context,
    run: LocalRun,
    to: Annotated[str, typer.Argument(metavar="URL", help="URL of the remote copy of the run.")],
) -> None:
    """Upload what RUN keeps to its remote copy, if the storage could not be reached during training."""

    def upload_run() -> None:
        try:
            upload(local_path(run, "run"), to)
        except OSError as error:
            raise KeepBestError(str(error)) from error
        say(f"{to}: everything that {run} keeps is there")

    run_command(upload_run, debug=context.obj)


def _say_what_to_do(faults: Iterable[Fault]) -> None:
    kinds = {fault.kind for fault in faults}
    if "unfinished" in kinds:
        say("What is unfinished is finished, or removed, by the next resume, and by: python -m keepbest repair")
    if "damage" in kinds:
        say("Damage stays. Load what is damaged from a copy of the run, such as its remote one, and all else from here")


def _say_written(paths: Iterable[Path]) -> None:
    for path in paths:
        say(f"{path}: {path.stat().st_size:,} bytes")


@app.command("launch-script")
def launch_script_command(
    context: typer.Context,
    name: Annotated[
        Optional[str],  # noqa: UP045  # as above
        typer.Argument(metavar="NAME", help="Name of the script; without one, every script is listed."),
    ] = None,
) -> None:
    """Print a script that starts training with torchrun or SLURM, to be edited at its top."""
    run_command(lambda: print_launch_script(name), debug=context.obj)
