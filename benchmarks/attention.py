"""Compare PyTorch's kernels for attention, in bf16 at the shapes of ViT-L.

    python -m benchmarks.attention                    all kernels that this device has
    python -m benchmarks.attention --check            exit 1 if PyTorch chooses a wrong or slow one

q, k and v are parts of one product, as in the model. Errors are relative norms against float32 on
the first 8 clips, the largest of output and gradients. Times are medians, of forward and of forward
and backward. TFLOP/s count a multiply-add twice and the backward pass as two forward ones.
"""

import argparse
import sys
import timeit
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from util.args import adder, positive_int
from util.dist import get_device, print0

# clips, heads, tokens, channels of a head: encoder, decoder, fine-tuning
SHAPES = [(64, 16, 157, 64), (64, 16, 1569, 32), (16, 16, 1569, 64)]
BACKENDS = [getattr(SDPBackend, f"{x}_ATTENTION") for x in ("CUDNN", "FLASH", "EFFICIENT")]
BACKENDS.append(SDPBackend.MATH)
MAX_ERROR, MAX_SLOWDOWN = 0.02, 1.1


def attend(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the output (N, L, nh, hd) and the gradients of q, k and v."""
    output = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return [output, *torch.autograd.grad(output, (q, k, v), gradient)]


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
    """Print a line per kernel; return what is wrong with PyTorch's choice, if anything."""
    N, nh, L, hd = shape
    options = {"device": device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    qkv = torch.randn(N, L, 3 * nh * hd, **options, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in qkv.view(N, L, 3, nh, hd).unbind(2))  # (N, nh, L, hd)
    inputs = q, k, v, torch.randn(N, L, nh, hd, **options)
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    print0(f"{shape}: PyTorch chooses {chosen.name}")
    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(*(x[:8].float() for x in inputs))
    times: dict[SDPBackend, float] = {}  # of those that are right
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                pairs = zip(attend(*(x[:8] for x in inputs)), exact, strict=True)
                error = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()
                fast = milliseconds(lambda: scaled_dot_product_attention(q, k, v), repeats, device)
                slow = milliseconds(lambda: attend(*inputs), repeats, device)
        except RuntimeError as reason:  # out of memory, too
            print0(f"  {backend.name:<20} not available: {' '.join(str(reason).split())[:120]}")
            continue
        if error <= MAX_ERROR:  # false for NaN
            times[backend] = slow
        flops = 4e-9 * N * nh * L * L * hd
        print0(
            f"  {backend.name:<20} error {error:6.2%}{'' if backend in times else ' WRONG'}  "
            f"{fast:.3f} ms ({flops / fast:.1f} TFLOP/s), "
            f"with backward {slow:.3f} ms ({3 * flops / slow:.1f} TFLOP/s)"
        )
    if chosen not in times:
        return f"{shape}: {chosen.name} is chosen and wrong"
    best = min(times, key=times.__getitem__)
    slow = times[chosen] > MAX_SLOWDOWN * times[best]
    return f"{shape}: {chosen.name} is chosen, {best.name} is faster" if slow else ""


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = adder(parser)
    add("--batch_size", None, "clips; default: 64, and 16 in fine-tuning", positive_int)
    add("--repeats", 20, "turns of every kernel", positive_int)
    add("--device", "auto", "cuda, cpu or auto")
    add("--check", False, "exit 1 if PyTorch chooses a kernel that is wrong or 10 % slower")
    args = parser.parse_args(argv)
    shapes = [(args.batch_size or clips, *rest) for clips, *rest in SHAPES]
    found = [compare(shape, args.repeats, get_device(args.device)) for shape in shapes]
    print0("\n".join(filter(None, found)) or "the choices are right and fast")
    if args.check and any(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
