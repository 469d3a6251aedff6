"""`--help` of every command of `python -m serve`."""

import click
import pytest
from click.testing import CliRunner

from serve.cli.main import COMMANDS, main


def test_the_list_of_commands_says_what_each_does() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output.split("Commands:\n")[1].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[name, text] for name, (text, _) in COMMANDS.items()]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    command = main.get_command(click.Context(main), name)
    assert command is not None
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert all(option.opts[0] in result.output for option in options)
