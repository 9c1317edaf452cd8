"""The names of classes: in classes.txt, in a checkpoint, and labels matched by name.

classes.txt has one name per line, in the order of the labels. Names of folders become names of
classes, so they may be any bytes (see file_io.read_text).
"""

import os
import unicodedata

import numpy as np

from util.dist import print0
from util.errors import UserError
from util.file_io import is_remote, printable, read_text

SHOWN = 20  # names in a message


def read_classes(folder: str) -> list[str]:
    """Return the names in classes.txt, beside the csvs or one folder above; [] without the file.

    Raises:
        UserError: the file cannot be read, is not text, or has an empty or repeated name.
    """
    for place in (folder, os.path.dirname(folder.rstrip("/"))):
        path = os.path.join(place, "classes.txt")
        try:  # do not ask first whether it exists: web servers cannot be asked
            text = read_text(path)
        except UserError as error:
            if is_remote(path) or isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        lines = text.rstrip().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        names = [line.strip() for line in lines]
        numbers: dict[str, int] = {}
        for number, name in enumerate(names, start=1):
            first = numbers.setdefault(_key(name), number)
            if not name or "\0" in name:
                raise UserError(f"{path}, line {number}: not the name of a class")
            if first != number:
                raise UserError(f"{path}: lines {first} and {number} are the same: {name!r}")
        return names
    return []


def count_classes(names: list[str], given: int | None, folder: str) -> int:
    """Return the number of classes of a training set; warn if there is only one.

    Args:
        names: those of classes.txt, [] without the file.
        given: --num_classes, which must agree with them.
    """
    if not names and given is None:
        raise UserError(
            f"{folder} has no classes.txt to count the classes: give --num_classes, or write one "
            "name per line, in the order of the labels"
        )
    if names and given not in (None, len(names)):
        raise UserError(
            f"--num_classes is {given}, but the classes.txt of {folder} names {len(names)} "
            "classes; leave the flag out, or correct the file"
        )
    return warn_of_one(len(names) or given or 0)


def warn_of_one(num_classes: int) -> int:
    """Return the number of classes; warn if it is one."""
    if num_classes == 1:
        print0("WARNING: there is one class, so every prediction is right and nothing is learnt")
    return num_classes


def same_classes(a: list[str], b: list[str]) -> bool:
    """Return whether two lists name the same classes in the same order; [] agrees with all."""
    return not a or not b or list(map(_key, a)) == list(map(_key, b))


def match_labels(
    names: list[str], known: list[str], num_classes: int, folder: str
) -> np.ndarray | None:
    """Return the model's labels int64 [C] of a data set's classes, or None if they are the same.

    Args:
        names: of the data set's C classes, [] if it has no classes.txt in `folder`.
        known: of the model's num_classes classes, [] if its checkpoint does not name them.

    Raises:
        UserError: the model lacks a class, or the numbers differ and nothing tells what is what.
    """
    if names and not known and len(names) != num_classes:
        raise UserError(
            f"the classes.txt of {folder} names {len(names)} classes and the model has "
            f"{num_classes}, whose names its checkpoint does not tell: give all {num_classes} "
            "names, in the order of the model's labels, and label the videos by them"
        )
    if same_classes(names, known):
        return None
    label = {_key(name): i for i, name in enumerate(known)}
    if unknown := [name for name in names if _key(name) not in label]:
        raise UserError(
            f"the model does not have {len(unknown)} of the {len(names)} classes in the "
            f"classes.txt of {folder}: {some_names(unknown)}; it has {some_names(known)}"
        )
    print0(f"labels are matched by name: {len(names)} classes here, {len(known)} of the model")
    return np.array([label[_key(name)] for name in names])


def some_names(names: list[str]) -> str:
    """Join the first names for a message."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + rest


def _key(name: str) -> str:  # macOS takes letters and their accents apart
    return unicodedata.normalize("NFC", name)
