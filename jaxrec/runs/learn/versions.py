"""The folder of model directories that a server watches, as the loop reads and writes it."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxrec.errors import DataError
from jaxrec.files import sync
from serve.model.directory import Version, find_versions
from serve.model.manifest import MANIFEST, ArtifactError

MARK = ".jaxrec-learn"  # ends the temporary names of the loop, which begin with a dot


def versions(models: Path) -> list[Version]:
    """Those that can be read, newest first.

    Raises:
        DataError: The folder cannot be read, or is a model directory itself.
    """
    if (models / MANIFEST).exists():
        raise DataError(f"{models}: is a model directory; expected a folder with model directories in it")
    try:
        return [one for one in find_versions(models) if one.model_version]
    except ArtifactError as error:
        raise DataError(str(error)) from error


def newest(models: Path) -> tuple[str, str]:
    """The folder and the version of the newest model; empty: there is none. Raises DataError as `versions` does."""
    found = versions(models)
    return (found[0].folder, found[0].model_version) if found else ("", "")


def manifest(model: Path) -> dict[str, Any]:
    """What the manifest of a model directory holds."""
    content: dict[str, Any] = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    return content


def publish(model: Path, models: Path) -> str:
    """Copies an export into the folder of models, under the next free number, wholly or not at all.

    If its version is there already, since an earlier call was interrupted, nothing is copied. The lock of the folder
    has to be held.

    Args:
        model: The model directory.
        models: The folder of the versions.

    Returns:
        The name of its folder.

    Raises:
        DataError: The folder cannot be read.
    """
    version = manifest(model)["model_version"]
    for one in versions(models):
        if one.model_version == version:
            return one.folder
    name = str(max((int(path.name) for path in models.iterdir() if path.name.isdecimal()), default=0) + 1)
    partial = models / f".{name}{MARK}"
    shutil.copytree(model, partial)
    for path in (*sorted(partial.rglob("*")), partial):
        sync(path)
    partial.rename(models / name)
    sync(models)
    return name


def remove(models: Path, names: Iterable[str]) -> None:
    """Hides versions from the server; `clean` removes them. Each is whole as long as it has its name."""
    for name in names:
        if (models / name).exists():  # after a kill it may be gone already
            (models / name).rename(models / f".{name}{MARK}")


def clean(models: Path) -> None:
    """Removes what `publish` left when it was killed, and what `remove` hid. The lock of the folder has to be held."""
    for path in models.glob(f".*{MARK}"):
        shutil.rmtree(path)
