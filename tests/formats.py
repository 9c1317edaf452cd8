"""Checkpoint files of every format with random weights, and plain forward passes over them.

The builders follow the published tables of names and shapes; the forward passes are written from
each project's definition, on its own names, and share nothing with the models of this project.
Shapes: N clips, L tokens, K visible tokens, D width.
"""

import argparse
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

State = dict[str, Tensor]
# names of a decoder's blocks, norm and prediction
DECODER = "decoder_blocks decoder_norm decoder_pred"
VIDEOMAE_DECODER = "decoder.blocks decoder.norm decoder.head"
PYSLOWFAST_DECODER = "pred_head.transforms.0 pred_head.transforms.0.4 pred_head.projections.0"
# mean and standard deviation, per channel
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.45,) * 3, (0.225,) * 3)


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


# What PySlowFast writes beside the weights, as it writes it, without most sections on training.
PYSLOWFAST_CFG = """
BN: {NORM_TYPE: batchnorm, NUM_SPLITS: 1, USE_PRECISE_STATS: false, WEIGHT_DECAY: 0.0}
DATA:
  DECODING_BACKEND: torchvision
  INPUT_CHANNEL_NUM: [3]
  MEAN: [0.45, 0.45, 0.45]
  NUM_FRAMES: 8
  PATH_TO_DATA_DIR: /data/k400
  SAMPLING_RATE: 8
  STD: [0.225, 0.225, 0.225]
  TARGET_FPS: 30
  TEST_CROP_SIZE: 64
  TRAIN_CROP_SIZE: 64
  TRAIN_JITTER_SCALES: [256, 320]
  TRAIN_JITTER_SCALES_RELATIVE: [0.5, 1.0]
MASK:
  DECODER_DEPTH: 4
  DECODER_EMBED_DIM: 128
  DECODER_SEP_POS_EMBED: false
  DEC_KV_KERNEL: []
  DEC_KV_STRIDE: []
  ENABLE: true
  HEAD_TYPE: separate_xformer
  MAE_ON: true
  MAE_RND_MASK: true
  NORM_PRED_PIXEL: true
  PER_FRAME_MASKING: false
  PRED_HOG: false
  PRETRAIN_DEPTH: [1]
  TIME_STRIDE_LOSS: true
MODEL:
  ACT_CHECKPOINT: false
  ARCH: maskmvit
  DROPOUT_RATE: 0.0
  HEAD_ACT: softmax
  LOSS_FUNC: multi_mse
  MODEL_NAME: MaskMViT
  NUM_CLASSES: 7
MVIT:
  CLS_EMBED_ON: true
  DEPTH: 2
  DIM_MUL: []
  DIM_MUL_IN_ATT: false
  DROPOUT_RATE: 0.0
  DROPPATH_RATE: 0.0
  EMBED_DIM: 128
  HEAD_INIT_SCALE: 1.0
  HEAD_MUL: []
  LAYER_SCALE_INIT_VALUE: 0.0
  MLP_RATIO: 4.0
  MODE: conv
  NORM: layernorm
  NORM_STEM: false
  NUM_HEADS: 2
  PATCH_2D: false
  PATCH_KERNEL: [2, 16, 16]
  PATCH_PADDING: [0, 0, 0]
  PATCH_STRIDE: [2, 16, 16]
  POOL_FIRST: false
  POOL_KVQ_KERNEL: null
  POOL_KV_STRIDE: []
  POOL_KV_STRIDE_ADAPTIVE: null
  POOL_Q_STRIDE: []
  QKV_BIAS: true
  REL_POS_SPATIAL: false
  REL_POS_TEMPORAL: false
  REL_POS_ZERO_INIT: false
  RESIDUAL_POOLING: false
  REV: {BUFFER_LAYERS: [], ENABLE: false, PRE_Q_FUSION: avg, RESPATH_FUSE: concat, RES_PATH: conv}
  SEPARATE_QKV: false
  SEP_POS_EMBED: true
  USE_ABS_POS: true
  USE_FIXED_SINCOS_POS: false
  USE_MEAN_POOLING: true
  ZERO_DECAY_POS_CLS: true
NUM_GPUS: 8
SOLVER: {BASE_LR: 0.0001, BETAS: [0.9, 0.95], MAX_EPOCH: 400, OPTIMIZING_METHOD: adamw}
TEST: {BATCH_SIZE: 64, NUM_ENSEMBLE_VIEWS: 7, NUM_SPATIAL_CROPS: 3}
TRAIN: {BATCH_SIZE: 512, CHECKPOINT_FILE_PATH: "", DATASET: kinetics, ENABLE: true}
"""


def changed_cfg(cfg: str, changes: dict[str, Any]) -> str:
    """Set entries of a configuration, SECTION.NAME."""
    tree = yaml.safe_load(cfg)
    for entry, value in changes.items():
        *sections, name = entry.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return yaml.safe_dump(tree)


def pyslowfast_run(changes: dict[str, Any] | None = None, decoder=False) -> dict:
    """A file of a PySlowFast run, of the model that its changed configuration describes."""
    cfg = changed_cfg(PYSLOWFAST_CFG, changes or {})
    data, mask, mvit = (yaml.safe_load(cfg)[section] for section in ("DATA", "MASK", "MVIT"))
    make, D, d, p = Maker(5), mvit["EMBED_DIM"], mask["DECODER_EMBED_DIM"], 16
    t, side, cls = data["NUM_FRAMES"] // 2, data["TRAIN_CROP_SIZE"] // p, mvit["CLS_EMBED_ON"]

    def positions(separable: bool, joint: str, parts: str, width: int) -> None:
        if not separable:
            make.add(joint, 1, int(cls) + t * side * side, width)
            return
        make.add(f"{parts}_spatial", 1, side * side, width)
        make.add(f"{parts}_temporal", 1, t, width)
        if cls:
            make.add(f"{parts}_class", 1, 1, width)

    if cls:
        make.add("cls_token", 1, 1, D)
    positions(mvit["SEP_POS_EMBED"], "pos_embed", "pos_embed", D)
    make.encoder(D, mvit["DEPTH"], "separate" if mvit["SEPARATE_QKV"] else "fused", 2, p, p)
    if decoder:
        make.linear("decoder_embed", d, D)
        positions(mask["DECODER_SEP_POS_EMBED"], "decoder_pos_embed", "dec_pos_embed", d)
        frames = 1 if mask["TIME_STRIDE_LOSS"] else 2
        make.decoder(d, mask["DECODER_DEPTH"], "fused", frames * 3 * p * p, PYSLOWFAST_DECODER)
    else:
        make.linear("head.projection", yaml.safe_load(cfg)["MODEL"]["NUM_CLASSES"], D)
    state = with_layer_scale(make.state) if mvit["LAYER_SCALE_INIT_VALUE"] else make.state
    return {"epoch": 399, "model_state": state, "optimizer_state": {}, "cfg": cfg}


def with_layer_scale(state: State, names: str = "gamma_1 gamma_2") -> State:
    """Add layer scale to all blocks, near 0.5 so that leaving it out shows."""
    make = Maker(6)
    for key in [key for key in state if key.endswith(".norm1.bias")]:
        for name in names.split():
            make.add(key.replace("norm1.bias", name), len(state[key]), around=0.5)
    return state | make.state


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


def image_mae(kind: str, p=16, side=4, args: dict[str, Any] | None = None) -> dict:
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
    file = {"model": make.state}
    return file if args is None else file | {"epoch": 799, "args": argparse.Namespace(**args)}


def videomae(kind: str, side=4, frames=8, D=128, depth=2, **more: Any) -> dict:
    """An original VideoMAE file: "pretrain", "finetune" (mean pooling) or "first token".

    Positions are not stored; `more` are flags of the run.
    """
    d, p = 64, 16
    make = Maker(4)
    if kind == "pretrain":
        make.encoder(D, depth, "videomae", 2, p, p, prefix="encoder.")
        make.linear("encoder_to_decoder", d, D, bias=False)
        make.decoder(d, 4, "videomae", 1536, VIDEOMAE_DECODER)
    else:
        norm = "fc_norm" if kind == "finetune" else "norm"
        make.encoder(D, depth, "videomae", 2, p, p, norm=norm)
        make.linear("head", 7, D)
    args = argparse.Namespace(input_size=side * p, num_frames=frames, **more)
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


def layer_scale(state: State, prefix: str, branch: int) -> Tensor | float:
    """Return the factors of a block's branch: 1 for attention, 2 for the MLP."""
    names = (f"{prefix}.gamma_{branch}", f"{prefix}.ls{branch}.gamma")
    return next((state[name] for name in names if name in state), 1.0)


def run_blocks(state: State, prefixes: Iterable[str], x: Tensor, heads: int) -> Tensor:
    for prefix in prefixes:
        y = attention(state, f"{prefix}.attn", layer_norm(state, f"{prefix}.norm1", x), heads)
        x = x + layer_scale(state, prefix, 1) * y
        y = F.gelu(linear(state, f"{prefix}.mlp.fc1", layer_norm(state, f"{prefix}.norm2", x)))
        x = x + layer_scale(state, prefix, 2) * linear(state, f"{prefix}.mlp.fc2", y)
    return x


def patches(state: State, clips: Tensor, prefix: str = "") -> Tensor:
    """Embed patches by a real convolution: [N, L, D]."""
    weight = state[f"{prefix}patch_embed.proj.weight"]
    bias = state[f"{prefix}patch_embed.proj.bias"]
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    return convolve(clips, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def separable(state: State, name: str = "pos_embed") -> Tensor:
    """Add positions of space and time, one token after the other: [L, D]."""
    spatial, temporal = state[f"{name}_spatial"][0], state[f"{name}_temporal"][0]
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


def encode(
    state: State, x: Tensor, cls: Tensor | None = None, prefix: str = "", heads: int = 0
) -> Tensor:
    """Run the blocks of an encoder, and its norm, if it has that name."""
    x = x if cls is None else torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    depth = len([k for k in state if k.startswith(f"{prefix}blocks.") and "norm1.bias" in k])
    x = run_blocks(state, numbered(f"{prefix}blocks", depth), x, heads or x.shape[-1] // 64)
    return layer_norm(state, f"{prefix}norm", x) if f"{prefix}norm.weight" in state else x


def decode(state: State, x: Tensor, depth: int, heads: int, names: str = DECODER) -> Tensor:
    blocks, norm, head = names.split()
    x = run_blocks(state, numbered(blocks, depth), x, heads)
    return linear(state, head, layer_norm(state, norm, x))


def pyslowfast_positions(state: State, joint: str, parts: str) -> tuple[Tensor | None, Tensor]:
    """Return the position of the class token [1, 1, D], if there is one, and the patches'."""
    has_cls = "cls_token" in state
    if joint in state:
        return (state[joint][:, :1] if has_cls else None), state[joint][:, int(has_cls) :]
    return state.get(f"{parts}_class"), separable(state, parts).unsqueeze(0)


def pyslowfast_tokens(state: State, clips: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the class token [1, 1, D], if there is one, and the patches [N, L, D]."""
    first, pos = pyslowfast_positions(state, "pos_embed", "pos_embed")
    cls = None if first is None else state["cls_token"] + first
    return cls, patches(state, clips) + pos


def pyslowfast_decode(state: State, clip: Tensor, keep: Tensor, heads: int = 0) -> Tensor:
    """Predict all patches [1, L, ...]: the encoder's class token goes through the decoder."""
    cls, x = pyslowfast_tokens(state, clip)
    x = linear(state, "decoder_embed", encode(state, x[:, keep], cls, heads=heads))
    first, pos = pyslowfast_positions(state, "decoder_pos_embed", "dec_pos_embed")
    rows = 0 if first is None else 1
    full = scatter(x[:, rows:], state["mask_token"], keep, pos.shape[1]) + pos
    if first is not None:
        full = torch.cat([x[:, :1] + first, full], dim=1)
    return decode(state, full, 4, x.shape[-1] // 64, PYSLOWFAST_DECODER)[:, rows:]


def pyslowfast_classify(state: State, clips: Tensor, pool: str = "mean", heads: int = 2) -> Tensor:
    """Classify by the mean of the patches, normalised, or by the normalised class token."""
    cls, x = pyslowfast_tokens(state, clips)
    x = x if cls is None else torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    x = run_blocks(state, numbered("blocks", 2), x, heads)
    x = x[:, 0] if pool == "cls" else x[:, 0 if cls is None else 1 :].mean(1)
    return linear(state, "head.projection", layer_norm(state, "norm", x))


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


def reference_classify(state: State, clips: Tensor) -> Tensor:
    """Classify by the mean of the patches; the class token takes part in attention only."""
    cls = state["cls_token"] + state["pos_embed_class"]
    x = torch.cat([cls.expand(len(clips), -1, -1), patches(state, clips) + separable(state)], dim=1)
    x = run_blocks(state, numbered("blocks", 2), x, 2)[:, 1:].mean(1)
    return linear(state, "head", layer_norm(state, "norm", x))


def videomae_classify(state: State, clips: Tensor) -> Tensor:
    """Classify by the mean of the patches (fc_norm) or by the first of them (norm)."""
    x = patches(state, clips)
    x = encode(state, x + sinusoids(*x.shape[1:]))
    x = layer_norm(state, "fc_norm", x.mean(1)) if "fc_norm.weight" in state else x[:, 0]
    return linear(state, "head", x)


def image_decode(state: State, image: Tensor, keep: Tensor) -> Tensor:
    """Predict all patches of an image [1, L, 768]."""
    x = (patches(state, image) + state["pos_embed"][:, 1:])[:, keep]
    x = encode(state, x, state["cls_token"] + state["pos_embed"][:, :1])
    x = linear(state, "decoder_embed", x)
    full = scatter(x[:, 1:], state["mask_token"], keep, state["pos_embed"].shape[1] - 1)
    x = torch.cat([x[:, :1], full], dim=1) + state["decoder_pos_embed"]
    return decode(state, x, 8, 16)[:, 1:]


def image_classify(state: State, image: Tensor) -> Tensor:
    """Classify an image by its class token."""
    x = patches(state, image) + state["pos_embed"][:, 1:]
    x = encode(state, x, state["cls_token"] + state["pos_embed"][:, :1])
    return linear(state, "head", x[:, 0])


# --- targets: what a decoder should predict, from pixels in [0, 1] -------------------------------


def cut(frames: Tensor, u: int, p: int = 16) -> Tensor:
    """Cut frames [N, 3, T, H, W] into patches [N, L, u * p * p, 3], one after the other."""
    (N, C, T, H, W), result = frames.shape, []
    for t in range(0, T, u):
        for y in range(0, H, p):
            for x in range(0, W, p):
                patch = frames[:, :, t : t + u, y : y + p, x : x + p]
                result.append(patch.permute(0, 2, 3, 4, 1).reshape(N, -1, C))
    return torch.stack(result, dim=1)


def normalised(pixels: Tensor, statistics: tuple[tuple[float, ...], ...]) -> Tensor:
    mean, std = (torch.tensor(part).view(3, 1, 1, 1) for part in statistics)
    return (pixels - mean) / std


def videomae_target(pixels: Tensor, normalise: bool) -> Tensor:
    """VideoMAE predicts both frames of a patch; normalised, each channel of it on its own."""
    x = cut(pixels, 2)
    if normalise:
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-6)
    return x.flatten(2)


def mae_target(
    pixels: Tensor, normalise: bool, statistics: tuple[tuple[float, ...], ...], u: int = 1
) -> Tensor:
    """MAE predicts u frames of normalised clips; normalised once more, a patch as a whole."""
    x = cut(normalised(pixels, statistics), u).flatten(2)
    if normalise:
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()
    return x
