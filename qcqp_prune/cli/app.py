"""The program: its options, its log, and what becomes of an error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from rich.logging import RichHandler

from qcqp_prune.cli import commands, comparison, jobs, proofs, sweeping
from qcqp_prune.cli.console import ERR, OUT
from qcqp_prune.errors import MissingDependencyError, QcqpPruneError
from qcqp_prune.storage import library_version

VERBOSE = ("--verbose", "-v")
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="qcqp-prune",
    help="Prune a PyTorch network to an exact resource budget, and prove what was done.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(jobs.demo)
app.command()(jobs.run)
app.command()(sweeping.sweep)
app.command()(commands.trace)
app.command()(commands.latency)
app.command()(commands.solve)
app.command()(proofs.certify)
app.command()(proofs.pareto)
app.command("compare")(comparison.compare_selections)
app.command()(commands.shrink)
app.command()(commands.report)
app.command()(commands.solvers)


def _show_version(value: bool) -> None:
    if value:
        OUT.print(f"qcqp-prune {library_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option(*VERBOSE, help="Show the log, and the traceback of an error. May stand anywhere.")
    ] = False,
) -> None:
    """Prune a PyTorch network to an exact resource budget, and prove what was done."""
    # Both are dealt with before this runs: --version by its callback, --verbose in main().


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and leave the interpreter.

    Exit codes: 0 done; 1 the job failed (no selection meets the budget, a check failed); 2 what was given is wrong (an
    option, a file, a name, a missing package); 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(word in VERBOSE for word in given)
    _start_log(verbose)
    try:
        app(args=[word for word in given if word not in VERBOSE], prog_name="qcqp-prune")
    except QcqpPruneError as error:
        _refuse(error, verbose, BAD_INPUT if isinstance(error, ValueError | ImportError) else FAILED)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        missing = MissingDependencyError("this command needs PyTorch: install it with `pip install torch`")
        _refuse(missing, verbose, BAD_INPUT)
    except OSError as error:
        _refuse(error, verbose, FAILED)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(INTERRUPTED)
    except SystemExit as left:
        if left.code == INTERRUPTED:  # the option parser catches Ctrl-C itself and says nothing
            _say_interrupted()
        raise
    sys.exit(0)


def _say_interrupted() -> None:
    ERR.print("interrupted: no file was left half-written", highlight=False)


def _start_log(verbose: bool) -> None:
    handler = RichHandler(console=ERR, show_path=False, rich_tracebacks=False)
    logger = logging.getLogger("qcqp_prune")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


def _refuse(error: BaseException, verbose: bool, code: int) -> NoReturn:
    """One message, with the traceback where it was asked for."""
    if verbose:
        raise error
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        message = (
            f"{error.filename}: {error.strerror}. Check the path, its permissions and the room on the disk"
        )
    ERR.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
