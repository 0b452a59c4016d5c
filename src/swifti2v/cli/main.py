"""The `swifti2v` command: its sub-commands, and the one place where errors become messages.

Exit codes: 0 done; 2 the input, the options or the machine do not allow it, with one line on standard error that says
what to change; 130 stopped by Ctrl-C or cancelled.

A module of this package imports torch, or anything that does, inside its command function, so that ``swifti2v --help``
answers at once (`tests/cli/test_main.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from swifti2v import __version__
from swifti2v.cli import data, jobs, serve, train, vbench
from swifti2v.cli.app import app as web_app
from swifti2v.cli.evaluate import evaluate
from swifti2v.cli.generate import generate, preview
from swifti2v.cli.plan import plan
from swifti2v.cli.refine import refine
from swifti2v.errors import GenerationCancelled, SwiftI2VError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class ReportingGroup(TyperGroup):
    """A group of commands that reports the errors of this package in one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raise `typer.Exit` with the code that its error stands for."""
        try:
            return super().invoke(ctx)
        except GenerationCancelled as error:
            report("cancelled", str(error))
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except SwiftI2VError as error:
            report("error", str(error))
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            report("interrupted", "stopped by Ctrl-C")
            raise typer.Exit(EXIT_INTERRUPTED) from error


def report(label: str, message: str) -> None:
    """Write ``label: message`` to standard error as one line."""
    typer.echo(f"{label}: {' '.join(message.split())}", err=True)


app = typer.Typer(
    cls=ReportingGroup,
    name="swifti2v",
    help="One image and a prompt in, a high-resolution video out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"swifti2v {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """One image and a prompt in, a high-resolution video out."""


# Commands, in the order in which --help lists them.
app.command()(generate)
app.command()(preview)
app.command()(refine)
app.command()(plan)
app.command()(evaluate)
app.add_typer(vbench.app, name="vbench")
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.command("app")(web_app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(serve.app, name="serve")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
