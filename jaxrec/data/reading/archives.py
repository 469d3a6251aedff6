"""What lies in .zip and .gz downloads, unpacked with every checksum verified."""

import gzip
import lzma
import shutil
import zipfile
import zlib
from pathlib import Path

from jaxrec.errors import DataError

DAMAGED = (EOFError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, NotImplementedError)


def zip_names(path: Path) -> list[str]:
    """The files in a zip. Raises DataError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except DAMAGED as error:
        raise _damaged(path, error) from error


def unzip(path: Path, name: str, folder: Path) -> Path:
    """Unpacks one file of a zip into `folder`, under its last name. Raises DataError where the zip is damaged."""
    target = folder / name.rsplit("/", 1)[-1]
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (*DAMAGED, RuntimeError) as error:  # RuntimeError: it has a password
        raise _damaged(path, error) from error
    return target


def gunzip(path: Path, folder: Path) -> Path:
    """Unpacks a .gz into `folder`, under its name without `.gz`. Raises DataError where it is damaged."""
    target = folder / path.name.removesuffix(".gz")
    try:
        with gzip.open(path, "rb") as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except DAMAGED as error:
        raise _damaged(path, error) from error
    return target


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: damaged or incomplete archive ({error}); download it again")
