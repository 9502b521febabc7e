"""What all commands share: their common options, their examples, and what becomes of errors."""

import contextlib
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any, Concatenate, NoReturn, ParamSpec

import typer

from wnq.cli.screen import NotesHandler, Screen, is_main_process, strict

P = ParamSpec("P")

Json = dict[str, Any] | list[Any]

FAILURE, USAGE, INTERRUPTED = 1, 2, 130

COMMON: dict[str, Any] = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")],
    "seed": Annotated[int | None, typer.Option("--seed", help="Of everything random.", show_default=False)],
    "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
}
_DEFAULTS: dict[str, Any] = {"as_json": False, "seed": None, "debug": False}


class FailureError(Exception):
    """A failure, whenever it is met: what was typed is well formed, but the file or device that it names is not there."""


class StoppedError(Exception):
    """Ctrl-C was answered in an orderly way; the message says how to go on."""


def command(
    app: typer.Typer, *examples: str
) -> Callable[[Callable[Concatenate[Screen, P], Json]], Callable[Concatenate[Screen, P], Json]]:
    """Make a function a command of ``app``, with the options that all have.

    Args:
        app: the program.
        examples: command lines for the help.

    Returns:
        A decorator. The function takes a :class:`Screen` first; its other parameters are the command's own. It draws on
        the screen and returns the same as JSON types.
    """

    def decorate(verb: Callable[Concatenate[Screen, P], Json]) -> Callable[Concatenate[Screen, P], Json]:
        def run(**options: Any) -> None:
            as_json, seed, debug = (options.pop(name) for name in COMMON)
            screen = Screen(json_only=as_json, seed=seed)
            try:
                with _logging_to(screen):
                    if seed is not None:
                        _seed(seed)
                    result = verb(screen, **options)  # pyright: ignore[reportCallIssue]
                if as_json and is_main_process():
                    sys.stdout.write(json.dumps(strict(result), indent=2, allow_nan=False) + "\n")
                    sys.stdout.flush()
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                _explain(error, screen, debug)

        own = list(inspect.signature(verb).parameters.values())[1:]
        common = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=hint)
            for name, hint in COMMON.items()
        ]
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__doc__ = verb.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword, *common]}
        vars(run)["__signature__"] = inspect.Signature([*keyword, *common])
        heading = "Example:" if len(examples) == 1 else "Examples:"
        lines = "\n".join(f"  {example}" for example in examples)
        app.command(verb.__name__, epilog=f"\b\n{heading}\n{lines}")(run)
        return verb

    return decorate


@contextlib.contextmanager
def _logging_to(screen: Screen) -> Generator[None]:
    """Show the library's log on a screen while the block runs."""
    logger, handler = logging.getLogger("wnq"), NotesHandler(screen)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _seed(seed: int) -> None:
    import torch

    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {seed}.")
    torch.manual_seed(seed)


def _explain(error: BaseException, screen: Screen, debug: bool) -> NoReturn:
    """Print one sentence on stderr and exit with the code that the package's docstring promises."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        # The reader of stdout is gone (wnq … | head); nothing is left to be told, and closing must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILURE)
    if isinstance(error, StoppedError | KeyboardInterrupt):
        screen.note(f"wnq: {error if isinstance(error, StoppedError) else 'interrupted'}")
        raise typer.Exit(INTERRUPTED)
    code = USAGE if _is_mistake(error) and not screen.working else FAILURE
    if _is_known(error):
        screen.note(f"wnq: error: {sentence(error)}")
    else:
        hint = "" if debug else " Run the same command with --debug to see where."
        screen.note(f"wnq: error: unexpected {type(error).__name__}: {sentence(error)}.{hint}")
    raise typer.Exit(code)


def _is_mistake(error: BaseException) -> bool:
    from wnq.artifact.container import ArtifactError

    return isinstance(error, ValueError | TypeError) and not isinstance(error, ArtifactError)


def _is_known(error: BaseException) -> bool:
    from wnq.train import OutOfMemoryError, ProcessLostError, TrainingDivergedError

    of_training = OutOfMemoryError | ProcessLostError | TrainingDivergedError
    return isinstance(error, ValueError | TypeError | OSError | ImportError | FailureError | of_training)


def sentence(error: BaseException) -> str:
    """Return an error's message on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def existing(path: Path) -> Path:
    """Return ``path`` if something is there.

    Raises:
        FailureError: nothing is.
    """
    if not path.exists():
        raise FailureError(f"{path} does not exist.")
    return path
