"""Settings as options of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from serve.settings import DEFAULTS, SETTINGS, Setting

FILE = click.Path(dir_okay=False, path_type=Path)


class SettingType(click.ParamType):
    """Checks a value as `serve.settings` does."""

    def __init__(self, setting: Setting) -> None:
        self.name = setting.metavar
        self._setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._setting.read(value)
        except (ValueError, TypeError) as error:
            raise click.BadParameter(f"expected {self._setting.expected}, came {value!r}", ctx, param) from error


def setting_option(name: str) -> Callable[[Any], Any]:
    """The option of a setting. It is None where it was not given, so that other sources count."""
    setting, option = SETTINGS[name], name.replace("_", "-")
    if not setting.metavar:
        return click.option(f"--{option}/--no-{option}", name, default=None, help=setting.help)
    default = f"  [default: {DEFAULTS[name]}]" if name in DEFAULTS else ""
    return click.option(
        f"--{option}", name, type=SettingType(setting), metavar=setting.metavar, help=setting.help + default
    )


def all_settings(command: Any) -> Any:
    """Adds the options of all settings but of the model, which is an argument, and of secrets."""
    for name in reversed(list(SETTINGS)):
        if name != "model" and not SETTINGS[name].secret:
            command = setting_option(name)(command)
    return command
