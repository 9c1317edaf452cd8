"""What a --dry_run prints: the multiply-adds of a clip, and the memory of a training step.

fvcore counts the multiply-adds, each of them once as in the paper's tables. The memory is measured:
two updates run on fake tensors, which have shapes but no data, and every storage is counted as long
as it lives.
"""

import contextlib
import io
import logging
import math
import warnings
import weakref
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.dist import print0, world_size
from util.optim import autocast, make_optimizer, make_scaler, optim_step


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


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that are alive, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]:
            if storage not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def step_memory(
    model: nn.Module, args: Namespace, dtype: torch.dtype, **options: Any
) -> tuple[int, dict[str, int]]:
    """Measure a training step of forward(clips of dtype, **options), without torch.compile.

    Nothing is computed, and the model's weights are lost. The fake tensors are on the CPU whatever
    the device: attention stores no scores on either.

    Returns:
        the most bytes held at a time, and those of the weights, gradients, AdamW's two moments
        and activations (what the forward pass keeps), which are not all held at the same time.
    """
    cpu = torch.device("cpu")
    # Gradients outlive the step if micro-steps add them up, or in DDP's buckets.
    held = args.accum_iter > 1 or (args.ranks or world_size()) > 1
    shape = args.batch_size * args.repeat_aug, 3, args.num_frames, args.input_size, args.input_size
    model.grad_checkpointing = args.grad_checkpointing
    with FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live:
        model.to_empty(device=cpu).train()
        everything = list(model.parameters())
        parameters = [p for p in everything if p.requires_grad]
        optimizer = make_optimizer([{"params": parameters}], args.beta, cpu)
        average = [torch.empty_like(p) for p in everything if getattr(args, "model_ema", 0.0)]
        scaler = make_scaler(cpu, "fp32")  # that of fp16 needs but a few numbers
        clips, activations = torch.empty(shape, dtype=dtype), 0
        for micro_steps in (1, 2 if held else 1):  # the moments come with the first update
            for _ in range(micro_steps):
                before = live.now
                with autocast(cpu, args.precision):
                    output = model(clips, **options)
                if isinstance(output, tuple):
                    loss = output[0]
                else:
                    loss = F.cross_entropy(output.float(), torch.empty_like(output).float())
                activations = live.now - before
                loss.backward()
            optim_step(optimizer, scaler, parameters, args.clip_grad)
    weights, trained, averaged = (
        sum(p.nbytes for p in x) for x in (everything, parameters, average)
    )
    parts = {"weights": weights, "gradients": trained, "AdamW's moments": 2 * trained}
    parts |= {"moving average": averaged} if averaged else {}
    return live.peak, parts | {"activations": activations}


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def print_flops(model: nn.Module, args: Namespace, **options: Any) -> None:
    """Print the cost of one clip; the model's weights are lost."""
    gflops = count_flops(model, (3, args.num_frames, args.input_size, args.input_size), **options)
    cost = f"{gflops:.1f} GFLOPs" if gflops >= 1 else f"{1e3 * gflops:.1f} MFLOPs"
    ratio = f" at --mask_ratio {options['mask_ratio']:g}" if options else ""
    print0(f"{cost} per clip forward{ratio} (multiply-adds counted once)")


def print_step(model: nn.Module, args: Namespace, dtype: torch.dtype, **options: Any) -> None:
    """Print the cost of a clip, and the memory of a training step as step_memory measures it."""
    lowest = dict(options)
    if options and args.mask_ratio_end is not None:  # the step needs most at the lower end
        lowest["mask_ratio"] = min(args.mask_ratio, args.mask_ratio_end)
    print_flops(model, args, **options)
    peak, parts = step_memory(model, args, dtype, **lowest)
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    print0(f"estimated peak memory of a step: {_bytes(peak)} ({listed})")
