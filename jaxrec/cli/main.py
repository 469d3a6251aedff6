"""The command line: a command is imported when it is asked for, and what computes when the command runs."""

import importlib

import click

from jaxrec.errors import DataError, ExportError, TrainingError
from serve.cli.extras import check_extras

COMMANDS = {
    "prepare": ("data", "Check a log of interactions and write prepared data.", ("train",)),
    "append": ("data", "Add new events to prepared data.", ("train",)),
    "check": ("data", "Verify the checksums of prepared data.", ("train",)),
    "train": ("train", "Train the models on prepared data.", ("train",)),
    "rl": ("rl", "Fine-tune a policy by reinforcement learning.", ("train",)),
    "evaluate": ("evaluate", "Rank the test cases and print the metrics.", ("train",)),
    "export": ("export", "Export a run to ONNX for the server.", ("train", "export", "serve")),
    "learn": ("learn", "Make the next version of what a server recorded.", ("train", "export", "serve")),
    "recommend": ("recommend", "Recommend for many users at once, without a server.", ("train", "serve")),
    "demo": ("demo", "Run every stage on 100,004 MovieLens ratings.", ("train", "export", "demo", "serve")),
    "fetch": ("data", "Download a MovieLens data set.", ("train",)),
    "prepare-distributed": ("distributed", "Prepare Parquet files on several machines.", ("train", "distributed")),
}  # by name, in the order of `jaxrec --help`: the module in jaxrec/cli/, the short help, and the extras that it needs


class LazyGroup(click.Group):
    """The commands of COMMANDS, each the function of its own name in its module."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names in the order of a run's stages."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports the command; None for a name that is none."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"jaxrec.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises click.ClickException for a command whose extra is missing; its help needs none."""
        name, command, rest = super().resolve_command(context, args)
        if name in COMMANDS and not context.resilient_parsing and "--help" not in rest:
            check_extras(f"{context.command_path} {name}", COMMANDS[name][2])
        return name, command, rest

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help, _) in COMMANDS.items()])

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
