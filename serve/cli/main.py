"""The commands of `python -m serve`, each in a module of its own that is imported when it is named."""

from importlib import import_module

import click

COMMANDS = {
    "run": "Answer gRPC calls with a model.",
    "ask": "Ask a running server, for an answer to read.",
    "log": "Copy events and recommendations into a file.",
}


class LazyGroup(click.Group):
    """The help of the group imports none of its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"serve.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Serve an exported model directory with ONNX Runtime."""
