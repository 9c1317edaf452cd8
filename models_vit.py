"""Video classifier: the encoder of the masked autoencoder with pooling and a linear head.

Shapes: N clips, C channels, T frames, H W pixels, L tokens, D width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from util.masking import draw_masks, num_visible
from util.video_vit import POOLS, Block, Encoder, PatchEmbed, constructor_arguments, make_pos_embed


class VisionTransformer(Encoder):
    """Classify clips by the mean of their patch tokens or by one; wrong arguments: ValueError.

    Args:
        num_frames, t_patch_size: frames of a clip, and of a patch.
        img_size, patch_size: height and width of a clip, and of a patch, pixels.
        no_qkv_bias: q, k and v have no biases.
        norm_layer: called with a width; the named sizes use LayerNorm with eps 1e-6.
        dropout: probability before the head.
        sep_pos_embed: separable positions (space + time) instead of joint ones.
        cls_embed: prepend a class token; it takes part in attention, but not in the mean.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 in the first.
        sincos_pos_embed: joint positions are a fixed sine-cosine table, not trained.
        pool: "mean": the head reads the mean of the patch tokens; "cls": the class token or,
            without one, the token of the first patch (VideoMAE without mean pooling).
    """

    def __init__(
        self,
        num_frames: int = 16,
        t_patch_size: int = 2,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 400,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        no_qkv_bias: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
        sep_pos_embed: bool = True,
        cls_embed: bool = True,
        drop_path_rate: float = 0.0,
        sincos_pos_embed: bool = False,
        pool: str = "mean",
    ):
        super().__init__()
        self.arguments = constructor_arguments(locals())
        self.cls_embed, self.pool = cls_embed, pool
        if pool not in POOLS:
            raise ValueError(f"pool = {pool!r} must be one of {', '.join(POOLS)}")
        # Class token and positions. From here on parameters and modules are registered in the order
        # of the published state dicts.
        patch = PatchEmbed(img_size, patch_size, in_chans, embed_dim, num_frames, t_patch_size)
        if cls_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        grid = patch.input_size
        make_pos_embed(self, "", grid, embed_dim, sep_pos_embed, cls_embed, sincos_pos_embed)

        # Encoder.
        self.patch_embed = patch
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, not no_qkv_bias, rate, norm_layer)
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.norm = norm_layer(embed_dim)

        # Head.
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.02)

    def check_mask_ratio(self, mask_ratio: float) -> None:
        """Raise ValueError for a ratio that is negative, keeps nothing or risks the patch read."""
        tokens = self.patch_embed.num_patches
        if mask_ratio < 0 or num_visible(tokens, mask_ratio) < 1:
            allowed = f"at least 0 and keep at least one of {tokens} tokens"
            raise ValueError(f"mask_ratio = {mask_ratio} must be {allowed}")
        if mask_ratio and self.pool == "cls" and not self.cls_embed:
            raise ValueError("mask_ratio must be 0 with pool = 'cls' and no class token")

    def forward_features(self, x: Tensor, mask_ratio: float = 0.0) -> Tensor:
        """Encode clips [N, C, T, H, W] to their patch tokens [N, L, D], which have passed no norm.

        encode_features gives what the head sees. A mask_ratio leaves out that share of the patches,
        chosen at random: [N, K, D].
        """
        return self._encode(x, mask_ratio)[:, int(self.cls_embed) :]  # without the class token

    def _encode(self, x: Tensor, mask_ratio: float) -> Tensor:
        """Encode clips to all their tokens, the class token first: [N, (1 +) L or K, D]."""
        ids_keep = None
        if mask_ratio:
            self.check_mask_ratio(mask_ratio)
            grid = self.patch_embed.input_size
            ids_keep = draw_masks(len(x), grid, mask_ratio, device=x.device).ids_keep
        return self.run_blocks(self.blocks, self.embed(x, ids_keep))

    def forward(self, x: Tensor, mask_ratio: float = 0.0) -> Tensor:
        """Classify clips, or a random part of each: [N, C, T, H, W] -> logits [N, num_classes]."""
        x = self.norm(self._pool(self._encode(x, mask_ratio)))  # (N, D)
        return self.head(self.dropout(x))  # (N, num_classes)

    def _pool(self, x: Tensor) -> Tensor:
        """Take one token from all of them: [N, (1 +) L or K, D] -> [N, D]."""
        return x[:, 0] if self.pool == "cls" else x[:, int(self.cls_embed) :].mean(dim=1)

    def encode_features(self, x: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode clips [N, C, T, H, W] to one feature each [N, D], and to patch tokens [N, L, D].

        A feature is what the head sees: the norm of the tokens' mean, or of the class token with
        pool = "cls". With `layer` = 1, 2, ... both come from that block and pass no norm.
        """
        x = self._encode(x, 0.0) if layer is None else self.run_layers(x, layer)
        features = self._pool(x)  # (N, D)
        return self.norm(features) if layer is None else features, x[:, int(self.cls_embed) :]


_vit = partial(VisionTransformer, mlp_ratio=4.0, norm_layer=partial(nn.LayerNorm, eps=1e-6))
_huge = partial(_vit, embed_dim=1280, depth=32, num_heads=16)

# trains on a laptop CPU, on the embedded synthetic videos
vit_tiny_patch8 = partial(_vit, patch_size=8, embed_dim=128, depth=4, num_heads=4)
vit_small_patch16 = partial(_vit, patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = partial(_vit, patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = partial(_vit, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
vit_huge_patch14 = partial(_huge, patch_size=14)
vit_huge_patch16 = partial(_huge, patch_size=16)  # the released ViT-H

MODELS: dict[str, Callable[..., VisionTransformer]] = {
    name: build for name, build in globals().items() if name.startswith("vit_")
}
