"""Files by path, address (http(s)://, cached; s3://, with boto3 installed) or released name.

Checkpoint files are read with weights_only, so that loading runs no code from them.
"""

import argparse
import codecs
import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlparse

import torch
from iopath.common.file_io import HTTPURLHandler, PathManager, get_cache_dir
from iopath.common.s3 import S3PathHandler
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

from util.errors import UserError

ADDRESSES = ("http://", "https://", "s3://")

# Released checkpoints (400 epochs of 4 repeats, patch 16), and the first digits of their md5.
MD5 = {
    "k400/vit_large": "edf3a5",
    "k600/vit_large": "9a9645",
    "k700/vit_large": "cdbada",
    "k400/vit_huge": "3d7f64",
    "k600/vit_huge": "27495e",
    "k700/vit_huge": "4c4e3c",
}
ADDRESS = "https://dl.fbaipublicfiles.com/video-mae/pretrain/mae_pretrain_{size}_{data}.pth"

# what may stand before the "<" of a web page: byte order marks of UTF-8 and UTF-16, and white space
BLANKS = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"
OTHER_KINDS = {  # by the first bytes
    b"<": "a web page (HTML), which servers send for files that moved or need a login",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
}
torch.serialization.add_safe_globals([argparse.Namespace])  # besides tensors, numbers and text
CODE = re.compile(r"GLOBAL ([\w.]+)")  # in torch's errors: what else a file asks for

path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())
try:  # not a dependency: only s3:// needs it
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    S3_ERRORS: tuple[type[Exception], ...] = Boto3Error, BotoCoreError, ClientError  # no OSErrors
    # None: the profile in AWS's own variables and files; iopath's default is Facebook's
    path_manager.register_handler(S3PathHandler(profile=None))
except ImportError:
    S3_ERRORS = ()

# --- paths and addresses --------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Return whether a path is an address (s3://, https://), not a path on this machine."""
    return "://" in path


@contextlib.contextmanager
def errors_of(action: str, path: str, otherwise: str = "", hint: str = "") -> Iterator[None]:
    """Turn errors of files, servers and boto3 into a UserError that says what cannot be done.

    Its reason is `otherwise` if the error has no text; `hint` follows the reason.
    """
    try:
        if path.startswith("s3://") and not S3_ERRORS:
            raise ValueError("it needs `pip install boto3`")
        yield
    except (OSError, ValueError, NotImplementedError, HTTPException, *S3_ERRORS) as error:
        brief = not is_remote(path) and getattr(error, "strerror", "")
        reason = " ".join(str(brief or error).split()) or otherwise
        raise UserError(f"cannot {action} {path}: {reason}{hint}") from error


def open_file(path: str, mode: str = "r") -> IO:
    """Open a path or address like `open`; if that fails, raise a UserError that names it."""
    if "r" in mode and path.startswith("http"):  # into the cache
        path = local_path(path)
    with errors_of("open", path):
        return path_manager.open(path, mode)


def read_text(path: str) -> str:
    """Return the text of a file that holds names of files, which may be any bytes.

    Editors' and shells' byte-order marks are dropped, and UTF-16 is understood. What is not UTF-8
    is kept in the way of os.listdir (surrogateescape): encode it so to get the same bytes again.
    """
    with open_file(path, "rb") as file:
        content = file.read()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def text_to_path(text: str) -> str:
    """Return text from read_text as a path: the same bytes for the file system in any locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def path_to_text(path: str) -> str:
    """Return a path of this machine as text that, encoded as in read_text, has the same bytes."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """Return text in which control characters and bytes that are not UTF-8 are shown as \\xNN."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def print_any(text: str) -> None:
    """Print text with names of files, whatever bytes they have and whatever the locale is."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def local_path(address: str) -> str:
    """Return the path on this machine of a csv or checkpoint at http(s)://, fetched if needed.

    iopath keeps it for ever. Videos have a cache of their own: see util/cache.py.
    """
    with errors_of("fetch", address, hint="; without a network, give the path of a copy"):
        parts = urlparse(address)  # iopath tells cached files apart by path alone
        name = f"{parts.netloc}{zlib.crc32(parts.query.encode()) if parts.query else ''}"
        return path_manager.get_local_path(address, cache_dir=os.path.join(get_cache_dir(), name))


def make_dirs(path: str) -> None:
    """Create a folder and its parents; if that fails, raise a UserError that names it."""
    with errors_of("create the folder", path, "no files can be written there"):
        path_manager.mkdirs(path.rstrip("/") + "/" if is_remote(path) else path)
        if not is_remote(path) and not os.path.isdir(path):  # mkdirs does not mind a file there
            raise ValueError("it is a file")


def list_names(folder: str) -> list[str]:
    """Return the names in a folder; none if there is no such folder."""
    if not is_remote(folder):
        return os.listdir(folder) if os.path.isdir(folder) else []
    with errors_of("list", folder):
        return [key.split("/")[-1] for key in path_manager.ls(folder.rstrip("/") + "/")]


def write_atomically(path: str, write: Callable[[Any], None], suffix: str = "") -> None:
    """Create a file by write(file) so that it appears whole or not at all.

    A local file is written beside its final place, forced to disk and renamed, so that neither a
    kill nor a full disk leaves half a file under the final name. Its name ends in `suffix` until
    then, which tells processes apart by default. Object stores are atomic already.

    Raises:
        OSError: the write failed; whatever stood at `path` before is untouched.
    """
    if is_remote(path):
        try:
            with path_manager.open(path, "wb") as file:
                upload, file.close = file.close, lambda: None  # after an error, upload nothing
                write(file)
                file.close = upload
        except S3_ERRORS as error:
            raise OSError(str(error)) from error
        return
    temporary = path + (suffix or f".tmp{os.getpid()}")
    try:
        with open(temporary, "w+b") as file:
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


# --- released names -------------------------------------------------------------------------------


def find_name(path: str) -> str | None:
    """Return the released name (a key of MD5) of a file with this path or address, or None."""
    stem = "/" + path.removesuffix(".pth")
    for name in MD5:
        data, size = name.split("/")
        released = f"/mae_pretrain_{size}_{data}", f"/{size[:5]}/{data}_400ep_rep4_mr9_16x4.pyth"
        if stem.endswith(released):
            return name
    return None


@functools.cache
def fetch(path: str) -> str:
    """Return a file on this machine for a path, an http(s) address (cached) or a released name.

    s3:// addresses are returned as they are and read as streams, because their contents may change.

    Raises:
        UserError: the download failed, or gave a web page or another file than the released one.
    """
    address = path
    if not os.path.exists(path):
        name = path if "/" in path else find_name(path) or path
        if name in MD5:
            data, size = name.split("/")
            address = ADDRESS.format(size=size, data=data)
        elif re.fullmatch(r"k\d00/\w+", path):
            raise UserError(f"{path} is neither a file nor a released name: {', '.join(MD5)}")
    if not address.startswith(("http://", "https://")):
        return address
    local, digest = local_path(address), hashlib.md5()
    wanted = MD5.get(find_name(urlparse(address).path) or "")
    try:
        with open(local, "rb") as file:
            refuse_other_kinds(file.read(64), path)
            file.seek(0)
            while wanted and (block := file.read(1 << 20)):
                digest.update(block)
        if wanted and not (found := digest.hexdigest()).startswith(wanted):
            wrong = f"its md5 is {found} and should start with {wanted}"
            raise UserError(f"{address} is damaged or another file: {wrong}")
    except UserError as error:
        raise UserError(f"{error}{forget(path, local)}") from error
    return local


def forget(path: str, local: str) -> str:
    """Delete the damaged file if fetch(path) has downloaded it, and return words that say so."""
    if local == path:
        return ""
    with contextlib.suppress(FileNotFoundError):  # another rank may be faster
        os.remove(local)  # a cached file is never downloaded again
    fetch.cache_clear()
    return "; it was removed from the cache, try again"


def refuse_other_kinds(start: bytes, path: str, wanted: str = "a checkpoint") -> None:
    """Raise UserError if a file's first bytes are those of a web page or of a Git LFS pointer."""
    if start[8:9] == b"{":  # .safetensors: the length before it may be any bytes
        return
    for first, kind in OTHER_KINDS.items():
        if start.lstrip(BLANKS).startswith(first):
            raise UserError(f"{path} is damaged or not {wanted}: it is {kind}")


# --- checkpoint files -----------------------------------------------------------------------------


def read_checkpoint(path: str, mmap: bool = False, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint file on the CPU without running code from it, unless it is trusted.

    Args:
        path: a path, an address, or the name of a released checkpoint; PyTorch's format,
            .safetensors, which gives {"model": tensors, "metadata": the header's strings}, or the
            .index.json of a Hugging Face model in several files.
        mmap: map a local or downloaded file into memory: what is never used stays on the disk.
            Its tensors are views of the file, valid until it is overwritten in place. PyTorch's
            format of before 2020 cannot be mapped and is read whole.
        trust: build what the file asks for besides tensors and plain data, which may run any code.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint, or asks to run code.
    """
    if not is_remote(path) and os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the checkpoint file in it")
    if path.endswith(".index.json"):
        return _read_parts(path, mmap)
    local = fetch(path)
    with open_file(local, "rb") as file:
        start = file.read(64)
        file.seek(0)
        refuse_other_kinds(start, path)
        mmap = mmap and start.startswith(b"PK\x03\x04") and not is_remote(local)
        source = local if mmap else file
        try:
            if start[8:9] == b"{":
                return _read_safetensors(local, file)
            checkpoint = torch.load(source, "cpu", weights_only=not trust, mmap=mmap)
        except Exception as error:  # torch's readers raise errors of every kind for damaged files
            reason = (str(error).splitlines() or ["empty file"])[0]
            if code := CODE.search(str(error)):
                names = _entries_with_code(file, source, mmap)
                entries = "".join(f", in its entry {name}" for name in names)
                problem = (
                    f"is not loaded: it asks to run code ({code[1]}{entries}), not only for "
                    "weights; if you trust the file, keep what is plain data: "
                    f"python -m util.convert {shlex.quote(path)} OUT --to safetensors --trust"
                )
            elif trust:
                problem = f"cannot be read, even if it is trusted: {reason}"
            else:
                if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
                    reason = "PyTorch does not recognise it"  # its advice is to run the code
                problem = f"is damaged or not a checkpoint: {reason}{forget(path, local)}"
            raise UserError(f"{path} {problem}") from error
    if trust:  # whole models
        checkpoint = checkpoint if isinstance(checkpoint, dict) else {"model": checkpoint}
        for name in [k for k, v in checkpoint.items() if isinstance(v, torch.nn.Module)]:
            checkpoint[name] = checkpoint[name].state_dict()
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


class _Inert:
    """Stand for an object of any class, without running its code."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    __setstate__ = __init__


def _entries_with_code(file: IO, source: Any, mmap: bool) -> list[str]:
    """Find the entries of a checkpoint with more than plain data; [] if they cannot be told."""
    try:
        file.seek(0)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
            content = torch.load(source, "cpu", weights_only=True, mmap=mmap)
        return [str(k) for k, value in content.items() if _Inert.__name__ in repr(value)]
    except Exception:
        return []


def _read_safetensors(local: str, file: IO) -> dict[str, Any]:
    """Read a .safetensors file: map a local one into memory, read a remote one as a stream."""
    tensors = load_bytes(file.read()) if is_remote(local) else load_file(local)
    file.seek(0)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {"model": tensors, "metadata": header.get("__metadata__", {})}


def _read_parts(path: str, mmap: bool) -> dict[str, Any]:
    """Read the files that an index of Hugging Face lists."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} lists no files")
    tensors: dict[str, Any] = {}
    for name in sorted(set(map(str, places.values()))):
        if os.path.basename(name) != name or name.endswith(".json"):
            raise UserError(f"{path} lists {name}, which is not a file beside it")
        part = read_checkpoint(os.path.join(os.path.dirname(path), name), mmap)
        part = part.get("model", part)
        for key in (key for key, place in places.items() if place == name):
            if key not in part:
                raise UserError(f"{path} lists {key} in {name}, which lacks it")
            tensors[key] = part[key]
    return {"model": tensors}


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object; raise UserError if the file holds none."""
    with open_file(fetch(path), "rb") as file:
        try:
            return {} | json.load(file)
        except (TypeError, ValueError) as error:  # TypeError: not a dict
            raise UserError(f"{path} is damaged: {error}") from error
