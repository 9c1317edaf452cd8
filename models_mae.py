"""Masked autoencoder for video (Masked Autoencoders As Spatiotemporal Learners, arXiv 2205.09113).

Shapes: N clips, C channels, T frames, H W pixels, L tokens, K visible tokens, D width, P predicted
values of a patch (u*p*p*C pixels of u frames, or histograms).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.masking import draw_masks, highest_ratio, num_kept, num_visible
from util.pos_embed import Grid
from util.targets import choose_target, hog, motion, target_statistics, values_per_frame
from util.video.transforms import normalize
from util.video_vit import (
    Block,
    Encoder,
    PatchEmbed,
    constructor_arguments,
    get_pos_embed,
    make_pos_embed,
    require_multiple,
)


class MaskedAutoencoderViT(Encoder):
    """Encode the visible space-time patches, decode all, predict what the removed ones show.

    Args:
        img_size: height and width of a clip, pixels.
        patch_size, t_patch_size: patch extent in space (pixels) and time (frames).
        in_chans: colour channels.
        embed_dim, depth, num_heads: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        mlp_ratio: hidden width of the MLPs over the token width.
        norm_layer: called with a width; the named sizes use LayerNorm with eps 1e-6.
        norm_pix_loss: without a target, choose "patch", not "pixels".
        num_frames: frames of a clip.
        no_qkv_bias: q, k and v have no biases.
        sep_pos_embed: separable positions (space + time) instead of joint ones.
        trunc_init: draw weight matrices from a truncated normal (0.02), not Xavier uniform.
        cls_embed: prepend a class token, in the encoder and in the decoder.
        pred_t_dim: frames to predict per clip, evenly spaced over it; num_frames for all of them.
        sincos_pos_embed: joint positions are a fixed sine-cosine table, not trained.
        decoder_sep_pos_embed: separable positions in the decoder; None: as in the encoder.
        cls_through_decoder: pass the encoder's class token on through the decoder, which then has
            none of its own.
        strided_targets: predict every (num_frames / pred_t_dim)-th frame, from the first on.
        pos_embed_std: standard deviation of fresh position embeddings. With the paper's 0.02 a
            small model needs thousands of updates to tell places apart; a larger value needs fewer.
        target: "patch": each patch, normalised by its mean and standard deviation (the paper's);
            "channel": each channel of a patch, by its own (VideoMAE's); "pixels": as the input is;
            "hog": histograms of oriented gradients of each channel's cells of 8 x 8 pixels;
            "motion": the difference to the frame before, over the root mean square of the clip's.
        target_norm: means and standard deviations of the channels that normalise the pixels of
            target "patch" first, in place of (0.45, 0.225): ImageNet's for image MAE.

    Some published checkpoints were trained with the options from sincos_pos_embed to
    strided_targets, or with other targets (util/formats.py).

    Raises:
        ValueError: sizes that do not divide, or a wrong target; the message names the arguments.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 4,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
        num_frames: int = 16,
        t_patch_size: int = 2,
        no_qkv_bias: bool = False,
        sep_pos_embed: bool = True,
        trunc_init: bool = False,
        cls_embed: bool = True,
        pred_t_dim: int = 8,
        sincos_pos_embed: bool = False,
        decoder_sep_pos_embed: bool | None = None,
        cls_through_decoder: bool = False,
        strided_targets: bool = False,
        pos_embed_std: float = 0.02,
        target: str | None = None,
        target_norm: Sequence[Sequence[float]] | None = None,
    ):
        super().__init__()
        self.arguments = constructor_arguments(locals())
        normalised = self.arguments.pop("norm_pix_loss")  # target says it
        target = choose_target(target, normalised, target_norm, in_chans, patch_size, num_frames)
        self.target = self.arguments["target"] = target
        self.target_norm, self.in_chans = target_norm, in_chans
        self.trunc_init, self.pos_embed_std = trunc_init, pos_embed_std
        self.cls_embed, self.cls_through_decoder = cls_embed, cls_through_decoder
        self.pred_t_dim = pred_t_dim

        # Patches, and the targets: which frames are predicted, and how many of them per patch.
        sizes = img_size, patch_size, in_chans, embed_dim, num_frames, t_patch_size
        patch_embed = PatchEmbed(*sizes)
        frames = choose_frames(num_frames, t_patch_size, pred_t_dim, strided_targets)
        self.predicted_frames = frames
        self.t_pred_patch_size = t_patch_size * pred_t_dim // num_frames
        names = "decoder_embed_dim", "decoder_num_heads"
        require_multiple(decoder_embed_dim, decoder_num_heads, *names)

        def blocks(count: int, dim: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim, heads, mlp_ratio, qkv_bias=not no_qkv_bias, norm_layer=norm_layer)
                for _ in range(count)
            )

        # Class tokens and positions. From here on parameters and modules are registered in the
        # order of the published state dicts.
        grid = patch_embed.input_size
        if cls_through_decoder and not cls_embed:
            raise ValueError("cls_through_decoder needs cls_embed: there is no class token to pass")
        if cls_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            if not cls_through_decoder:
                self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        make_pos_embed(self, "", grid, embed_dim, sep_pos_embed, cls_embed, sincos_pos_embed)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        sep = sep_pos_embed if decoder_sep_pos_embed is None else decoder_sep_pos_embed
        make_pos_embed(self, "decoder_", grid, decoder_embed_dim, sep, cls_embed, sincos_pos_embed)

        # Encoder.
        self.patch_embed = patch_embed
        self.blocks = blocks(depth, embed_dim, num_heads)
        self.norm = norm_layer(embed_dim)

        # Decoder, narrower and shallower.
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        target_dim = self.t_pred_patch_size * values_per_frame(target, patch_size, in_chans)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_dim)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw fresh weights; decoder_cls_token stays zero and the patch bias Conv3d's default."""
        draw = nn.init.xavier_uniform_
        if self.trunc_init:
            draw = partial(nn.init.trunc_normal_, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        draw(self.patch_embed.proj.weight.view(len(self.patch_embed.proj.weight), -1))
        for name, parameter in self.named_parameters(recurse=False):
            if "pos_embed" in name and parameter.requires_grad:
                nn.init.trunc_normal_(parameter, std=self.pos_embed_std)
            elif name == "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut frames into target vectors: [N, C, pred_t_dim, H, W] -> [N, L, u*p*p*C].

        u is the number of predicted frames per patch. A vector runs over (frame, row, column, C).
        The frames may also be maps with one pixel per cell, as hog's are.
        """
        N, C, T, H, W = imgs.shape
        p, u = W // self.patch_embed.input_size[2], self.t_pred_patch_size
        x = imgs.reshape(N, C, T // u, u, H // p, p, W // p, p)  # (N, C, t, u, h, p, w, p)
        x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (N, t, h, w, u, p, p, C)
        return x.reshape(N, -1, u * p * p * C)  # (N, L, u*p*p*C)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Undo patchify: [N, L, u*p*p*C] -> [N, C, pred_t_dim, H, W]."""
        N, p, u, C = len(x), self.patch_embed.patch_size, self.t_pred_patch_size, self.in_chans
        t, h, w = self.patch_embed.input_size
        x = x.reshape(N, t, h, w, u, p, p, C)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (N, C, t, u, h, p, w, p)
        return x.reshape(N, C, t * u, h * p, w * p)

    def target_frames(self, imgs: Tensor) -> Tensor:
        """Pick the frames that are predicted: [N, C, T, H, W] -> [N, C, pred_t_dim, H, W]."""
        return torch.stack([imgs[:, :, t] for t in self.predicted_frames], dim=2)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep a random subset of the tokens x [N, L, D]: the paper's agnostic sampling.

        This is the definition. `forward_encoder` draws the same masks, but embeds only the tokens
        that are kept.

        Returns:
            the K = int(L * (1 - mask_ratio)) kept tokens [N, K, D] in noise order, mask [N, L]
            (1 = removed), ids_restore [N, L] and ids_keep [N, K].
        """
        grid = 1, 1, x.shape[1]
        mask, ids_restore, ids_keep = draw_masks(len(x), grid, mask_ratio, device=x.device)
        kept = x.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (N, K, D)
        return kept, mask, ids_restore, ids_keep

    def encode(self, imgs: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode all patches, or only ids_keep [N, K], and apply norm -> [N, (1 +) L or K, D]."""
        return self.norm(self.run_blocks(self.blocks, self.embed(imgs, ids_keep)))

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Encode clips [N, C, T, H, W] without masking to patch tokens [N, L, D] after the norm."""
        return self.encode(imgs)[:, int(self.cls_embed) :]

    def encode_features(self, x: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode clips [N, C, T, H, W] to one feature each [N, D], and to patch tokens [N, L, D].

        The tokens are those of forward_features, or with `layer` = 1, 2, ... those that leave that
        block, which have passed no norm. A feature is the mean of a clip's tokens.
        """
        if layer is None:
            tokens = self.forward_features(x)
        else:
            tokens = self.run_layers(x, layer)[:, int(self.cls_embed) :]
        return tokens.mean(dim=1), tokens

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, mask_type: str = "random"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode visible patches: [N, C, T, H, W] -> latent [N, K, D], mask, ids_restore [N, L].

        With cls_through_decoder, latent has the class token in front: [N, 1 + K, D].
        """
        grid = self.patch_embed.input_size
        masks = draw_masks(len(imgs), grid, mask_ratio, mask_type, imgs.device)
        mask, ids_restore, ids_keep = masks
        latent = self.encode(imgs, ids_keep)  # (N, (1 +) K, D)
        if not self.cls_through_decoder:
            latent = latent[:, int(self.cls_embed) :]  # (N, K, D)
        return latent, mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch: latent [N, K, D] of forward_encoder -> pred [N, L, P]."""
        first, x, pos = self._embed_latent(x)
        N, K, D = x.shape

        # Add positions; start from mask tokens and overwrite the visible ones. (A gather from both
        # would be shorter, but its backward pass adds up all L tokens by slow atomic operations.)
        ids_keep = ids_restore.argsort(dim=1)[:, :K]  # noise order: visible patches come first
        x = x + F.embedding(ids_keep, pos.squeeze(0))  # (N, K, D)
        places = (ids_keep + len(first)).unsqueeze(-1).expand(-1, -1, D)
        tokens = torch.cat([*first, (self.mask_token + pos).expand(N, -1, -1)], dim=1)
        x = tokens.scatter_(1, places, x)  # (N, (1 +) L, D)

        # Decode and predict; the class token predicts nothing.
        x = self.decoder_norm(self.run_blocks(self.decoder_blocks, x))
        return self.decoder_pred(x)[:, len(first) :]  # (N, L, P)

    def forward_part_of_decoder(
        self, x: Tensor, ids_restore: Tensor, decoder_mask_ratio: float
    ) -> Tensor:
        """Predict only some of the removed patches, for speed; all other predictions are zero.

        The decoder leaves out a share decoder_mask_ratio of the removed patches. The noise that
        chose the removed patches also chooses these.
        """
        first, x, pos = self._embed_latent(x)
        (N, K, _), L = x.shape, ids_restore.shape[1]
        M = num_visible(L - K, decoder_mask_ratio)

        # Inverting ids_restore gives noise order: visible patches first, then the removed ones.
        # Attention does not depend on the order, so there is no need to restore it.
        ids = ids_restore.argsort(dim=1)[:, : K + M]
        pos = F.embedding(ids, pos.squeeze(0))  # (N, K + M, D)
        x = torch.cat([*first, x + pos[:, :K], self.mask_token + pos[:, K:]], dim=1)
        x = self.decoder_norm(self.run_blocks(self.decoder_blocks, x))

        # Put the M predictions in their places.
        pred = self.decoder_pred(x[:, x.shape[1] - M :])  # (N, M, P)
        ids = ids[:, K:].unsqueeze(-1).expand_as(pred)
        return pred.new_zeros(N, L, pred.shape[-1]).scatter(1, ids, pred)

    def _embed_latent(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Project the latent to the decoder's width.

        Returns:
            the class token with its position [N, 1, D], in a list that is empty without one;
            the visible patches [N, K, D], and the positions of all patches [1, L, D].
        """
        x = self.decoder_embed(x)
        cls_pos, pos = get_pos_embed(self, "decoder_", self.cls_embed)
        if cls_pos is None:
            return [], x, pos
        if self.cls_through_decoder:
            return [x[:, :1] + cls_pos], x[:, 1:], pos
        return [(self.decoder_cls_token + cls_pos).expand(len(x), -1, -1)], x, pos

    def target_patches(self, imgs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Cut the targets from clips [N, C, T, H, W], without the statistics -> [N, L, P]."""
        if self.target == "motion":
            return self.patchify(motion(imgs, self.predicted_frames, dtype))
        frames = self.target_frames(imgs)
        if self.target == "hog":
            return self.patchify(hog(normalize(frames).to(dtype)))
        return normalize(self.patchify(frames)).to(dtype)

    def target_statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and scale of target_patches; see util/targets.py."""
        return target_statistics(patches, self.target, self.in_chans, self.target_norm)

    def patch_losses(self, imgs: Tensor, pred: Tensor) -> Tensor:
        """Return each patch's mean squared error, in float32: pred [N, L, P] -> [N, L]."""
        exact = torch.promote_types(pred.dtype, torch.float32)
        target = self.target_patches(imgs, exact)  # (N, L, P)
        if self.target not in ("pixels", "hog"):
            mean, scale = self.target_statistics(target)
            target = (target - mean) / scale
        return (pred.to(exact) - target).square().mean(dim=-1)  # (N, L)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Average the losses of the removed patches (1 in mask), a scalar."""
        return (self.patch_losses(imgs, pred) * mask).sum() / mask.sum()

    def compile_blocks(self, dynamic: bool | None = None) -> None:
        """Compile every block, and the loss, whose many passes over all pixels become one."""
        super().compile_blocks(dynamic)
        self.forward_loss = torch.compile(self.forward_loss, dynamic=dynamic)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.9,
        decoder_mask_ratio: float = 0.0,
        mask_type: str = "random",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct clips from a part of their patches.

        Args:
            imgs: clips [N, C, T, H, W], normalised, or as uint8 pixels.
            decoder_mask_ratio: share of the removed patches that are not decoded either, for
                speed; the loss is then the mean over the decoded patches.
            mask_type: what is removed together, see util.masking.draw_masks.

        Returns:
            loss (scalar), pred [N, L, P], mask [N, L] (1 = removed, and decoded).

        Raises:
            ValueError: the ratios keep, remove or decode nothing, or there is no such mask_type.
        """
        grid, L = self.patch_embed.input_size, self.patch_embed.num_patches
        check_mask_ratio(grid, mask_ratio, decoder_mask_ratio, mask_type)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, mask_type)
        K = num_kept(grid, mask_ratio, mask_type)
        decoded = num_visible(L - K, decoder_mask_ratio)
        if decoded < L - K:
            mask = mask * (ids_restore < K + decoded)  # the loss is over decoded patches
            pred = self.forward_part_of_decoder(latent, ids_restore, decoder_mask_ratio)
        else:
            pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


def choose_frames(num_frames: int, t_patch_size: int, pred_t_dim: int, strided: bool) -> list[int]:
    """Choose the frames of a clip that are predicted.

    Raises:
        ValueError: sizes that do not divide; the message names the arguments.
    """
    if pred_t_dim < 1 or t_patch_size * pred_t_dim % num_frames:
        raise ValueError(
            f"t_patch_size * pred_t_dim / num_frames = {t_patch_size} * {pred_t_dim} / "
            f"{num_frames} must be a whole number of at least 1: the frames predicted per "
            "patch (one with pred_t_dim = num_frames / t_patch_size)"
        )
    if strided and num_frames % pred_t_dim:
        raise ValueError(
            f"strided_targets needs num_frames = {num_frames} to be a multiple of "
            f"pred_t_dim = {pred_t_dim}"
        )
    if strided:
        return list(range(0, num_frames, num_frames // pred_t_dim))
    # float32 and truncation are part of the definition: 16 -> 8 gives 0 2 4 6 8 10 12 15. This
    # is a list, because copying an index tensor to the device in every step would wait for it.
    index = torch.linspace(0, num_frames - 1, pred_t_dim, dtype=torch.float32, device="cpu")
    return index.long().tolist()


def check_mask_ratio(
    grid: Grid, mask_ratio: float, decoder_mask_ratio: float = 0.0, mask_type: str = "random"
) -> None:
    """Raise ValueError for ratios that keep, remove or decode nothing of a grid (t, h, w)."""
    num_tokens, kept = math.prod(grid), num_kept(grid, mask_ratio, mask_type)
    if not 0 < kept < num_tokens:
        raise ValueError(
            f"mask_ratio = {mask_ratio} keeps {kept} of {num_tokens} tokens; it must keep at least "
            "one and remove at least one, and the highest that does with mask_type = "
            f"{mask_type!r} is {highest_ratio(grid, mask_type):g}"
        )
    removed = num_tokens - kept
    if not (0 <= decoder_mask_ratio < 1 and num_visible(removed, decoder_mask_ratio) > 0):
        raise ValueError(
            f"decoder_mask_ratio = {decoder_mask_ratio} must be at least 0 and leave at least one "
            f"of the {removed} removed tokens to decode"
        )


_vit = partial(MaskedAutoencoderViT, mlp_ratio=4.0, norm_layer=partial(nn.LayerNorm, eps=1e-6))
_large = partial(_vit, embed_dim=1024, depth=24, num_heads=16)
_huge = partial(_vit, embed_dim=1280, depth=32, num_heads=16)

# trains on a laptop CPU, on the embedded synthetic videos
_tiny = partial(_vit, embed_dim=128, depth=4, num_heads=4, pos_embed_std=0.4)
mae_vit_tiny_patch8 = partial(
    _tiny, patch_size=8, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4
)
mae_vit_small_patch16 = partial(_vit, patch_size=16, embed_dim=384, depth=12, num_heads=6)
mae_vit_base_patch16 = partial(_vit, patch_size=16, embed_dim=768, depth=12, num_heads=12)
mae_vit_large_patch16 = partial(_large, patch_size=16)
mae_vit_huge_patch14 = partial(_huge, patch_size=14)
mae_vit_huge_patch16 = partial(_huge, patch_size=16)  # the released ViT-H

MODELS: dict[str, Callable[..., MaskedAutoencoderViT]] = {
    name: build for name, build in globals().items() if name.startswith("mae_vit_")
}
