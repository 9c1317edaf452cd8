"""Compare kernels for attention, in bf16 at the shapes of ViT-L.

    python -m benchmarks.attention                    all that this device has
    python -m benchmarks.attention --check            exit 1 if the model takes a wrong or slow one

q, k and v are parts of one product, as in the model, and so are their gradients. "ours" is that of
util/attention.py. Errors are relative norms against float32 on the first 8 clips, the larger one of
output and gradients. Times are medians, of forward and of forward and backward. TFLOP/s count a
multiply-add twice and the backward pass as two forward ones.
"""

import argparse
import sys
import timeit
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from util.args import adder, positive_int
from util.dist import get_device, print0
from util.video_vit import attend, attention

Attend = Callable[[Tensor], Tensor]
# clips, heads, tokens, channels of a head: encoder, decoder, fine-tuning
SHAPES = [(64, 16, 157, 64), (64, 16, 1569, 32), (16, 16, 1569, 64)]
BACKENDS = [getattr(SDPBackend, f"{x}_ATTENTION") for x in ("CUDNN", "FLASH", "EFFICIENT")]
MAX_ERROR, MAX_SLOWDOWN = 0.02, 1.1


def pytorchs(qkv: Tensor) -> Tensor:
    """Return the output (N, L, nh, hd) of the kernel that PyTorch chooses."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def both(attend: Attend, qkv: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the output (N, L, nh, hd) and the gradient of qkv."""
    output = attend(qkv)
    return [output, *torch.autograd.grad(output, qkv, gradient)]


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median time of a call, after some that do not count."""
    for _ in range(min(5, repeats)):
        run()
    if device.type != "cuda":
        return 1e3 * median(timeit.repeat(run, number=1, repeat=repeats))
    torch.cuda._sleep(10**8)  # 50 ms in which the calls queue up: launching takes no part
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    torch.cuda.synchronize(device)
    return median(a.elapsed_time(b) for a, b in pairwise(events))


def compare(shape: tuple[int, ...], repeats: int, device: torch.device) -> str:
    """Print a line per kernel; return what is wrong with the model's choice, if anything."""
    N, nh, L, hd = shape
    options = {"device": device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    qkv = torch.randn(N, L, 3, nh, hd, **options, requires_grad=True)
    gradient = torch.randn(N, L, nh, hd, **options)
    few = qkv[:8].detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        exact = both(pytorchs, few.float(), gradient[:8].float())
    ours = attention is not None and attention.fits(qkv)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    chosen = "ours" if ours else SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    print0(f"{shape}: the model takes {chosen}")
    times: dict[str, float] = {}  # of those that are right
    for backend in [None] * ours + [*BACKENDS, SDPBackend.MATH]:
        name, kernel = (backend.name, pytorchs) if backend else ("ours", attend)
        try:
            with sdpa_kernel(backend or SDPBackend.MATH):
                pairs = zip(both(kernel, few, gradient[:8]), exact, strict=True)
                error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
                with torch.no_grad():
                    fast = milliseconds(partial(kernel, qkv), repeats, device)
                slow = milliseconds(partial(both, kernel, qkv, gradient), repeats, device)
        except RuntimeError as reason:  # out of memory, too
            print0(f"  {name:<20} not available: {' '.join(str(reason).split())[:120]}")
            continue
        if error <= MAX_ERROR:  # false for NaN
            times[name] = slow
        flops = 4e-9 * N * nh * L * L * hd
        print0(
            f"  {name:<20} error {error:6.2%}{'' if name in times else ' WRONG'}  "
            f"{fast:.3f} ms ({flops / fast:.1f} TFLOP/s), "
            f"with backward {slow:.3f} ms ({3 * flops / slow:.1f} TFLOP/s)"
        )
    if chosen not in times:
        return f"{shape}: {chosen} is chosen and wrong"
    best = min(times, key=times.__getitem__)
    slow = times[chosen] > MAX_SLOWDOWN * times[best]
    return f"{shape}: {chosen} is chosen, {best} is faster" if slow else ""


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = adder(parser)
    add("--batch_size", None, "clips; default: 64, and 16 in fine-tuning", positive_int)
    add("--repeats", 20, "turns of every kernel", positive_int)
    add("--device", "auto", "cuda, cpu or auto")
    add("--check", False, "exit 1 if the model takes a kernel that is wrong or 10 % slower")
    args = parser.parse_args(argv)
    shapes = [(args.batch_size or clips, *rest) for clips, *rest in SHAPES]
    found = [compare(shape, args.repeats, get_device(args.device)) for shape in shapes]
    print0("\n".join(filter(None, found)) or "the choices are right and fast")
    if args.check and any(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
