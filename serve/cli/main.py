"""The commands of `python -m serve`, each in a module of its own that is imported when it is named."""

from importlib import import_module

import click

from serve.cli.extras import check_extras

COMMANDS = {
    "run": ("Answer gRPC calls with a model.", ("serve",)),
    "ask": ("Ask a running server, for an answer to read.", ()),
    "items": ("List, store and delete items of a running server.", ()),
    "check": ("Say by the exit status whether a server is ready.", ()),
    "log": ("Copy events and recommendations into a file.", ("serve",)),
    "outcomes": ("Compare what came of the recommendations of each model.", ("serve",)),
    "export-events": ("Write recorded events as a file to train on.", ("serve",)),
}  # by name: the short help, and the extras that the command needs


class LazyGroup(click.Group):
    """The help of the group imports none of its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"serve.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises click.ClickException for a command whose extra is missing; its help needs none."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS and not ctx.resilient_parsing and not {"-h", "--help"} & set(rest):
            check_extras(f"{ctx.command_path} {name}", COMMANDS[name][1])
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (short_help, _) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Serve an exported model directory with ONNX Runtime."""
