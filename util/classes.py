"""The names of classes: in classes.txt, in a checkpoint, and labels matched by name.

classes.txt has one name per line, in the order of the labels. Names of folders become names of
classes, so they may be any bytes (see file_io.read_text).
"""

import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from util.dist import print0
from util.errors import UserError
from util.file_io import is_remote, printable, read_text

SHOWN = 20  # names in a message


class ClassNames(NamedTuple):
    """The names in a classes.txt; [] if there is no file."""

    names: list[str]
    path: str  # where the file is, or would be


def read_classes(folder: str) -> ClassNames:
    """Read classes.txt, beside the csvs in `folder` or one folder above.

    Raises:
        UserError: the file cannot be read, is not text, or has an empty or repeated name.
    """
    above = os.path.dirname(folder.rstrip("/") if is_remote(folder) else os.path.abspath(folder))
    for place in (folder, above):
        path = os.path.join(place, "classes.txt")
        try:  # do not ask first whether it exists: web servers cannot be asked
            text = read_text(path)
        except UserError as error:
            if is_absent(error) or path.startswith("s3://"):
                continue
            raise
        lines = text.rstrip().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        names = [line.strip() for line in lines]
        check_names(names, path)
        return ClassNames(names, path)
    return ClassNames([], os.path.join(folder, "classes.txt"))


def is_absent(error: UserError) -> bool:
    """Return whether a file could not be opened because there is none."""
    code = getattr(error.__cause__, "code", None)  # web servers may forbid what they do not have
    return isinstance(error.__cause__, FileNotFoundError) or code in (403, 404, 410)


def check_names(names: list[str], path: str) -> None:
    """Raise UserError if a name in classes.txt is empty or names the same class as another one."""
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not _key(name) or "\0" in name:
            raise UserError(f"{path}, line {number}: not the name of a class")
        if first.setdefault(_key(name), number) != number:
            one = f"lines {first[_key(name)]} and {number} are the same class"
            raise UserError(f"{path}: {one}, {printable(name)!r}")


def count_classes(found: ClassNames, given: int | None) -> int:
    """Return the number of classes of a training set; warn if there is only one.

    Args:
        given: --num_classes, which must agree with classes.txt.
    """
    names, path = found
    if not names and given is None:
        raise UserError(
            f"there is no {path} to count the classes: give --num_classes, or write one name per "
            "line, in the order of the labels"
        )
    if names and given not in (None, len(names)):
        raise UserError(
            f"--num_classes is {given}, but {path} names {len(names)} classes; leave the flag out, "
            "correct the file, or rename it if it is of other videos"
        )
    return warn_of_one(len(names) or given or 0)


def warn_of_one(num_classes: int) -> int:
    """Return the number of classes; warn if it is one."""
    if num_classes == 1:
        print0("WARNING: there is one class, so every prediction is right and nothing is learnt")
    return num_classes


def same_classes(a: Sequence[str], b: Sequence[str]) -> bool:
    """Return whether two lists name the same classes in the same order; [] agrees with all."""
    return not a or not b or list(map(_key, a)) == list(map(_key, b))


def match_labels(found: ClassNames, known: list[str], num_classes: int) -> np.ndarray | None:
    """Return the model's labels int64 [C] of a data set's C classes; None if they are the same.

    Args:
        known: names of the model's num_classes classes, [] if its checkpoint does not tell them.

    Raises:
        UserError: the model lacks a class, or the numbers differ and nothing tells what is what.
    """
    names, path = found
    way_out = f"if the csv has the model's labels already, rename {path}"
    if not names or not known:
        if names and len(names) != num_classes:
            raise UserError(
                f"{path} names {len(names)} classes and the model has {num_classes}, which its "
                f"checkpoint does not name; {way_out}"
            )
        if names or known:
            lacks = "the checkpoint does not name its classes" if names else f"there is no {path}"
            print0(f"labels are taken as the model's numbers, as {lacks}")
        return None
    if same_classes(names, known):
        return None
    label = {_key(name): i for i, name in enumerate(known)}
    if unknown := [name for name in names if _key(name) not in label]:
        raise UserError(
            f"the model does not have {len(unknown)} of the {len(names)} classes in {path}: "
            f"{some_names(unknown)}; it has {some_names(known)}; {way_out}"
        )
    print0(f"labels are matched by name: {len(names)} classes here, {len(known)} of the model")
    return np.array([label[_key(name)] for name in names])


def some_names(names: Sequence[str], joint: str = ", ") -> str:
    """Join the first names for a message, and say how many more there are."""
    rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return joint.join([*map(printable, names[:SHOWN]), *rest])


def _key(name: str) -> str:  # macOS takes letters and their accents apart
    return unicodedata.normalize("NFC", name.strip())
