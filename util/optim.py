"""One optimiser step and what it needs: parameter groups, precision, ranks, a guard against NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from util.dist import all_reduce_mean, print0, world_size
from util.errors import UserError

if TYPE_CHECKING:
    from util.video_vit import Encoder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def param_groups_weight_decay(
    model: nn.Module, weight_decay: float, bias_wd: bool = False
) -> list[dict[str, Any]]:
    """Split parameters into two groups: without weight decay (biases and 1-D tensors), and with.

    With bias_wd, norm weights are decayed too and biases still are not, as in the reference.
    """
    no_decay, decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith(".bias") or (parameter.ndim <= 1 and not bias_wd)
            (no_decay if exempt else decay).append(parameter)
    decayed = {"params": decay, "weight_decay": weight_decay}
    return [{"params": no_decay, "weight_decay": 0.0}, decayed]


def layer_id(name: str, depth: int) -> int:
    """Number the layers: 0 for patches and positions, i + 1 for block i, depth + 1 for the rest."""
    if name.startswith(("patch_embed", "pos_embed", "cls_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def param_groups_lrd(
    model: nn.Module, depth: int, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Group a classifier's parameters by layer and weight decay; earlier layers learn more slowly.

    Every group has `lr_scale` = layer_decay ** (depth + 1 - layer id). 1-D tensors, the class
    token and the positions are not decayed.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name, depth)
        decayed = parameter.ndim > 1 and not name.startswith(("pos_embed", "cls_token"))
        scale, decay = layer_decay ** (depth + 1 - layer), weight_decay if decayed else 0.0
        new = {"lr_scale": scale, "weight_decay": decay, "params": []}
        groups.setdefault((layer, decayed), new)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], device: torch.device
) -> AdamW:
    """Build AdamW; the engines set its learning rate before every update (util/lr_sched.py)."""
    return AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cuda", "cpu"))


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 itself; others emulate it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(name: str | None, device: torch.device) -> str:
    """Return the given precision, or by default bf16 on a GPU that has it and fp32 elsewhere."""
    if name:
        return name
    return "bf16" if device.type == "cuda" and has_fast_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Run the forward pass in bf16 or fp16; with fp32 this does nothing."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Build the loss scaler that fp16 needs; with bf16 and fp32 it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def prepare_model(
    model: Encoder,
    device: torch.device,
    compile_blocks: bool,
    grad_checkpointing: bool,
    dynamic: bool | None = None,
) -> nn.Module:
    """Compile the blocks and set gradient checkpointing as asked; wrap for several ranks (DDP).

    Raise UserError if torch.compile does not work here (no C++ compiler, no Triton ...).
    """
    model.grad_checkpointing = grad_checkpointing
    if compile_blocks:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=device))  # fails now, not hours later
        except Exception as error:  # every compiler raises its own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--compile: torch.compile does not work here: {reason}") from error
        model.compile_blocks(dynamic)
    if world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)


def grad_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Wrap a forward and backward pass; average its gradients over ranks only where enabled."""
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
    """Unscale the gradients, clip their global norm, step if `allows` agrees, clear them.

    Returns:
        the gradient norm before clipping, a scalar on the device (reading it waits for the GPU); 0
        if the gradient overflowed only because of the loss scale, and the step is skipped.
    """
    scaler.unscale_(optimizer)
    if clip_grad:
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if scaler.is_enabled():
        # An overflow is normal in fp16: the scaler skips the step and lowers its scale. At a
        # scale below 1, however, the scale cannot be the cause: the gradient itself is broken.
        scale = scaler.scale(torch.ones_like(norm))
        norm = torch.where(norm.isfinite() | (scale < 1), norm, 0.0)
    if allows(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class WeightAverage(ModelEmaV3):
    """A moving average of a model's weights; it follows every step that the optimizer takes.

    At the n-th step the decay is at most (n - 1) / (n + 9), so that the average never reaches much
    further back than the last tenth of the steps so far.
    """

    def __init__(self, model: nn.Module, decay: float, optimizer: Optimizer):
        super().__init__(model, decay, use_warmup=True, warmup_gamma=10, warmup_power=1)
        self.updates = 0

        def follow(*_: Any) -> None:
            overflow = getattr(optimizer, "found_inf", None)  # in fp16: a fused step skips itself
            if overflow is None or not overflow.item():
                self.updates += 1
                self.update(model, self.updates)

        optimizer.register_step_post_hook(follow)


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; every rank raises it for the same step."""

    def __init__(self, step: int, samples: Tensor | None):
        self.problem = f"the loss or gradient of step {step} is not finite"
        super().__init__(self.problem, status=1)
        self.step = step
        self.samples = samples  # this rank's batch (rows of the csv), if its own loss is at fault


class UpdateGuard:
    """Skip updates whose loss or gradient is not finite, at most `limit` in a row.

    All ranks decide the same. With a limit of 0 the guard lets all updates pass and never waits for
    the device; the run then stops in Meters.flush, when the bad value is read.
    """

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0
        self.bad: tuple[int, Tensor | None] | None = None  # first bad micro-step of this update

    def observe(self, step: int, samples: Tensor, loss: Tensor) -> None:
        """Check the loss of a micro-step on all ranks together."""
        if self.limit and self.bad is None:
            own = loss.detach().float()
            if not math.isfinite(all_reduce_mean(own.clone()).item()):
                self.bad = step, samples if not math.isfinite(own.item()) else None

    def allows(self, step: int, grad_norm: Tensor) -> bool:
        """Return whether to apply an update, given the gradient norm, which all ranks share.

        Raises:
            NonFiniteError: more than `limit` updates in a row were bad.
        """
        if not self.limit:
            return True
        if self.bad is None and not math.isfinite(grad_norm.item()):
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
