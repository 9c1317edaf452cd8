"""Files by path or address: local, http(s):// (cached) and s3:// (with boto3 installed)."""

import contextlib
import importlib.util
import os
import zlib
from collections.abc import Callable
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlparse

from iopath.common.file_io import HTTPURLHandler, PathManager, get_cache_dir
from iopath.common.s3 import S3PathHandler

from util.errors import UserError

ADDRESSES = ("http://", "https://", "s3://")

path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())
HAS_S3 = importlib.util.find_spec("boto3") is not None  # not a dependency: only s3:// needs it
if HAS_S3:
    # the profile of AWS's own variables and files; iopath's default is Facebook's
    path_manager.register_handler(S3PathHandler(profile=None))


def is_remote(path: str) -> bool:
    """Tell addresses (s3://, https://) from paths of this machine."""
    return "://" in path


def open_file(path: str, mode: str = "r") -> IO:
    """Open a path or address as `open` does.

    Raises:
        UserError: the file cannot be opened; the message names it.
    """
    try:
        if "r" in mode and path.startswith("http"):  # see local_path
            path = local_path(path)
        return path_manager.open(path, mode)
    except OSError as error:
        hint = "; it needs `pip install boto3`" if path.startswith("s3://") and not HAS_S3 else ""
        raise UserError(f"cannot open {path}: {error.strerror or error}{hint}") from error


def local_path(path: str) -> str:
    """Return a path on this machine for a path or address, downloading into a cache if needed."""
    if not is_remote(path):
        return path
    if path.startswith("s3://") and not HAS_S3:
        raise UserError(f"cannot fetch {path}: it needs `pip install boto3`")
    if not path.startswith(ADDRESSES):
        raise UserError(f"cannot fetch {path}: addresses start with {', '.join(ADDRESSES)}")
    options = {}
    try:
        if not path.startswith("s3://"):  # the cache would take files of one name for one
            address = urlparse(path)
            name = f"{address.netloc}{zlib.crc32(address.query.encode()) if address.query else ''}"
            options["cache_dir"] = os.path.join(get_cache_dir(), name)
        return path_manager.get_local_path(path, **options)
    # S3PathHandler asserts that the file is there; ValueError: an address that is none
    except (OSError, HTTPException, AssertionError, ValueError) as error:
        hint = "; without a network, fetch it elsewhere and give its path"
        hint = hint if path.startswith("http") else ""
        raise UserError(f"cannot fetch {path}: {error or 'no such file'}{hint}") from error


def make_dirs(path: str) -> None:
    """Create a folder with its parents, as the user's umask says.

    Raises:
        UserError: it cannot be created; the message names it.
    """
    try:
        path_manager.mkdirs(path)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror or error}") from error


def write_atomically(path: str, write: Callable[[Any], None]) -> None:
    """Let write(file) produce a file that appears whole or not at all.

    A local file is written beside its final place, forced to disk and renamed, so that neither a
    kill nor a full disk leaves half a file under the final name. Object stores are atomic already.

    Raises:
        OSError: the write failed; whatever stood at `path` before is untouched.
    """
    if is_remote(path):
        with path_manager.open(path, "wb") as file:
            write(file)
        return
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
