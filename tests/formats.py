"""Checkpoint files of every format with random weights, and plain forward passes over them.

The builders follow the published tables of names and shapes; the forward passes are written from
each project's definition, on its own names, and share nothing with the models of this project.
Shapes: N clips, L tokens, K visible tokens, D width.
"""

import argparse
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
# names of a decoder's blocks, norm and prediction
DECODER = "decoder_blocks decoder_norm decoder_pred"
VIDEOMAE_DECODER = "decoder.blocks decoder.norm decoder.head"
PYSLOWFAST_DECODER = "pred_head.transforms.0 pred_head.transforms.0.4 pred_head.projections.0"


class Maker:
    """Draw the tensors of a state dict; every bias, norm and token is random."""

    def __init__(self, seed: int = 0):
        self.rng = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def add(self, name: str, *shape: int, around: float = 0.0) -> None:
        scale = 1.0 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        self.state[name] = around + scale * torch.randn(*shape, generator=self.rng)

    def linear(self, name: str, rows: int, columns: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", rows, columns)
        if bias:
            self.add(f"{name}.bias", rows)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, around=1.0)
        self.add(f"{name}.bias", width)

    def blocks(self, prefixes: Iterable[str], width: int, qkv: str) -> None:
        """Add blocks; qkv is "separate", "fused" or "videomae" (fused, q and v biases)."""
        for prefix in prefixes:
            self.norm(f"{prefix}.norm1", width)
            if qkv == "separate":
                for part in "qkv":
                    self.linear(f"{prefix}.attn.{part}", width, width)
            else:
                self.linear(f"{prefix}.attn.qkv", 3 * width, width, bias=qkv == "fused")
                if qkv == "videomae":
                    self.add(f"{prefix}.attn.q_bias", width)
                    self.add(f"{prefix}.attn.v_bias", width)
            self.linear(f"{prefix}.attn.proj", width, width)
            self.norm(f"{prefix}.norm2", width)
            self.linear(f"{prefix}.mlp.fc1", 4 * width, width)
            self.linear(f"{prefix}.mlp.fc2", width, 4 * width)

    def encoder(self, D: int, depth: int, qkv: str, *patch: int, prefix="", norm="norm") -> None:
        """Add patch embedding, blocks and norm; patch is the kernel's size."""
        self.add(f"{prefix}patch_embed.proj.weight", D, 3, *patch)
        self.add(f"{prefix}patch_embed.proj.bias", D)
        self.blocks(numbered(f"{prefix}blocks", depth), D, qkv)
        self.norm(prefix + norm, D)

    def decoder(self, d: int, depth: int, qkv: str, pred: int, names: str = DECODER) -> None:
        """Add mask token, blocks, norm and prediction of pred values, under these names."""
        blocks, norm, head = names.split()
        self.add("mask_token", 1, 1, d)
        self.blocks(numbered(blocks, depth), d, qkv)
        self.norm(norm, d)
        self.linear(head, pred, d)


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i}" for i in range(count)]


def pyslowfast(D=128, depth=2, d=128, grid=(4, 4, 4), p=16, fused=False, decoder=True) -> dict:
    """A PySlowFast file: pre-training with its decoder, or fine-tuned to 7 classes."""
    t, h, w = grid
    make, qkv = Maker(), "fused" if fused else "separate"
    make.add("cls_token", 1, 1, D)
    make.add("pos_embed_spatial", 1, h * w, D)
    make.add("pos_embed_temporal", 1, t, D)
    make.add("pos_embed_class", 1, 1, D)
    make.encoder(D, depth, qkv, 2, p, p)
    if decoder:
        make.linear("decoder_embed", d, D)
        make.add("decoder_pos_embed", 1, 1 + t * h * w, d)
        make.decoder(d, 4, qkv, 3 * p * p, PYSLOWFAST_DECODER)
    else:
        make.linear("head.projection", 7, D)
    return {"epoch": 3, "model_state": make.state, "cfg": "MASK: on"}


def reference(grid=(4, 4, 4), decoder=True) -> dict:
    """A training file of the reference implementation, its flags in an argparse.Namespace."""
    D, d, p = 128, 64, 16
    t, h, w = grid
    make = Maker(1)
    for prefix, width in [("", D)] + [("decoder_", d)] * decoder:
        make.add(f"{prefix}cls_token", 1, 1, width)
        make.add(f"{prefix}pos_embed_spatial", 1, h * w, width)
        make.add(f"{prefix}pos_embed_temporal", 1, t, width)
        make.add(f"{prefix}pos_embed_class", 1, 1, width)
    make.encoder(D, 2, "separate", 2, p, p)
    if decoder:
        make.linear("decoder_embed", d, D)
        make.decoder(d, 4, "separate", 3 * p * p)
    else:
        make.linear("head", 7, D)
    args = argparse.Namespace(num_frames=2 * t, input_size=h * p, norm_pix_loss=True)
    return {"model": make.state, "optimizer": {}, "epoch": 99, "scaler": {}, "args": args}


def first_release() -> dict:
    """A demo file: joint fixed positions, no class token, both frames of a patch predicted."""
    D, d = 128, 64
    make = Maker(2)
    make.add("pos_embed", 1, 1568, D)
    make.add("decoder_pos_embed", 1, 1568, d)
    make.encoder(D, 2, "fused", 2, 16, 16)
    make.linear("decoder_embed", d, D)
    make.decoder(d, 4, "fused", 1536)
    return {"model": make.state}


def image_mae(kind: str, p=16, side=4) -> dict:
    """An image MAE file: "full", "encoder", "fine-tuned" (mean pooling) or "class token"."""
    D, d = 128, 64
    make = Maker(3)
    make.add("cls_token", 1, 1, D)
    make.add("pos_embed", 1, 1 + side * side, D)
    make.encoder(D, 2, "fused", p, p, norm="fc_norm" if kind == "fine-tuned" else "norm")
    if kind in ("fine-tuned", "class token"):
        make.linear("head", 7, D)
    if kind == "full":
        make.linear("decoder_embed", d, D)
        make.add("decoder_pos_embed", 1, 1 + side * side, d)
        make.decoder(d, 8, "fused", 3 * p * p)
    return {"model": make.state}


def videomae(kind: str, side=4, frames=8, D=128, depth=2) -> dict:
    """An original VideoMAE file, "pretrain" or "finetune"; positions are not stored."""
    d, p = 64, 16
    make = Maker(4)
    if kind == "pretrain":
        make.encoder(D, depth, "videomae", 2, p, p, prefix="encoder.")
        make.linear("encoder_to_decoder", d, D, bias=False)
        make.decoder(d, 4, "videomae", 1536, VIDEOMAE_DECODER)
    else:
        make.encoder(D, depth, "videomae", 2, p, p, norm="fc_norm")
        make.linear("head", 7, D)
    args = argparse.Namespace(input_size=side * p, num_frames=frames)
    return {"model" if kind == "pretrain" else "module": make.state, "args": args}


# --- plain forward passes -----------------------------------------------------------------------


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    if f"{name}.qkv.weight" in state:
        y = x @ state[f"{name}.qkv.weight"].T
        if f"{name}.qkv.bias" in state:
            y = y + state[f"{name}.qkv.bias"]
        elif f"{name}.q_bias" in state:
            q_bias, v_bias = state[f"{name}.q_bias"], state[f"{name}.v_bias"]
            y = y + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        q, k, v = y.chunk(3, dim=-1)
    else:
        q, k, v = (linear(state, f"{name}.{part}", x) for part in "qkv")
    width = x.shape[-1] // heads
    results = []
    for i in range(heads):
        part = slice(i * width, (i + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(width)
        results.append(scores.softmax(-1) @ v[..., part])
    return linear(state, f"{name}.proj", torch.cat(results, dim=-1))


def run_blocks(state: State, prefixes: Iterable[str], x: Tensor, heads: int) -> Tensor:
    for prefix in prefixes:
        x = x + attention(state, f"{prefix}.attn", layer_norm(state, f"{prefix}.norm1", x), heads)
        y = F.gelu(linear(state, f"{prefix}.mlp.fc1", layer_norm(state, f"{prefix}.norm2", x)))
        x = x + linear(state, f"{prefix}.mlp.fc2", y)
    return x


def patches(state: State, clips: Tensor, prefix: str = "") -> Tensor:
    """Embed patches by a real convolution: [N, L, D]."""
    weight = state[f"{prefix}patch_embed.proj.weight"]
    bias = state[f"{prefix}patch_embed.proj.bias"]
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    return convolve(clips, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def separable(state: State) -> Tensor:
    """Add positions of space and time, one token after the other: [L, D]."""
    spatial, temporal = state["pos_embed_spatial"][0], state["pos_embed_temporal"][0]
    return torch.stack([row + moment for moment in temporal for row in spatial])


def sinusoids(tokens: int, width: int) -> Tensor:
    """Compute VideoMAE's position table number by number: [L, D]."""
    rows = []
    for position in range(tokens):
        angles = [position / 10000 ** (2 * (j // 2) / width) for j in range(width)]
        rows.append([math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(angles)])
    return torch.tensor(rows)


def scatter(visible: Tensor, mask_token: Tensor, keep: Tensor, tokens: int) -> Tensor:
    """Put visible tokens [1, K, D] at their places among mask tokens: [1, L, D]."""
    full = mask_token.expand(1, tokens, -1).clone()
    full[:, keep] = visible
    return full


def encode(state: State, x: Tensor, cls: Tensor | None = None, prefix: str = "") -> Tensor:
    """Run the blocks and the norm of an encoder, with a class token before tokens [N, K, D]."""
    x = x if cls is None else torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    depth = len([k for k in state if k.startswith(f"{prefix}blocks.") and "norm1.bias" in k])
    x = run_blocks(state, numbered(f"{prefix}blocks", depth), x, x.shape[-1] // 64)
    return layer_norm(state, f"{prefix}norm", x)


def decode(state: State, x: Tensor, depth: int, heads: int, names: str = DECODER) -> Tensor:
    blocks, norm, head = names.split()
    x = run_blocks(state, numbered(blocks, depth), x, heads)
    return linear(state, head, layer_norm(state, norm, x))


def pyslowfast_decode(state: State, clip: Tensor, keep: Tensor) -> Tensor:
    """Predict all patches [1, L, 768]: the encoder's class token goes through the decoder."""
    x = (patches(state, clip) + separable(state))[:, keep]
    x = encode(state, x, state["cls_token"] + state["pos_embed_class"])
    x = linear(state, "decoder_embed", x)
    tokens = state["decoder_pos_embed"].shape[1] - 1
    full = scatter(x[:, 1:], state["mask_token"], keep, tokens)
    x = torch.cat([x[:, :1], full], dim=1) + state["decoder_pos_embed"]
    return decode(state, x, 4, x.shape[-1] // 64, PYSLOWFAST_DECODER)[:, 1:]


def pyslowfast_classify(state: State, clips: Tensor) -> Tensor:
    x = patches(state, clips) + separable(state)
    cls = (state["cls_token"] + state["pos_embed_class"]).expand(len(x), -1, -1)
    x = run_blocks(state, numbered("blocks", 2), torch.cat([cls, x], dim=1), 2)
    return linear(state, "head.projection", layer_norm(state, "norm", x[:, 1:].mean(1)))


def reference_decode(state: State, clip: Tensor, keep: Tensor) -> Tensor:
    """Predict all patches [1, L, 768]: the decoder has its class token and 16 heads."""
    x = (patches(state, clip) + separable(state))[:, keep]
    x = encode(state, x, state["cls_token"] + state["pos_embed_class"])[:, 1:]
    pos = separable({k.removeprefix("decoder_"): v for k, v in state.items() if "decoder_pos" in k})
    x = scatter(linear(state, "decoder_embed", x), state["mask_token"], keep, len(pos)) + pos
    cls = state["decoder_cls_token"] + state["decoder_pos_embed_class"]
    return decode(state, torch.cat([cls, x], dim=1), 4, 16)[:, 1:]


def first_release_decode(state: State, clip: Tensor, keep: Tensor) -> Tensor:
    """Predict both frames of all patches, [1, 1568, 1536], without class tokens."""
    x = encode(state, (patches(state, clip) + state["pos_embed"])[:, keep])
    x = scatter(linear(state, "decoder_embed", x), state["mask_token"], keep, 1568)
    return decode(state, x + state["decoder_pos_embed"], 4, 16)


def videomae_decode(state: State, clip: Tensor, keep: Tensor) -> Tensor:
    """Predict the removed patches [1, L - K, 1536] as VideoMAE does: they come after the others."""
    x = patches(state, clip, "encoder.")
    tokens = x.shape[1]
    removed = torch.tensor([i for i in range(tokens) if i not in keep.tolist()])
    x = encode(state, (x + sinusoids(tokens, x.shape[-1]))[:, keep], prefix="encoder.")
    x = linear(state, "encoder_to_decoder", x)
    pos = sinusoids(tokens, x.shape[-1])
    x = torch.cat([x + pos[keep], state["mask_token"] + pos[removed]], dim=1)
    return decode(state, x, 4, 1, VIDEOMAE_DECODER)[:, len(keep) :]


def videomae_classify(state: State, clips: Tensor) -> Tensor:
    x = patches(state, clips)
    x = x + sinusoids(*x.shape[1:])
    x = run_blocks(state, numbered("blocks", 2), x, 2)
    return linear(state, "head", layer_norm(state, "fc_norm", x.mean(1)))


def image_decode(state: State, image: Tensor, keep: Tensor) -> Tensor:
    """Predict all patches of an image [1, L, 768]."""
    x = (patches(state, image) + state["pos_embed"][:, 1:])[:, keep]
    x = encode(state, x, state["cls_token"] + state["pos_embed"][:, :1])
    x = linear(state, "decoder_embed", x)
    full = scatter(x[:, 1:], state["mask_token"], keep, state["pos_embed"].shape[1] - 1)
    x = torch.cat([x[:, :1], full], dim=1) + state["decoder_pos_embed"]
    return decode(state, x, 8, 16)[:, 1:]
