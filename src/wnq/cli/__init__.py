"""The command line: one command for each verb of the library, and no logic of its own.

Results go to stdout, as tables or, with ``--json``, as one JSON document and nothing else. Progress, notes and errors go
to stderr; bars only to a terminal. ``NO_COLOR`` is respected.

Exit codes:

- 0: done.
- 1: it could not be done: a file is missing, damaged or cannot be written, an extra is not installed, training diverged.
- 2: what was typed is wrong: an unknown command, option, method, model or key, or a value out of range, on the command
  line or in the recipe or plan that it names.
- 130: Ctrl-C.

The rule between 1 and 2: every command first reads what was typed, then works. A ``ValueError`` or ``TypeError`` while it
reads is 2. An unreadable file and an ``OSError`` are 1 at any time, and so is every other error once the work has begun.
A mistake gives one sentence, ``wnq: error: …``; an error nobody foresaw gives one too, and ``--debug`` adds the traceback.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from wnq.cli import bench, compare, demo, evidence, export, files, planning, sensitivity, settle, training

app = typer.Typer(
    name="wnq",
    help="Any PyTorch model at 1 to 8 bits, by weight-normalization based quantization (arXiv:1907.00593).",
    epilog="\b\nExamples:\n  wnq demo --out demo\n  wnq COMMAND --help",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for register in (
    demo.register,
    planning.register,
    training.register,
    compare.register,
    settle.register,
    sensitivity.register,
    evidence.register,
    files.register,
    export.register,
    bench.register,
):
    register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"wnq {version('wnq')}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: what was typed after ``wnq``; by default the process's own arguments.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=arguments, prog_name="wnq", standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        # typer brings a click of its own in some versions, so its errors are told by what they can do.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        if text := explain():
            typer.echo(f"wnq: error: {text}", err=True)
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)
