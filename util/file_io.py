"""Files by path or address: local, http(s):// (cached) and s3:// (with boto3 installed)."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
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


# Pre-trained on Kinetics for 400 epochs of 4 repeats; first digits of each file's md5. Both sizes
# are patch 16.
MD5 = {
    "k400/vit_large": "edf3a5",
    "k600/vit_large": "9a9645",
    "k700/vit_large": "cdbada",
    "k400/vit_huge": "3d7f64",
    "k600/vit_huge": "27495e",
    "k700/vit_huge": "4c4e3c",
}


ADDRESS = "https://dl.fbaipublicfiles.com/video-mae/pretrain/mae_pretrain_{size}_{data}.pth"


FILE_NAMES = (
    re.compile(r"(^|/)mae_pretrain_(?P<size>vit_(large|huge))_(?P<data>k\d00)(\.pth)?$"),
    re.compile(r"/vit_(?P<letter>[lh])/(?P<data>k\d00)_400ep_rep4_mr9_16x4\.pyth$"),
)


# what may stand before the "<" of a web page: byte order marks of UTF-8 and UTF-16, and white space
BLANKS = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"


def find_name(path: str) -> str | None:
    """Return the name in MD5 of a released file by its own name, such as the end of an address."""
    for pattern in FILE_NAMES:
        if match := pattern.search(path):
            parts = match.groupdict()
            size = parts.get("size") or {"l": "vit_large", "h": "vit_huge"}[parts["letter"]]
            return f"{parts['data']}/{size}"
    return None


def find_md5(address: str) -> str | None:
    """Return the first digits of the md5 that a released file at this address must have."""
    return MD5.get(find_name(urlparse(address).path) or "")


@functools.cache
def fetch(path: str) -> str:
    """Return a file on this machine for a path, an http(s) address (cached) or a released name.

    s3:// addresses come back as they are: they are read as streams, for their contents may change.

    Raises:
        UserError: a failed download, another file than the released one, or a web page.
    """
    address = path
    if not os.path.exists(path):
        # the table's names, as they are or as the files are called
        name = path if "/" in path else find_name(path) or path
        data, _, size = name.partition("/")
        if name in MD5:
            address = ADDRESS.format(size=size, data=data)
        elif re.fullmatch(r"k\d00/\w+", path):
            raise UserError(f"{path} is neither a file nor a released name: {', '.join(MD5)}")
    if not address.startswith(("http://", "https://")):
        return address
    local = local_path(address)
    try:
        with open(local, "rb") as file:
            refuse_other_kinds(file.read(64), path)
        md5 = find_md5(address)
        if md5 and not (found := _md5(local)).startswith(md5):
            raise UserError(
                f"{address} is damaged or another file: its md5 is {found} and should start with "
                f"{md5}{forget(path, local)}"
            )
    except UserError:
        forget(path, local)
        raise
    return local


def forget(path: str, local: str) -> str:
    """Delete what fetch(path) has downloaded and found damaged, and return the words that say so.

    Files that were not downloaded stay; there is nothing to say of them.
    """
    if local == path:
        return ""
    with contextlib.suppress(FileNotFoundError):  # another rank may be faster
        os.remove(local)  # what stays in the cache is never downloaded again
    fetch.cache_clear()
    return "; it was removed from the cache, try again"


def _md5(path: str) -> str:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_other_kinds(start: bytes, path: str) -> None:
    """Raise UserError for the first bytes of a web page, or of a Git LFS pointer."""
    if start[8:9] == b"{":  # .safetensors: the length before it may be any bytes
        return
    if start.lstrip(BLANKS)[:1] == b"<":
        raise UserError(
            f"{path} is damaged or not a checkpoint: it is a web page (HTML), which servers send "
            "in place of files that have moved or need a login"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is damaged or not a checkpoint: it is a Git LFS pointer; fetch the file "
            "itself with `git lfs pull`"
        )
