# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleMethodOverride=false
"""Attention of packed queries, keys and values on a GPU, written in Triton.

The scores never leave the chip (FlashAttention-2, arXiv 2307.08691): the forward pass goes through
the keys, a tile at a time, with a running softmax; the backward pass computes the scores again,
once for the gradients of queries and once for those of keys and values. Nothing is added up by
atomic operations, so results are the same in every run. With the narrow heads of the paper's
decoder this is 1.4 times as fast as PyTorch's best kernel, and with the encoder's few visible
tokens 1.6 times (benchmarks/RESULTS.md): tiles are small, and gradients are written where the
product for q, k and v needs them.

Shapes: N clips, L tokens, nh heads, hd channels of a head. Exponentials are powers of 2: `scale` is
log2(e) / sqrt(hd), a constant of the kernels (compiled callers would pass it in double precision).
"""

import math
import os
import shutil
import sysconfig

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of the fastest kernels on an H200, by hd: queries and keys of a tile, warps, pipeline stages
Tile = tuple[int, int, int, int]
TILES: dict[int, tuple[Tile, Tile, Tile]] = {  # forward; gradients of q; of k and v
    32: ((64, 64, 4, 3), (64, 32, 4, 4), (32, 64, 4, 4)),
    64: ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
}
MAX_TOKENS = {32: math.inf, 64: 512}  # beyond, PyTorch's kernels are as fast
# Triton builds a launcher for every kernel from C.
HAS_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
HAS_COMPILER &= os.path.exists(
    os.path.join(sysconfig.get_paths("posix_prefix")["include"], "Python.h")
)


def fits(qkv: Tensor) -> bool:
    """Return whether the kernels take qkv [N, L, 3, nh, hd] and are faster than PyTorch's."""
    if qkv.device.type != "cuda" or torch.version.hip or not HAS_COMPILER:
        return False
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    if qkv.shape[1] > MAX_TOKENS.get(qkv.shape[-1], 0) or not qkv.is_contiguous():
        return False
    return torch.cuda.get_device_properties(qkv.device).major >= 8


def attention(qkv: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(hd)) v, [N, L, nh, hd], of bf16 or fp16 qkv [N, L, 3, nh, hd]."""
    return _Attention.apply(qkv)


class _Attention(torch.autograd.Function):  # torch.compile looks into it and calls the kernels
    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        N, L, _, nh, hd = qkv.shape
        output = qkv.new_empty(N, L, nh, hd)
        norm = qkv.new_empty(N * nh, L, dtype=torch.float32)  # log2 of the sum of exponentials
        M, K, warps, stages = TILES[hd][0]
        tensors, sizes, grid = (qkv, output, norm), (L, nh, _scale(hd), hd), -(-L // M) * N * nh
        with torch.cuda.device(qkv.get_device()):  # Triton launches on the current device
            _attention_forward[(grid,)](*tensors, *sizes, M, K, stages, num_warps=warps)
        ctx.save_for_backward(qkv, output, norm)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        qkv, output, norm = ctx.saved_tensors
        N, L, _, nh, hd = qkv.shape
        result, gradient = torch.empty_like(qkv), gradient.contiguous()
        inner = torch.empty_like(norm)  # products of output and gradient, by the first kernel
        sizes = L, nh, _scale(hd), hd**-0.5, hd
        _, (M, K, warps, stages), (M2, K2, warps2, stages2) = TILES[hd]
        with torch.cuda.device(qkv.get_device()):
            grid = (-(-L // M) * N * nh,)
            tensors = qkv, output, gradient, norm, inner, result
            _attention_gradient_of_q[grid](*tensors, *sizes, M, K, stages, num_warps=warps)
            grid = (-(-L // K2) * N * nh,)
            tensors = qkv, gradient, norm, inner, result
            _attention_gradients_of_kv[grid](*tensors, *sizes, M2, K2, stages2, num_warps=warps2)
        return result


def _scale(hd: int) -> float:
    return math.log2(math.e) / math.sqrt(hd)


# --- kernels: a program has one tile of one head ------------------------------------------------
# ROW is the distance, in elements, from a token to the next one in qkv, OUT in the output.


@triton.jit
def _place(L, nh, TILE: tl.constexpr):
    """Return the first token of this program's tile, its clip (int64) and its head."""
    tiles = tl.cdiv(L, TILE)
    head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles * TILE, (head // nh).to(tl.int64), head % nh


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    """Load a tile; tokens outside the clip are 0."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend(q, ks, vs, inside, top, total, acc, scale, MASKED: tl.constexpr):
    """Take a tile of keys and values into the running softmax."""
    s = tl.dot(q, _load(ks, inside[None, :], MASKED))  # (M, K)
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.math.exp2(s * scale - new[:, None])
    shrink = tl.math.exp2(top - new)
    v = _load(vs, inside[:, None], MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _attention_forward(
    qkv, output, norm, L, nh, scale: tl.constexpr,
    HD: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, clip, head = _place(L, nh, M)
    d, ROW, OUT = tl.arange(0, HD), 3 * nh * HD, nh * HD
    queries, keys = start + tl.arange(0, M), tl.arange(0, K)
    qkv += clip * L * ROW + head * HD
    q = tl.load(qkv + queries[:, None] * ROW + d, mask=queries[:, None] < L, other=0.0)  # (M, HD)
    ks = qkv + OUT + keys[None, :] * ROW + d[:, None]  # (HD, K)
    vs = qkv + 2 * OUT + keys[:, None] * ROW + d  # (K, HD)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HD], tl.float32)
    whole = L // K * K
    for k in tl.range(0, whole, K, num_stages=STAGES):
        at = k * ROW
        top, total, acc = _attend(q, ks + at, vs + at, keys < L, top, total, acc, scale, False)
    if whole < L:
        at = whole * ROW
        rest = whole + keys < L
        top, total, acc = _attend(q, ks + at, vs + at, rest, top, total, acc, scale, True)
    to = output + clip * L * OUT + head * HD + queries[:, None] * OUT + d
    tl.store(to, (acc / total[:, None]).to(output.dtype.element_ty), mask=queries[:, None] < L)
    tl.store(norm + (clip * nh + head) * L + queries, top + tl.math.log2(total), mask=queries < L)


@triton.jit
def _add_to_queries(q, g, ks, vs, norm, inner, inside, dq, scale, MASKED: tl.constexpr):
    """Add what a tile of keys contributes to the gradients of queries."""
    k, v = _load(ks, inside[None, :], MASKED), _load(vs, inside[None, :], MASKED)  # (HD, K)
    p = tl.math.exp2(tl.dot(q, k) * scale - norm[:, None])  # (M, K)
    ds = p * (tl.dot(g, v) - inner[:, None])
    return tl.dot(ds.to(k.dtype), tl.trans(k), dq)  # keys outside are 0


@triton.jit
def _attention_gradient_of_q(
    qkv, output, gradient, norm, inner, result, L, nh, scale: tl.constexpr, unit: tl.constexpr,
    HD: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, clip, head = _place(L, nh, M)
    d, ROW, OUT = tl.arange(0, HD), 3 * nh * HD, nh * HD
    queries, keys = start + tl.arange(0, M), tl.arange(0, K)
    here = clip * L * ROW + head * HD + queries[:, None] * ROW + d
    q = tl.load(qkv + here, mask=queries[:, None] < L, other=0.0)  # (M, HD)
    there = clip * L * OUT + head * HD + queries[:, None] * OUT + d
    g = tl.load(gradient + there, mask=queries[:, None] < L, other=0.0)
    o = tl.load(output + there, mask=queries[:, None] < L, other=0.0)
    products = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)  # (M,)
    scalars = (clip * nh + head) * L + queries
    tl.store(inner + scalars, products, mask=queries < L)
    norms = tl.load(norm + scalars, mask=queries < L, other=0.0)
    ks = qkv + clip * L * ROW + head * HD + OUT + keys[None, :] * ROW + d[:, None]  # (HD, K)
    dq = tl.zeros([M, HD], tl.float32)
    whole = L // K * K
    for k in tl.range(0, whole, K, num_stages=STAGES):
        to = ks + k * ROW
        dq = _add_to_queries(q, g, to, to + OUT, norms, products, keys < L, dq, scale, False)
    if whole < L:
        to, rest = ks + whole * ROW, whole + keys < L
        dq = _add_to_queries(q, g, to, to + OUT, norms, products, rest, dq, scale, True)
    tl.store(result + here, (dq * unit).to(result.dtype.element_ty), mask=queries[:, None] < L)


@triton.jit
def _add_to_keys(k, v, qs, gs, norms, inners, inside, dk, dv, scale, MASKED: tl.constexpr):
    """Add what a tile of queries contributes to the gradients of keys and values."""
    q, g = _load(qs, inside[None, :], MASKED), _load(gs, inside[:, None], MASKED)
    norm, inner = _load(norms, inside, MASKED), _load(inners, inside, MASKED)
    p = tl.math.exp2(tl.dot(k, q) * scale - norm[None, :])  # (K, M), the softmax
    dv = tl.dot(p.to(g.dtype), g, dv)  # queries outside have gradients of 0
    ds = p * (tl.dot(v, tl.trans(g)) - inner[None, :])
    return tl.dot(ds.to(q.dtype), tl.trans(q), dk), dv


@triton.jit
def _attention_gradients_of_kv(
    qkv, gradient, norm, inner, result, L, nh, scale: tl.constexpr, unit: tl.constexpr,
    HD: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, clip, head = _place(L, nh, K)
    d, ROW, OUT = tl.arange(0, HD), 3 * nh * HD, nh * HD
    keys, queries = start + tl.arange(0, K), tl.arange(0, M)
    here = clip * L * ROW + head * HD + OUT + keys[:, None] * ROW + d
    k = tl.load(qkv + here, mask=keys[:, None] < L, other=0.0)  # (K, HD)
    v = tl.load(qkv + here + OUT, mask=keys[:, None] < L, other=0.0)
    qs = qkv + clip * L * ROW + head * HD + queries[None, :] * ROW + d[:, None]  # (HD, M)
    gs = gradient + clip * L * OUT + head * HD + queries[:, None] * OUT + d  # (M, HD)
    norm += (clip * nh + head) * L + queries
    inner += (clip * nh + head) * L + queries
    dk = tl.zeros([K, HD], tl.float32)
    dv = tl.zeros([K, HD], tl.float32)
    whole = L // M * M
    for m in tl.range(0, whole, M, num_stages=STAGES):
        dk, dv = _add_to_keys(
            k, v, qs + m * ROW, gs + m * OUT, norm + m, inner + m, queries < L, dk, dv, scale, False
        )
    if whole < L:
        m = whole
        rest = m + queries < L
        dk, dv = _add_to_keys(
            k, v, qs + m * ROW, gs + m * OUT, norm + m, inner + m, rest, dk, dv, scale, True
        )
    tl.store(result + here, (dk * unit).to(result.dtype.element_ty), mask=keys[:, None] < L)
    tl.store(result + here + OUT, dv.to(result.dtype.element_ty), mask=keys[:, None] < L)
