"""What several commands share: the types of their arguments, and which options were given."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from jaxrec.errors import DataError
from jaxrec.files import require_replaceable

Command = TypeVar("Command", bound=Callable[..., Any])

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
EXISTING_PATH = click.Path(exists=True, path_type=Path)


class _NewFile(click.Path):
    """A file to be made or replaced; a device or a pipe is refused before any work is done."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            require_replaceable(path)
        except DataError as error:
            self.fail(str(error), param, ctx)
        return path


NEW_FILE = _NewFile(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
SEED = click.IntRange(0)
SEED_HELP = "Seed of everything random: the same seed on the same machine gives the same result."


def mlflow_option(what: str) -> Callable[[Command], Command]:
    """The option --mlflow of a command that does `what` with MLflow, such as "Track the run"."""
    places = "an http:// URI of its server, sqlite:///FILE or a database"
    text = f"{what} with MLflow: {places}. Needs jaxrec[mlflow].  [env: JAXREC_MLFLOW]"
    return click.option("--mlflow", metavar="URI", envvar="JAXREC_MLFLOW", help=text)


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """A decorator that adds the options to a command, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def given_options(context: click.Context) -> list[str]:
    """The names of the parameters that stand on the command line, in the order of the command's parameters."""
    return [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def option_name(parameter: str) -> str:
    """The option as it is typed: `--max-epochs` for `max_epochs`."""
    return f"--{parameter.replace('_', '-')}"


class Share(click.ParamType):
    """A share, given as `1%` or as `0.01`."""

    name = "percentage"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        """The share, from 0 to below 1."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            self.fail(f"{text!r}, expected a share such as 1% or 0.01, from 0 to below 1", param, context)
        return share
