"""What all processes of a test run share on the disk: the first that needs it makes it."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this test run, by whichever process asks first. Shared: copy it before changing it.

    Args:
        factory: of the temporary folders.
        name: no other call of the test run has it.
        make: is handed a path that does not exist, and makes a folder there.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the base of the others, too
    (root / "shared").mkdir(exist_ok=True)
    path, new = root / "shared" / name, root / "shared" / f"{name}.new"
    with open(root / "shared" / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            shutil.rmtree(new, ignore_errors=True)  # of a process that failed
            make(new)
            new.rename(path)
    return path
