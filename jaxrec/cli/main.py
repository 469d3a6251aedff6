"""The command line: a command is imported when it is asked for, and what computes when the command runs."""

import importlib

import click

from jaxrec.errors import DataError, ExportError, TrainingError

MODULES = {
    "prepare": "data",
    "append": "data",
    "check": "data",
    "train": "train",
    "rl": "rl",
    "evaluate": "evaluate",
    "export": "export",
    "demo": "demo",
    "fetch": "data",
    "prepare-distributed": "distributed",
}  # by command, in the order in which `jaxrec --help` lists them


class LazyGroup(click.Group):
    """The commands of MODULES, each a function of its own name in jaxrec/cli/."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names in the order of a run's stages."""
        return list(MODULES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports the command; None for a name that is none."""
        if name not in MODULES:
            return None
        module = importlib.import_module(f"jaxrec.cli.{MODULES[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def invoke(self, context: click.Context) -> object:
        """Errors that the user can mend are one line on stderr and exit status 1."""
        try:
            return super().invoke(context)
        except (DataError, TrainingError, ExportError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error.filename or 'file'}: {error.strerror or error}") from error


@click.group(cls=LazyGroup, context_settings={"show_default": True})
@click.version_option(package_name="jaxrec")
def main() -> None:
    """Next-item recommendation from an interaction log: prepare, train, rl, evaluate, export; then serve."""


if __name__ == "__main__":
    main()
