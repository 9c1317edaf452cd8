"""Read the reference numbers of tests/data: tables (.json) and arrays (.npz).

Names of arrays use / as a separator: sd/NAME is the parameter NAME of a state dict. Everything was
computed on a CPU in float32 by the authors' implementation; "distance" means that of the float32
numbers from a float64 run of the same code.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def table(name: str) -> Any:
    """Read a .json file."""
    return json.loads((DATA / name).read_text())


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """Read an .npz file once for all tests; do not write to its arrays."""
    with np.load(DATA / name) as file:
        return dict(file)


def tensors(name: str, prefix: str) -> dict[str, Tensor]:
    """Return those arrays of an .npz file whose name starts with prefix, without it, in order."""
    found = arrays(name).items()
    return {k.removeprefix(prefix): torch.tensor(v) for k, v in found if k.startswith(prefix)}


def tensor(name: str, key: str) -> Tensor:
    """Return one array of an .npz file."""
    return torch.tensor(arrays(name)[key])


def build(model_class: type[nn.Module], case: dict[str, Any], **overrides: Any) -> nn.Module:
    """Build a model from a case's kwargs and layernorm_eps (null: the constructor's default)."""
    kwargs = dict(case["kwargs"])
    if case["layernorm_eps"] is not None:
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=case["layernorm_eps"])
    return model_class(**(kwargs | overrides))


@contextlib.contextmanager
def masking_noise(*noises: Tensor) -> Iterator[None]:
    """Let every torch.rand, which only the masking calls, return the next noise [N, L]."""
    with mock.patch("torch.rand", side_effect=noises) as rand:
        yield
    assert [call.args for call in rand.call_args_list] == [tuple(n.shape) for n in noises]
