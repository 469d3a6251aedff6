"""Finds the versions of a model in a directory.

The directory is a model directory itself, or has one model directory per version as a child, whatever their names.
"""

import json
from pathlib import Path
from typing import NamedTuple

from serve.model.artifact import ArtifactError

MANIFEST = "manifest.json"

Fingerprint = tuple[tuple[str, int, int, int], ...]


class Version(NamedTuple):
    """A model directory as it was found, not verified."""

    path: Path
    folder: str
    """Name in the directory of versions; empty: the directory is the model itself."""
    model_version: str
    """As the manifest says; empty: it cannot be read."""
    fingerprint: Fingerprint
    """Name, size, time of change and inode of every file: equal as long as nobody touches them."""


def find_versions(directory: Path) -> list[Version]:
    """The versions in a directory, newest first; those whose manifest cannot be read come last.

    Model versions start with the time of the export, so their order as text is that of time. A child without a
    manifest is none, or not yet: the manifest is written last. Raises ArtifactError when the directory cannot be read.
    """
    try:
        if (directory / MANIFEST).exists():
            found = [(directory, "")]
        else:
            children = sorted(child for child in directory.iterdir() if (child / MANIFEST).exists())
            # An export is renamed when it is complete; until then its name starts with a dot.
            found = [(child, child.name) for child in children if not child.name.startswith(".")]
    except OSError as error:
        raise ArtifactError(f"{directory}: cannot be read: {error.strerror}") from error
    versions = [Version(path, folder, _model_version(path), _fingerprint(path)) for path, folder in found]
    return sorted(versions, key=lambda version: version.model_version, reverse=True)


def _model_version(path: Path) -> str:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return ""
    version = manifest.get("model_version") if isinstance(manifest, dict) else None
    return version if isinstance(version, str) else ""


def _fingerprint(path: Path) -> Fingerprint:
    files = []
    try:
        for file in sorted(path.iterdir()):
            status = file.stat()
            files.append((file.name, status.st_size, status.st_mtime_ns, status.st_ino))
    except OSError:
        # It is being changed just now, and will be looked at again.
        return ()
    return tuple(files)
