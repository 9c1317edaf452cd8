"""Compare models_mae.py, models_vit.py and util/video_vit.py with golden numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from tests import golden
from util.kinetics import Kinetics, VideoIndex
from util.masking import draw_masks
from util.video.transforms import channels_first
from util.video_vit import Block, DropPath

MAE_CASES = {
    case["file"].removesuffix(".npz"): case
    for case in golden.table("mae_cases.json")
    if (golden.DATA / case["file"]).exists()
}
TINY_CASES = [name for name in MAE_CASES if name.startswith("mae_tiny")]
SEP1_CLS1 = MAE_CASES["mae_tiny_sep1_cls1_pt4"]
VIT_CASES = {
    case["file"].removesuffix(".npz"): case
    for case in golden.table("vit_cases.json")
    if (golden.DATA / case["file"]).exists()
}
VIT = VIT_CASES["vit_tiny_sep1_cls1"]
MODEL_KEYS = golden.table("model_keys.json")
INIT = golden.table("init_stats.json")
TABLES = golden.table("tables_masking_targets.json")

# Float32 results differ by rounding alone: a few units of their last digit (1.2e-7) for sums such
# as losses and norms, a few times the golden numbers' own distance from float64 elsewhere.
LOSS_RTOL = 5e-7
GRAD_NORM_RTOL = 4e-6
GRAD_ATOL = 1.5e-5  # of an entry, relative to the largest entry of its tensor
DISTANCES = 3


def load_mae(case, state=None, **overrides):
    model = golden.build(MaskedAutoencoderViT, case, **overrides)
    model.load_state_dict(state or golden.tensors(case["file"], "sd/"))
    return model


def formula_video(case):
    """Compute the full-size video from its formula and check its checksum."""
    c, t, h, w = np.ix_(*(np.arange(n) for n in (3, 16, 224, 224)))
    v = 37 * c + 11 * t + 7 * h + 13 * w + (h * w) % 29 + (3 * t * h) % 17 + (c * w * t) % 23
    v = (v % 256).astype(np.uint8)
    flat = v.reshape(-1).astype(np.int64)
    checksum = golden.arrays(case["file"])["video_uint8_checksum"]
    assert [flat.sum(), (flat * (np.arange(len(flat)) % 997)).sum()] == checksum.tolist()
    return ((torch.from_numpy(v).float() / 255 - 0.45) / 0.225).unsqueeze(0)


def mae_video(case):
    if "video" in golden.arrays(case["file"]):
        return golden.tensor(case["file"], "video")
    return formula_video(case)


def assert_near(actual, expected, distance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=DISTANCES * distance)


def assert_same_gradients(model, norms, some_in_full):
    """Compare every gradient's L2 norm, and some gradients entry by entry.

    Softmax does not change when all keys move together: the gradient of attn.k.bias is rounding
    noise around zero, so it is only compared with zero.
    """
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert list(gradients) == list(norms)
    largest = max(norms.values())
    for name, expected in norms.items():
        norm = gradients[name].double().norm().item()
        if name.endswith("attn.k.bias"):
            assert max(norm, expected) < 1e-6 * largest, name
        else:
            assert norm == pytest.approx(expected, rel=GRAD_NORM_RTOL), name
    assert some_in_full
    for name, expected in some_in_full.items():
        atol = GRAD_ATOL * expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=atol)


# --- masked autoencoder: golden cases


@pytest.mark.parametrize("name", MAE_CASES)
def test_mae_state_dict_has_the_golden_names_in_order(name):
    case = MAE_CASES[name]
    state = golden.tensors(case["file"], "sd/")
    model = golden.build(MaskedAutoencoderViT, case)
    assert list(model.state_dict()) == list(state)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("name", MAE_CASES)
def test_mae_loss_and_gradients(name, norm_pix_loss):
    case = MAE_CASES[name]
    arrays = golden.arrays(case["file"])
    model = load_mae(case, norm_pix_loss=norm_pix_loss)
    with golden.masking_noise(golden.tensor(case["file"], "noise")):
        loss, pred, mask = model(mae_video(case), mask_ratio=case["mask_ratio"])
    prefix = f"npl{int(norm_pix_loss)}/"
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(arrays[prefix + "loss_float64"].item(), rel=LOSS_RTOL)
    assert loss.item() == pytest.approx(arrays[prefix + "loss"].item(), rel=LOSS_RTOL)
    if "pred" in arrays:
        distance = case["pred_max_abs_diff_fp32_vs_fp64"]
        assert_near(pred.detach(), golden.tensor(case["file"], "pred"), distance)
        assert torch.equal(mask, golden.tensor(case["file"], "mask"))

    loss.backward()
    norms = dict(zip(arrays[prefix + "grad_names"], arrays[prefix + "grad_l2"], strict=True))
    in_full = golden.tensors(case["file"], prefix + "grad/")
    if not in_full:  # the full-size case has only norms
        in_full = {"norm.bias": model.norm.bias.grad}
    assert_same_gradients(model, norms, in_full)


@pytest.mark.parametrize("name", TINY_CASES)
@torch.no_grad()
def test_mae_encoder_and_decoder(name):
    case = MAE_CASES[name]
    file, distance = case["file"], case["pred_max_abs_diff_fp32_vs_fp64"]
    model = load_mae(case)
    with golden.masking_noise(golden.tensor(file, "noise")):
        latent, mask, ids_restore = model.forward_encoder(mae_video(case), case["mask_ratio"])
    assert_near(latent, golden.tensor(file, "latent"), distance)
    assert torch.equal(mask, golden.tensor(file, "mask"))
    assert torch.equal(ids_restore, golden.tensor(file, "ids_restore"))
    pred = model.forward_decoder(golden.tensor(file, "latent"), ids_restore)
    assert_near(pred, golden.tensor(file, "pred"), distance)


@torch.no_grad()
def test_mae_full_geometry():
    case = MAE_CASES["mae_fullgeom_narrow"]
    file, distance = case["file"], case["pred_max_abs_diff_fp32_vs_fp64"]
    arrays = golden.arrays(file)
    model, video = load_mae(case), mae_video(case)
    with golden.masking_noise(golden.tensor(file, "noise")):
        latent, mask, ids_restore = model.forward_encoder(video, case["mask_ratio"])
    assert list(latent.shape) == arrays["latent_shape"].tolist() == [1, 156, 96]
    assert_near(latent[0, ::13, ::8], golden.tensor(file, "latent_sub"), distance)
    assert np.flatnonzero(mask[0] == 0).tolist() == sorted(arrays["mask_kept_indices"].tolist())
    assert ids_restore[0, :64].tolist() == arrays["ids_restore_first64"].tolist()

    pred = model.forward_decoder(latent, ids_restore)
    assert list(pred.shape) == arrays["pred_shape"].tolist() == [1, 1568, 768]
    assert_near(pred[0, ::49, ::32], golden.tensor(file, "pred_sub"), distance)
    p = pred.double()
    stats = [p.mean(), p.std(), p.abs().sum(), p.square().sum()]
    expected = arrays["pred_stats_mean_std_abssum_sqsum"]
    np.testing.assert_allclose(stats, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TINY_CASES)
def test_mae_targets(name):
    case = MAE_CASES[name]
    file, video = case["file"], mae_video(case)
    model = load_mae(case)
    frames = model.target_frames(video)
    assert torch.equal(frames, video[:, :, golden.arrays(file)["target_frame_idx"]])
    target = model.patchify(frames)
    assert torch.equal(target, golden.tensor(file, "target_unnormalised"))
    assert torch.equal(model.unpatchify(target), frames)
    images = model.unpatchify(golden.tensor(file, "pred"))
    assert torch.equal(images, golden.tensor(file, "unpatchify_pred"))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RULES = {
    "patch": {"target": "patch"},
    "channel": {"target": "channel"},
    "pixels": {"target": "pixels"},
    "image MAE": {"target": "patch", "target_norm": IMAGENET},
}


def plain_targets(clips, u, p, rule):
    """Compute targets patch by patch in float64, as each project defines them on its own pixels.

    Clips are uint8 [N, T, H, W, C] of predicted frames; targets are [N, L, u*p*p*C] in the order
    (frame, row, column, channel).
    """
    N, T, H, W, C = clips.shape
    pixels = clips.numpy() / 255
    if rule == "image MAE":
        pixels = (pixels - IMAGENET[0]) / IMAGENET[1]
    elif rule != "channel":
        pixels = (pixels - 0.45) / 0.225
    targets = []
    for n, t, h, w in np.ndindex(N, T // u, H // p, W // p):
        patch = pixels[n, t * u :][:u, h * p :][:, :p, w * p :][:, :, :p].copy()  # (u, p, p, C)
        if rule == "channel":
            for c in range(C):
                x = patch[..., c]
                patch[..., c] = (x - x.mean()) / (np.sqrt(x.var(ddof=1)) + 1e-6)
        elif rule != "pixels":
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        targets.append(patch.flatten())
    return torch.from_numpy(np.stack(targets)).unflatten(0, (N, -1))


def target_clips(videos, channels=3):
    """Return a clip of a video, one of noise, and nearly and exactly flat ones: [6, 4, 32, 32, C].

    They are uint8.
    """
    dataset = Kinetics(
        VideoIndex(str(videos / "test.csv")), "test", input_size=32, num_frames=4, sampling_rate=4
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    levels = torch.tensor([[0, 128, 255], [7, 230, 77]], dtype=torch.uint8)
    flat = levels.view(2, 1, 1, 1, 3).expand(2, 4, 32, 32, 3)
    nearly = flat.clone()
    nearly[:, 0, ::8, ::8] ^= 1  # a step of one grey level in one pixel of a patch
    return torch.cat([dataset[0, 0].clips, noise, nearly, flat])[..., :channels]


@pytest.mark.parametrize(("u", "frames"), [(2, 4), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_perfect_predictions_have_no_loss(videos, rule, dtype, u, frames):
    """Measured: 5e-10 for channels of nearly flat patches in float32, else at most 1e-12."""
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1, pred_t_dim=frames, **RULES[rule])
    clips = target_clips(videos)
    truth = plain_targets(clips[:, model.predicted_frames], u, 8, rule).to(dtype)
    imgs = channels_first(clips)
    for form in (imgs, ((imgs.double() / 255 - 0.45) / 0.225).to(dtype)):
        losses = model.patch_losses(form, truth)
        assert losses.dtype == dtype
        assert losses.max() < 5e-9
    wrong = model.patch_losses(imgs, truth.roll(3, dims=-1))[:2]  # of another pixel
    assert wrong.mean() > (0.001 if rule == "pixels" else 0.1)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "image MAE"])
@pytest.mark.parametrize("channels", [1, 2])
def test_targets_of_clips_that_are_not_rgb(videos, rule, channels):
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1, in_chans=channels, **RULES[rule])
    clips = target_clips(videos, channels)
    truth = plain_targets(clips, 2, 8, rule)
    assert model.patch_losses(channels_first(clips), truth).max() < 5e-9
    loss, _, _ = model(channels_first(clips), 0.75)
    loss.backward()
    assert loss.isfinite() and model.decoder_pred.weight.grad.isfinite().all()


def test_the_target_is_the_papers_with_norm_pix_loss_and_else_pixels():
    def target(**arguments):
        model = golden.build(MaskedAutoencoderViT, SEP1_CLS1, **arguments)
        assert "norm_pix_loss" not in model.arguments
        rebuilt = models_mae.mae_vit_base_patch16(depth=1, decoder_depth=1, target=model.target)
        assert rebuilt.arguments["target"] == model.arguments["target"] == model.target
        return model.target

    assert target(norm_pix_loss=True) == "patch"
    assert target(norm_pix_loss=False) == target() == "pixels"
    assert target(norm_pix_loss=True, target="channel") == "channel"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "patches"}, "target = 'patches' must be one of patch, channel, pixels"),
        ({"target": ""}, "target = '' must be one of"),
        ({"target": "hog", "patch_size": 4}, "'hog' needs a patch_size that is a multiple of 8"),
        (
            {"target": "motion", "num_frames": 1, "t_patch_size": 1, "pred_t_dim": 1},
            "target = 'motion' needs num_frames of at least 2, not 1",
        ),
        (
            {"target": "channel", "target_norm": IMAGENET},
            "target_norm needs target = 'patch' .* not 'channel'",
        ),
        ({"target_norm": IMAGENET}, r"target_norm needs target = 'patch' .* not 'pixels'"),
        ({"target": "patch", "target_norm": IMAGENET[:1]}, "target_norm needs .* in_chans = 3"),
        ({"target": "patch", "target_norm": [[0.5], [0.5]]}, "target_norm needs .* in_chans = 3"),
        ({"target": "patch", "target_norm": []}, "target_norm needs .* in_chans = 3"),
        ({"target": "patch", "target_norm": (0.5, 0.2)}, "target_norm needs .* in_chans = 3"),
    ],
)
def test_wrong_targets_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        golden.build(MaskedAutoencoderViT, SEP1_CLS1, **arguments)


def test_loss_counts_removed_patches_alone():
    model = load_mae(SEP1_CLS1)
    video, mask = mae_video(SEP1_CLS1), golden.tensor(SEP1_CLS1["file"], "mask")
    pred = golden.tensor(SEP1_CLS1["file"], "pred")
    loss = model.forward_loss(video, pred, mask)
    kept = mask == 0
    assert model.forward_loss(video, torch.where(kept[..., None], 1e3, pred), mask) == loss
    assert model.forward_loss(video, torch.where(kept[..., None], pred, 1e3), mask) > loss


def test_pixels_of_removed_patches_do_not_reach_the_prediction():
    model = load_mae(SEP1_CLS1)
    file, video = SEP1_CLS1["file"], mae_video(SEP1_CLS1)
    kept = golden.tensor(file, "mask")[..., None] == 0
    patches = model.patchify(video)  # all four frames are predicted, so this covers the video
    changed = model.unpatchify(torch.where(kept, patches, 7.0))
    noise = golden.tensor(file, "noise")
    with torch.no_grad(), golden.masking_noise(noise, noise, noise):
        pred = model(video, 0.75)[1]
        assert torch.equal(model(changed, 0.75)[1], pred)
        changed = model.unpatchify(torch.where(kept, 7.0, patches))
        assert not torch.isclose(model(changed, 0.75)[1], pred).any(dim=-1).all()


# --- the same function under other constructor arguments


def assembled_positions(state, prefix, cls_embed):
    """Return joint positions that equal a state dict's separable ones, added one by one."""
    spatial, temporal = state[prefix + "pos_embed_spatial"], state[prefix + "pos_embed_temporal"]
    rows = [
        temporal[0, t] + spatial[0, s]
        for t in range(temporal.shape[1])
        for s in range(spatial.shape[1])
    ]
    first = [state[prefix + "pos_embed_class"][0, 0]] if cls_embed else []
    return torch.stack(first + rows).unsqueeze(0)


def joint_state(state, cls_embed, prefixes=("", "decoder_")):
    """Turn a state dict with separable positions into one with joint ones."""
    joint = {k: v for k, v in state.items() if "pos_embed_" not in k}
    for prefix in prefixes:
        joint[prefix + "pos_embed"] = assembled_positions(state, prefix, cls_embed)
    return joint


def without_class(state):
    return {k: v for k, v in state.items() if "cls_token" not in k and "pos_embed_class" not in k}


def mae_pred(model, case=SEP1_CLS1):
    with torch.no_grad(), golden.masking_noise(golden.tensor(case["file"], "noise")):
        return model(mae_video(case), case["mask_ratio"])[1]


def test_mae_joint_positions_with_class_token():
    state = joint_state(golden.tensors(SEP1_CLS1["file"], "sd/"), cls_embed=True)
    model = load_mae(SEP1_CLS1, state, sep_pos_embed=False)
    distance = SEP1_CLS1["pred_max_abs_diff_fp32_vs_fp64"]
    assert_near(mae_pred(model), golden.tensor(SEP1_CLS1["file"], "pred"), distance)


def test_mae_separable_positions_without_class_token():
    state = without_class(golden.tensors(SEP1_CLS1["file"], "sd/"))
    separable = load_mae(SEP1_CLS1, state, cls_embed=False)
    joint = load_mae(
        SEP1_CLS1, joint_state(state, cls_embed=False), sep_pos_embed=False, cls_embed=False
    )
    torch.testing.assert_close(mae_pred(separable), mae_pred(joint), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_class", [MaskedAutoencoderViT, VisionTransformer])
def test_no_qkv_bias_equals_zero_biases(model_class):
    case = SEP1_CLS1 if model_class is MaskedAutoencoderViT else VIT
    state = golden.tensors(case["file"], "sd/")
    biases = [k for k in state if k.endswith(("attn.q.bias", "attn.k.bias", "attn.v.bias"))]
    assert len(biases) == (12 if model_class is MaskedAutoencoderViT else 9)
    with_zeros = golden.build(model_class, case).eval()
    with_zeros.load_state_dict(state | {k: torch.zeros_like(state[k]) for k in biases})
    without = golden.build(model_class, case, no_qkv_bias=True).eval()
    without.load_state_dict({k: v for k, v in state.items() if k not in biases})
    video = golden.tensor(case["file"], "video")
    if model_class is MaskedAutoencoderViT:
        assert torch.equal(mae_pred(with_zeros), mae_pred(without))
    else:
        assert torch.equal(with_zeros(video), without(video))


def test_mae_in_bfloat16_stays_close():
    model = load_mae(SEP1_CLS1)
    noise = golden.tensor(SEP1_CLS1["file"], "noise")
    with golden.masking_noise(noise), torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(mae_video(SEP1_CLS1), SEP1_CLS1["mask_ratio"])
    loss.backward()
    assert pred.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SEP1_CLS1["losses"]["npl0"], rel=0.01)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- masking and targets


@pytest.mark.parametrize("i", range(6))
def test_random_masking(i):
    arrays = golden.arrays("random_masking.npz")
    ratio = arrays["mask_ratios"][i].item()
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1)
    with golden.masking_noise(golden.tensor("random_masking.npz", "noise")):
        results = model.random_masking(golden.tensor("random_masking.npz", "x"), ratio)
    for name, result in zip(("x_masked", "mask", "ids_restore", "ids_keep"), results, strict=True):
        assert torch.equal(result, golden.tensor("random_masking.npz", f"r{i}/{name}")), name


def test_number_of_kept_tokens():
    for tokens, ratio, kept in TABLES["len_keep"]["rows"]:
        assert models_mae.num_visible(tokens, ratio) == kept, (tokens, ratio)


def test_masks_are_uniform_and_differ_between_clips():
    torch.manual_seed(0)
    mask, ids_restore, ids_keep = draw_masks(4000, (1, 4, 5), 0.75)
    assert (mask.sum(dim=1) == 15).all()
    assert (ids_restore.sort(dim=1).values == torch.arange(20)).all()
    assert (mask.gather(1, ids_keep) == 0).all()
    share = mask.mean(dim=0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    assert len(mask.unique(dim=0)) > 3000


@pytest.mark.parametrize("frames, predicted, expected", TABLES["target_frame_index"]["rows"])
def test_target_frames(frames, predicted, expected):
    t_patch = frames // math.gcd(frames, predicted)  # makes the frames per patch a whole number
    arguments = {"img_size": 8, "patch_size": 8, "embed_dim": 8, "depth": 0, "num_heads": 1}
    arguments |= {"decoder_embed_dim": 8, "decoder_depth": 0, "decoder_num_heads": 1}
    arguments |= {"num_frames": frames, "pred_t_dim": predicted, "t_patch_size": t_patch}
    model = MaskedAutoencoderViT(**arguments)
    video = torch.arange(frames).view(1, 1, -1, 1, 1).expand(1, 3, -1, 8, 8)
    picked = model.target_frames(video)
    assert picked[0, 0, :, 0, 0].tolist() == expected
    assert torch.equal(model.unpatchify(model.patchify(picked)), picked)


# --- classifier


@pytest.mark.parametrize("name", VIT_CASES)
def test_classifier_logits_loss_and_gradients(name):
    case = VIT_CASES[name]
    file, arrays = case["file"], golden.arrays(case["file"])
    state = golden.tensors(file, "sd/")
    model = golden.build(VisionTransformer, case).eval()
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    logits = model(golden.tensor(file, "video"))
    distance = case["logits_max_abs_diff_fp32_vs_fp64"]
    assert_near(logits.detach(), golden.tensor(file, "logits"), distance)
    loss = F.cross_entropy(logits, golden.tensor(file, "labels"))
    assert loss.item() == pytest.approx(case["ce_loss"], rel=LOSS_RTOL)
    loss.backward()
    norms = dict(zip(arrays["grad_names"], arrays["grad_l2"], strict=True))
    assert_same_gradients(model, norms, golden.tensors(file, "grad/"))


def test_classifier_joint_positions():
    state = joint_state(golden.tensors(VIT["file"], "sd/"), cls_embed=True, prefixes=("",))
    model = golden.build(VisionTransformer, VIT, sep_pos_embed=False).eval()
    model.load_state_dict(state)
    logits = model(golden.tensor(VIT["file"], "video")).detach()
    distance = VIT["logits_max_abs_diff_fp32_vs_fp64"]
    assert_near(logits, golden.tensor(VIT["file"], "logits"), distance)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("cls_embed", [True, False])
@torch.no_grad()
def test_pooling_takes_all_patch_tokens_and_no_class_token_or_the_first_token(cls_embed, pool):
    state = golden.tensors(VIT["file"], "sd/")
    model = golden.build(VisionTransformer, VIT, cls_embed=cls_embed, pool=pool).eval()
    model.load_state_dict(state if cls_embed else without_class(state))
    outputs = []
    model.blocks[-1].register_forward_hook(lambda module, args, x: outputs.append(x))
    logits = model(golden.tensor(VIT["file"], "video"))
    (tokens,) = outputs  # (N, L + class token, D)
    assert tokens.shape[1] == 32 + cls_embed
    pooled = torch.stack([tokens[:, i] for i in range(int(cls_embed), tokens.shape[1])]).mean(0)
    if pool == "cls":
        pooled = tokens[:, 0]
    expected = model.head(model.norm(pooled))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    features = model.forward_features(golden.tensor(VIT["file"], "video"))
    assert torch.equal(features, tokens[:, int(cls_embed) :])


def test_other_pools_and_leaving_out_the_patch_that_is_read_are_refused():
    with pytest.raises(ValueError, match="pool = 'max' must be one of mean, cls"):
        golden.build(VisionTransformer, VIT, pool="max")
    model = golden.build(VisionTransformer, VIT, pool="cls", cls_embed=False)
    model.check_mask_ratio(0)
    with pytest.raises(ValueError, match="mask_ratio must be 0 with pool = 'cls' and no class"):
        model(torch.zeros(1, 3, 4, 32, 32), 0.5)
    golden.build(VisionTransformer, VIT, pool="cls").check_mask_ratio(0.5)


def test_dropout_acts_before_the_head_in_training_alone():
    model = golden.build(VisionTransformer, VIT, dropout=1.0, drop_path_rate=0.0)
    model.load_state_dict(golden.tensors(VIT["file"], "sd/"))
    video = golden.tensor(VIT["file"], "video")
    with torch.no_grad():
        assert torch.equal(model.train()(video), model.head.bias.expand(3, -1))
        assert not torch.equal(model.eval()(video), model.head.bias.expand(3, -1))


@pytest.mark.parametrize("compiled", [False, True])
def test_drop_path_is_drawn_per_clip_and_per_branch(compiled):
    block = Block(8, 2, drop_path=0.25)
    block.drop_path.share = torch.tensor(0.75) if compiled else None
    with torch.no_grad():
        for linear, value in ((block.attn.proj, 3.0), (block.mlp.fc2, 30.0)):
            linear.weight.zero_()
            linear.bias.fill_(value)
        torch.manual_seed(0)
        added = block.train()(torch.zeros(4000, 5, 8)).flatten(1)
        assert (added == added[:, :1]).all()
        values, counts = added[:, 0].round(decimals=3).unique(return_counts=True)
        assert values.tolist() == [0.0, 4.0, 40.0, 44.0]  # kept branches are divided by 0.75
        shares = torch.tensor([0.0625, 0.1875, 0.1875, 0.5625])
        assert (counts / 4000 - shares).abs().max() < 0.03
        assert (block.eval()(torch.zeros(9, 5, 8)) == 33.0).all()
        block.drop_path = DropPath(1.0)  # all are dropped
        block.drop_path.share = torch.tensor(0.0) if compiled else None
        assert (block.train()(torch.zeros(9, 5, 8)) == 0.0).all()
        half = torch.ones(9, 5, 8, dtype=torch.bfloat16)
        assert block.drop_path(half).dtype == torch.bfloat16  # the residual stream stays narrow


# --- sizes: names, shapes and counts of the named models

DEFAULTS_OF = {
    "main_pretrain_defaults": {"decoder_depth": 8},
    "PRETRAIN.md": {"decoder_depth": 4},
    "main_finetune_defaults": {"num_frames": 32, "dropout": 0.5, "drop_path_rate": 0.1},
    "FINETUNE.md": {"dropout": 0.3, "drop_path_rate": 0.2},
}


@pytest.mark.parametrize("entry", MODEL_KEYS)
def test_named_models(entry):
    expected = MODEL_KEYS[entry]
    name, defaults, *patch_14 = entry.split("|")
    if name == "vit_huge_patch14" and not patch_14:
        name = "vit_huge_patch16"  # what the reference builds under that name has 16-pixel patches
    models = models_mae.MODELS | models_vit.MODELS
    with torch.device("meta"):
        model = models[name](**DEFAULTS_OF[defaults])
    state = model.state_dict()
    assert [[k, list(v.shape)] for k, v in state.items()] == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.buffers()) == []
    assert list(model.patch_embed.input_size) == expected["input_size"]
    if "layernorm_eps" in expected:
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        assert {m.eps for m in norms} == {expected["layernorm_eps"]}
    if "encoder_parameters" in expected:
        encoder = [p for k, p in model.named_parameters() if not k.startswith("decoder_")]
        count = sum(p.numel() for p in encoder) - model.mask_token.numel()
        assert count == expected["encoder_parameters"]
        assert model.t_pred_patch_size == expected["t_pred_patch_size"]
    if "drop_path" in expected:
        rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks]
        assert rates == expected["drop_path"]
        assert isinstance(model.blocks[0].drop_path, nn.Identity)
        assert model.dropout.p == expected["dropout"]


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("mae_vit_base_patch16", 99_898_880),
        ("mae_vit_large_patch16", 317_731_584),
        ("mae_vit_huge_patch14", 645_232_460),
        ("mae_vit_huge_patch16", 645_678_080),
        ("vit_base_patch16", 86_702_224),
        ("vit_large_patch16", 304_506_256),
        ("vit_huge_patch16", 632_424_080),
        ("vit_huge_patch14", 632_040_080),
    ],
)
def test_parameter_counts_with_default_arguments(name, parameters):
    with torch.device("meta"):
        model = (models_mae.MODELS | models_vit.MODELS)[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.blocks) == {"b": 12, "l": 24, "h": 32}[name.split("vit_")[1][0]]


@pytest.mark.parametrize("size", [name.removeprefix("vit_") for name in models_vit.MODELS])
def test_every_classifier_is_the_encoder_of_an_autoencoder(size):
    with torch.device("meta"):
        classifier = models_vit.MODELS[f"vit_{size}"]().state_dict()
        autoencoder = models_mae.MODELS[f"mae_vit_{size}"]().state_dict()
    for name, parameter in classifier.items():
        if not name.startswith("head."):
            assert autoencoder[name].shape == parameter.shape, name


# --- initialisation


@pytest.mark.parametrize("law", INIT["stats"])
def test_initialisation(law):
    """Compare each fresh parameter's spread with the golden one's, within sampling error.

    One law is not copied: with trunc_init the reference draws the patch weight with a standard
    deviation of 1, because the argument 0.02 of all other weights is missing there.
    """
    kwargs = dict(INIT["kwargs_mae"])
    torch.manual_seed(0)
    if law == "vit":
        kwargs = {k: v for k, v in kwargs.items() if k != "pred_t_dim" and "decoder" not in k}
        model = VisionTransformer(num_classes=INIT["stats"][law]["head.bias"][0][0], **kwargs)
    else:
        model = MaskedAutoencoderViT(trunc_init=law.endswith("True"), **kwargs)
    parameters = dict(model.named_parameters())
    assert list(parameters) == list(INIT["stats"][law])
    for name, (shape, mean, std, low, high) in INIT["stats"][law].items():
        parameter = parameters[name].detach()
        assert list(parameter.shape) == shape, name
        if std == 0:
            assert (parameter == mean).all(), name
            continue
        if name == "patch_embed.proj.weight" and law == "mae|trunc_init=True":
            mean, std, low, high = 0.0, 0.02, -0.09, 0.09
        deviations = 6 / math.sqrt(parameter.numel())  # two samples are compared, 4 sigma each
        assert parameter.mean().item() == pytest.approx(mean, abs=deviations * std), name
        assert parameter.std().item() == pytest.approx(std, rel=deviations), name
        uniform = max(-low, high) / std < 1.8  # sqrt(3); a normal law reaches further
        largest = parameter.abs().max().item() / parameter.std().item()
        assert (largest < 1.8) == uniform, name
        if uniform:
            assert parameter.abs().max().item() <= max(-low, high) * (1 + deviations), name


# --- errors name the arguments and their values


@pytest.mark.parametrize("model_class", [MaskedAutoencoderViT, VisionTransformer])
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"img_size": 30}, "img_size = 30 .* multiple of patch_size = 8"),
        ({"patch_size": 0}, "img_size = 32 .* multiple of patch_size = 0"),
        ({"num_frames": 5, "pred_t_dim": 5}, "num_frames = 5 .* multiple of t_patch_size = 2"),
        ({"embed_dim": 50}, "embed_dim = 50 .* multiple of num_heads = 4"),
    ],
)
def test_sizes_that_do_not_divide(model_class, arguments, words):
    case = SEP1_CLS1 if model_class is MaskedAutoencoderViT else VIT
    if model_class is VisionTransformer:
        arguments = {k: v for k, v in arguments.items() if k != "pred_t_dim"}
    with pytest.raises(ValueError, match=words):
        golden.build(model_class, case, **arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"pred_t_dim": 3}, r"pred_t_dim / num_frames = 2 \* 3 / 4"),
        ({"pred_t_dim": 0}, r"pred_t_dim / num_frames = 2 \* 0 / 4"),
        ({"pred_t_dim": 8, "strided_targets": True}, "num_frames = 4 to be a multiple of"),
        ({"pred_t_dim": 1}, r"pred_t_dim / num_frames = 2 \* 1 / 4"),
        ({"decoder_embed_dim": 34}, "decoder_embed_dim = 34 .* decoder_num_heads = 4"),
    ],
)
def test_autoencoder_sizes_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        golden.build(MaskedAutoencoderViT, SEP1_CLS1, **arguments)


def test_more_frames_may_be_predicted_than_there_are():
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1, pred_t_dim=8)
    assert model.predicted_frames == [0, 0, 0, 1, 1, 2, 2, 3]
    clips = torch.randn(2, 3, 4, 32, 32)
    loss, pred, _ = model(clips, 0.75)
    assert loss.isfinite() and model.unpatchify(pred).shape == (2, 3, 8, 32, 32)


def test_a_float64_model_has_a_float64_loss():
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1, norm_pix_loss=True).double()
    loss, _, _ = model(torch.randn(2, 3, 4, 32, 32, dtype=torch.float64), 0.75)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("model_class", [MaskedAutoencoderViT, VisionTransformer])
@pytest.mark.parametrize("size", [(8, 32, 32), (4, 32, 40), (4, 64, 32), (2, 32, 32)])
def test_clips_of_another_size(model_class, size):
    case = SEP1_CLS1 if model_class is MaskedAutoencoderViT else VIT
    model = golden.build(model_class, case)
    with pytest.raises(ValueError, match="4 x 32 x 32 .* got {} x {} x {};".format(*size)):
        model(torch.zeros(2, 3, *size))
    for clips in (torch.zeros(3, 4, 32, 32), torch.zeros(2, 3, 4, 32, 32, dtype=torch.int32)):
        with pytest.raises(
            ValueError, match=r"must be float or uint8 \[N, C, T, H, W\], not torch"
        ):
            model(clips)


@pytest.mark.parametrize("model_class", [MaskedAutoencoderViT, VisionTransformer])
def test_uint8_clips_are_normalised_by_the_model_to_the_last_bit(model_class):
    case = SEP1_CLS1 if model_class is MaskedAutoencoderViT else VIT
    model = golden.build(model_class, case).eval()
    clips = channels_first(torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8))
    results = []
    for imgs in (clips, (clips.to(torch.float32) / 255 - 0.45) / 0.225):
        torch.manual_seed(0)
        output = model(imgs)
        results.append(output if isinstance(output, tuple) else (output,))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ratio, kept", [(0.0, 32), (0.98, 0), (1.0, 0), (-0.5, 48), (1.5, -16)])
def test_mask_ratio_that_keeps_or_removes_nothing(ratio, kept):
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1)
    with pytest.raises(ValueError, match=rf"mask_ratio = {ratio} keeps {kept} of 32 tokens"):
        model(mae_video(SEP1_CLS1), mask_ratio=ratio)
    if kept != 32:
        with pytest.raises(ValueError, match=rf"mask_ratio = {ratio} keeps {kept} of 32 tokens"):
            model.forward_encoder(mae_video(SEP1_CLS1), ratio)


@pytest.mark.parametrize("ratio", [0.03125, 0.96875])
def test_mask_ratio_at_its_limits(ratio):
    model = golden.build(MaskedAutoencoderViT, SEP1_CLS1)
    loss, _, mask = model(mae_video(SEP1_CLS1), mask_ratio=ratio)
    assert mask.sum() == 2 * 32 * ratio and loss.isfinite()


def test_tiny_autoencoder_starts_with_large_positions_and_the_others_with_the_papers():
    for name, std in (("mae_vit_tiny_patch8", 0.4), ("mae_vit_base_patch16", 0.02)):
        torch.manual_seed(0)
        model = models_mae.MODELS[name](img_size=96, num_frames=8, pred_t_dim=4)
        for prefix in ("", "decoder_"):
            positions = model.get_parameter(f"{prefix}pos_embed_spatial")
            assert positions.std().item() == pytest.approx(std, rel=0.1)
        assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
