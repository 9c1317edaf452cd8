"""Count a model's multiply-adds with fvcore, each of them once as in the paper's tables."""

import contextlib
import io
import logging
import math
import warnings
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from util.dist import print0


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the two products of scaled_dot_product_attention, which fvcore does not know."""
    query, key = (value.type().sizes() for value in inputs[:2])  # [N, heads, L, D]
    return 2 * math.prod(query) * key[2]


class _Forward(nn.Module):
    """A model that takes one tensor and returns one, as fvcore needs it for tracing."""

    def __init__(self, model: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        result = self.model(x, **self.options)
        return result[0] if isinstance(result, tuple) else result


def count_flops(model: nn.Module, clip_shape: tuple[int, ...], **options: Any) -> float:
    """Count the multiply-adds of forward(clip, **options) for a clip (C, T, H, W), in units of 1e9.

    Nothing is computed: this moves the model to PyTorch's meta device, where its weights are lost.
    """
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # fvcore imports and calls what newer PyTorch deprecates
        from fvcore.nn import FlopCountAnalysis

        clip = torch.empty(1, *clip_shape, device="meta")
        count = FlopCountAnalysis(_Forward(model.to("meta").eval(), options), clip)
        count.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return count.total() / 1e9


def print_flops(model: nn.Module, args: Namespace, **options: Any) -> None:
    """Print the cost of one clip at the end of a --dry_run; the model's weights are lost."""
    shape = (3, args.num_frames, args.input_size, args.input_size)
    gflops = count_flops(model, shape, **options)
    ratio = f" at --mask_ratio {options['mask_ratio']:g}" if options else ""
    counted = "(multiply-adds counted once)"
    print0(f"{gflops:.1f} GFLOPs per clip forward{ratio} {counted}; dry run: stopping")
