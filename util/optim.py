"""Optimiser groups, precision, and one optimiser step: scale, synchronise, clip, step."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from util.dist import all_reduce_mean, print0
from util.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def param_groups_weight_decay(
    model: nn.Module, weight_decay: float, bias_wd: bool = False
) -> list[dict[str, Any]]:
    """Split parameters in two groups: without weight decay (1-D tensors and biases), and with.

    bias_wd keeps the reference's meaning: norm weights are decayed too, biases still are not.
    """
    no_decay, decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith(".bias")
        exempt = is_bias if bias_wd else is_bias or parameter.ndim <= 1
        (no_decay if exempt else decay).append(parameter)
    return [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]


def make_optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], device: torch.device
) -> AdamW:
    """Build AdamW; its rate is set before every step (util/lr_sched.py)."""
    return AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cuda", "cpu"))


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether the device computes in bfloat16, rather than imitating it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(name: str | None, device: torch.device) -> str:
    """Return the precision asked for, or bf16 on an accelerator that has it and fp32 elsewhere."""
    if name:
        return name
    return "bf16" if device.type == "cuda" and has_fast_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Run the forward pass in bf16, fp16 or (doing nothing) fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Build the loss scaler that fp16 needs; it does nothing for bf16 and fp32."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def grad_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Leave out the averaging of gradients over ranks except where enabled.

    Wrap forward and backward of every micro-step; only the last one of an update synchronises.
    """
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def optim_step(
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: list[nn.Parameter],
    clip_grad: float | None,
    allows: Callable[[Tensor], bool] = lambda norm: True,
) -> Tensor:
    """Unscale, clip by global norm, step and clear the gradients.

    Args:
        allows: tells, given the gradient norm, whether to step at all (see UpdateGuard).

    Returns:
        the gradient norm before clipping, a scalar on the device (reading it waits for the GPU); 0
        where the gradient overflowed under the loss scale and the step is skipped.
    """
    scaler.unscale_(optimizer)
    if clip_grad:
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if scaler.is_enabled():
        # An overflow is no failure of the run: the scaler skips the step and lowers its scale.
        # Below 1 the scale is no reason to overflow, and the gradient itself is broken.
        scale = scaler.scale(torch.ones_like(norm))
        norm = torch.where(norm.isfinite() | (scale < 1), norm, 0.0)
    if allows(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class NonFiniteError(UserError):
    """A loss or gradient that is infinite or NaN ends the run; all ranks raise it for one step."""

    def __init__(self, step: int, samples: Tensor | None):
        self.step = step
        self.samples = samples  # this rank's batch, if its own loss is at fault
        self.problem = f"the loss or gradient of step {step} is not finite"
        super().__init__(self.problem, status=1)


class UpdateGuard:
    """Skip updates whose loss or gradient is not finite, up to `limit` in a row, on every rank.

    With a limit of 0 nothing is skipped, nothing read from the device, and Meters.flush raises.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0
        self.bad: tuple[int, Tensor | None] | None = None  # the first bad micro-step of the update

    def observe(self, step: int, samples: Tensor, loss: Tensor) -> None:
        """Look at the loss of a micro-step, on all ranks together."""
        if self.limit and self.bad is None:
            own = loss.detach().float()
            if not _is_finite(all_reduce_mean(own.clone()).item()):
                self.bad = step, samples if not _is_finite(own.item()) else None

    def allows(self, step: int, grad_norm: Tensor) -> bool:
        """Tell whether to apply an update, given the gradient norm that all ranks share.

        Raises:
            NonFiniteError: it is one more in a row than the limit.
        """
        if not self.limit:
            return True
        if self.bad is None and not _is_finite(grad_norm.item()):
            self.bad = step, None
        if self.bad is None:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        (first, samples), self.bad = self.bad, None
        if self.in_a_row > self.limit:
            raise NonFiniteError(first, samples)
        print0(
            f"WARNING: the loss or gradient of step {first} is not finite: update skipped, "
            f"{self.in_a_row} of --skip_nonfinite {self.limit} in a row"
        )
        return False


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def layer_id(name: str, depth: int) -> int:
    """Number a parameter's layer: 0 patches and positions, i + 1 block i, then norm and head."""
    if name.startswith(("patch_embed", "pos_embed", "cls_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def param_groups_lrd(
    model: nn.Module, depth: int, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Group a classifier's parameters by layer and weight decay.

    Every group has `lr_scale` = layer_decay ** (depth + 1 - layer id). 1-D tensors, the class
    token and the positions are not decayed.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name, depth)
        decayed = parameter.ndim > 1 and not name.startswith(("pos_embed", "cls_token"))
        group = groups.setdefault(
            (layer, decayed),
            {
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
