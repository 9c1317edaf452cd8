"""Building blocks of the video transformers: patches, attention, blocks and positions.

Shapes: N clips, C channels, T frames, H W pixels, L tokens, D width, nh heads, hd head width.
Tokens run over (t, h, w): time slowest, then rows, then columns.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.pos_embed import Grid, join, sincos_pos_embed
from util.video.transforms import normalize

POOLS = ("mean", "cls")  # what the head of a classifier reads

attention = None
if torch.cuda.is_available():
    try:
        from util import attention
    except ImportError:  # no Triton
        pass


def require_multiple(value: int, divisor: int, value_name: str, divisor_name: str) -> int:
    """Return value // divisor; raise ValueError, naming both, when it is not a whole number."""
    if divisor < 1 or value < 1 or value % divisor:
        raise ValueError(
            f"{value_name} = {value} must be a positive multiple of {divisor_name} = {divisor}"
        )
    return value // divisor


def constructor_arguments(names: dict[str, Any]) -> dict[str, Any]:
    """Return a constructor's locals() as plain data, from which a checkpoint rebuilds its model.

    norm_layer is a callable: layer_norm_eps stands for it.
    """
    arguments = {k: v for k, v in names.items() if k not in ("self", "__class__")}
    norm = arguments.pop("norm_layer")(1)
    return arguments | {"layer_norm_eps": getattr(norm, "eps", None)}


class PatchEmbed(nn.Module):
    """Cut clips into space-time patches and project each to one token.

    The weight has the shape of a strided Conv3d, [D, C, t, p, p], as in every published checkpoint.
    It is applied as a matrix product over patches that are cut out, so that the masked autoencoder
    pays only for the visible ones. Pixels may be uint8: they are normalised after the cut.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, dim: int, num_frames: int, t_patch: int
    ):
        super().__init__()
        grid = require_multiple(img_size, patch_size, "img_size", "patch_size")
        t_grid = require_multiple(num_frames, t_patch, "num_frames", "t_patch_size")
        self.img_size, self.num_frames = img_size, num_frames
        self.patch_size, self.t_patch_size = patch_size, t_patch
        self.input_size = (t_grid, grid, grid)  # tokens along t, h, w
        self.num_patches = t_grid * grid * grid
        kernel = (t_patch, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, dim, kernel_size=kernel, stride=kernel)

    def cut(self, x: Tensor) -> Tensor:
        """View clips [N, C, T, H, W] as patches [N, T/t, H/p, W/p, C, t, p, p] without copying."""
        if x.ndim != 5 or not (x.is_floating_point() or x.dtype == torch.uint8):
            raise ValueError(
                f"clips must be float or uint8 [N, C, T, H, W], not {x.dtype} {list(x.shape)}"
            )
        N, C, T, H, W = x.shape
        if (self.num_frames, self.img_size, self.img_size) != (T, H, W):
            raise ValueError(
                f"the model was built for clips of {self.num_frames} x {self.img_size} x "
                f"{self.img_size} (frames x height x width) and got {T} x {H} x {W}; "
                "build it with num_frames and img_size to match the data"
            )
        (t, h, w), p = self.input_size, self.patch_size
        x = x.reshape(N, C, t, self.t_patch_size, h, p, w, p)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed clips [N, C, T, H, W] -> [N, L, D], or only the patches ids [N, K] -> [N, K, D]."""
        patches = self.cut(x)  # (N, t, h, w, C, t_patch, p, p)
        if ids is not None:
            _, h, w = self.input_size
            clip = torch.arange(len(ids), device=ids.device).unsqueeze(1)
            patches = patches[clip, ids // (h * w), ids // w % h, ids % w]
        patches = patches.reshape(len(x), -1, self.proj.weight[0].numel())  # (N, K, C*t*p*p)
        if patches.dtype == torch.uint8:
            patches = normalize(patches).to(self.proj.weight.dtype)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def attend(qkv: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(hd)) v: packed [N, L, 3, nh, hd] -> [N, L, nh, hd]."""
    if attention is not None and attention.fits(qkv):
        return attention.attention(qkv)
    # Unbinding before transposing lets the backward pass stack the gradients in qkv's layout.
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (N, nh, L, hd) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v are separate parameters as in the checkpoints."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        require_multiple(dim, num_heads, "embed_dim", "num_heads")
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        N, L, D = x.shape
        layers = self.q, self.k, self.v
        weight = torch.cat([layer.weight for layer in layers])  # one product instead of three
        bias = None if self.q.bias is None else torch.cat([layer.bias for layer in layers])
        qkv = F.linear(x, weight, bias).view(N, L, 3, self.num_heads, -1)  # (N, L, 3, nh, hd)
        return self.proj(attend(qkv).reshape(N, L, D))


class DropPath(timm_layers.DropPath):
    """Drop a branch of some clips in training; those kept are divided by their share."""

    share: Tensor | None = None  # 1 - drop_prob, for compiled blocks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.share is None:
            return super().forward(x)
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.share  # (N, 1, 1)
        return x * torch.where(kept, 1 / self.share, 0.0).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP with exact GELU, both residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(in_features=dim, hidden_features=int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """The common part of the masked autoencoder and the classifier: embedding and blocks.

    With grad_checkpointing only the blocks' inputs are kept for the backward pass, which computes
    each block again: this takes a third more time and a fraction of the memory.
    """

    cls_embed: bool
    cls_token: nn.Parameter
    patch_embed: PatchEmbed
    blocks: nn.ModuleList
    encode_features: Callable[..., tuple[Tensor, Tensor]]  # features and tokens, of either model
    grad_checkpointing = False
    compiled = False  # whether compile_blocks was called
    # How the clips of its training were taken from videos; apply_weights sets what a file records.
    sampling_rate = 4  # a clip spans num_frames * sampling_rate frames at 30 fps
    sampling = "dense"  # or "segments", see util.kinetics.Kinetics

    def embed(self, imgs: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed all patches, or ids_keep [N, K], with positions -> [N, (class +) L or K, D]."""
        cls_pos, pos = get_pos_embed(self, "", self.cls_embed)
        if ids_keep is not None:
            # F.embedding gathers rows; its backward sums over clips without a copy for each
            pos = F.embedding(ids_keep, pos.squeeze(0))  # (N, K, D)
        x = self.patch_embed(imgs, ids_keep) + pos
        if cls_pos is not None:
            x = torch.cat([(self.cls_token + cls_pos).expand(len(imgs), -1, -1), x], dim=1)
        return x

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """Pass tokens [N, L, D] through blocks."""
        if self.compiled and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype) if dtype == torch.bfloat16 else x  # the residual stream, else in fp32
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for block in blocks:  # checkpoint replays drop path's randomness
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def run_layers(self, imgs: Tensor, layer: int) -> Tensor:
        """Encode clips up to block `layer`, counted from 1: all its tokens [N, (class +) L, D]."""
        if not 1 <= layer <= len(self.blocks):
            raise ValueError(f"layer = {layer} is not one of the blocks 1 to {len(self.blocks)}")
        return self.run_blocks(self.blocks[:layer], self.embed(imgs))

    def compile_blocks(self, dynamic: bool | None = None) -> None:
        """Compile every block in place with torch.compile; names in state dicts stay the same.

        Blocks of one kind share their compiled code, and masks are drawn outside of it. The
        gradients of a block are sent to other ranks while those of the block before are computed.
        Under autocast in bf16 the residual stream between blocks is bf16, too: less to move.

        Args:
            dynamic: False compiles again for every number of tokens: the fastest code if there are
                few numbers (encoder and decoder). None compiles for any number from the second on.
        """
        self.compiled = True
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        config = torch._dynamo.config
        config.optimize_ddp = False  # it would split blocks at DDP's gradient buckets
        # versions: encoder, decoder; with and without drop path, gradients; numbers of tokens
        config.recompile_limit = max(config.recompile_limit, 128)
        for block in blocks:
            if isinstance(drop := block.drop_path, DropPath):  # a number would be compiled in
                drop.share = next(block.parameters()).new_tensor(1 - drop.drop_prob)
            block.compile(dynamic=dynamic)


def make_pos_embed(
    module: nn.Module, prefix: str, grid: Grid, dim: int, sep: bool, cls_embed: bool, sincos: bool
) -> None:
    """Register position parameters of zeros on module, under the checkpoints' names.

    Separable: {prefix}pos_embed_spatial [1, h*w, D], _temporal [1, t, D] and, with a class token,
    _class [1, 1, D]. Joint: {prefix}pos_embed [1, (1 +) t*h*w, D], row 0 = class. With sincos, the
    joint positions are the sine-cosine table (class row zero) and are not trained.
    """
    if sincos and sep:
        raise ValueError("sincos_pos_embed is a table of joint positions: turn sep_pos_embed off")
    t, h, w = grid
    rows = {"": t * h * w + int(cls_embed)}
    if sep:
        rows = {"_spatial": h * w, "_temporal": t} | ({"_class": 1} if cls_embed else {})
    for name, count in rows.items():
        positions = nn.Parameter(torch.zeros(1, count, dim))
        module.register_parameter(f"{prefix}pos_embed{name}", positions)
    if sincos:
        joint = getattr(module, prefix + "pos_embed").requires_grad_(False)
        joint[:, int(cls_embed) :] = sincos_pos_embed(t * h * w, dim)


def get_pos_embed(module: nn.Module, prefix: str, cls_embed: bool) -> tuple[Tensor | None, Tensor]:
    """Assemble the positions of the class token [1, 1, D] (or None) and of the patches [1, L, D].

    Separable positions are the spatial ones repeated over time plus the temporal ones repeated
    over space (the paper's "separable positional embeddings").
    """
    joint = getattr(module, prefix + "pos_embed", None)
    if joint is not None:
        return (joint[:, :1], joint[:, 1:]) if cls_embed else (None, joint)
    spatial = getattr(module, prefix + "pos_embed_spatial")
    temporal = getattr(module, prefix + "pos_embed_temporal")
    return getattr(module, prefix + "pos_embed_class", None), join(spatial, temporal)
