"""`--help` of every command: it explains each option, and loads nothing that computes."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from jaxrec.cli.data import DATASETS
from jaxrec.cli.main import COMMANDS, main
from jaxrec.data import movielens

HEAVY = ("jax", "numpy", "pandas", "matplotlib", "duckdb")


def all_commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command below the group, with the words that call it."""
    found = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append(((*path, name), command))
        if isinstance(command, click.Group):
            found += all_commands(command, (*path, name))
    return found


ALL = all_commands(main)


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_explains_every_option(words: tuple[str, ...], command: click.Command) -> None:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert all(option.opts[0] in result.output for option in options)


def test_the_list_of_commands_says_what_each_does() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output.split("Commands:\n")[1].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[name, text] for name, (_, text, _) in COMMANDS.items()]


def test_no_help_imports_what_computes() -> None:
    calls = [["--help"], *([*words, "--help"] for words, _ in ALL)]
    program = (
        "import sys\n"
        "from jaxrec.cli.main import main\n"
        f"for call in {calls!r}:\n"
        "    main(call, standalone_mode=False)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not loaded, (call, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_named() -> None:
    result = CliRunner().invoke(main, ["traim"])
    assert result.exit_code == 2
    assert "No such command 'traim'" in result.output


def test_the_data_sets_that_help_lists_are_those_that_there_are() -> None:
    assert DATASETS == movielens.DATASETS
