"""Released checkpoints by name, and files by path, address or name."""

import contextlib
import functools
import hashlib
import os
import re
from urllib.parse import urlparse

from util.errors import UserError
from util.file_io import local_path

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
