"""Test targets that are no pixels (util/targets.py): histograms of gradients, and motion."""

import numpy as np
import pytest
import torch

from demo import visualize
from models_mae import mae_vit_huge_patch14, mae_vit_tiny_patch8
from tests.test_models import target_clips
from util import targets
from util.errors import UserError
from util.video.transforms import channels_first, normalize
from util.visualize import reconstruct
from util.weights import read_weights

OTHERS = ("hog", "motion")


def model_of(target, **arguments):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "num_frames": 4, "pred_t_dim": 4, "target": target}
    return mae_vit_tiny_patch8(**(sizes | arguments))


def same_bins_as_skimage(frames):
    """Compare hog with scikit-image's of every channel; frames are uint8 [N, C, t, H, W]."""
    hog = pytest.importorskip("skimage.feature").hog
    N, C, t, H, W = frames.shape
    ours = targets.hog(normalize(frames)).view(N, C, 9, t, H // 8, W // 8)
    for n, c, i in np.ndindex(N, C, t):
        image = frames[n, c, i].numpy() / 255
        theirs = hog(image, 9, (8, 8), (1, 1), "L2", feature_vector=False)[:, :, 0, 0]  # (h, w, 9)
        expected = torch.from_numpy(theirs).permute(2, 0, 1).float()
        torch.testing.assert_close(ours[n, c, :, i], expected, rtol=0, atol=1e-5)


def test_hog_is_that_of_scikit_image(videos):
    """Of a real clip, of noise, and of nearly and exactly flat frames."""
    same_bins_as_skimage(channels_first(target_clips(videos)))


def test_gradients_of_pixels_fall_into_the_bins_of_scikit_image():
    """Every downward gradient (row, col) of grey levels, at the centre of a cell of its own."""
    row, col = torch.meshgrid(torch.arange(256), torch.arange(-255, 256), indexing="ij")
    cells = torch.zeros(256, 511, 8, 8, dtype=torch.uint8)
    cells[..., 5, 4] = row
    cells[..., 4, 3], cells[..., 4, 5] = (-col).clamp(min=0), col.clamp(min=0)
    same_bins_as_skimage(cells.transpose(1, 2).reshape(1, 1, 1, 256 * 8, 511 * 8))


@pytest.mark.parametrize("frames", [(0, 2, 3), (0, 1, 2, 3)])
def test_motion_is_the_difference_to_the_frame_before(videos, frames):
    clips = channels_first(target_clips(videos))
    levels = clips.double()
    expected = [levels[:, :, max(t, 1)] - levels[:, :, max(t, 1) - 1] for t in frames]
    expected = torch.stack(expected, dim=2) / 255 / 0.225
    got = targets.motion(clips, frames)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    assert (got[expected == 0] == 0).all() and got.abs().max() > 1


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize(("predicted", "strided"), [(4, False), (2, False), (2, True)])
def test_a_perfect_prediction_has_no_loss(videos, target, predicted, strided):
    """The target is put together here, patch by patch."""
    arguments = {"pred_t_dim": predicted, "strided_targets": strided}
    model = model_of(target, img_size=32, patch_size=16, **arguments)
    clips = channels_first(target_clips(videos))
    if target == "hog":
        maps, side = targets.hog(normalize(clips[:, :, model.predicted_frames])), 2
    else:
        maps, side = targets.motion(clips, model.predicted_frames), 16
    u = predicted // 2
    truth = torch.stack([
        maps[:, :, t * u :][:, :, :u, h * side :][..., :side, w * side :][..., :side]
        .permute(0, 2, 3, 4, 1).flatten(1) for t, h, w in np.ndindex(2, 2, 2)
    ], dim=1)  # fmt: skip
    assert model.decoder_pred.out_features == truth.shape[-1]
    if target == "motion":  # over the root mean square of the clip, and one level
        truth = (
            truth / (truth.square().mean(dim=(1, 2), keepdim=True) + (1 / 255 / 0.225) ** 2).sqrt()
        )
    assert model.patch_losses(clips, truth).max() < 1e-8
    assert model.patch_losses(clips, truth.roll(1, dims=-1))[:2].mean() > 1e-3


@pytest.mark.parametrize("target", OTHERS)
def test_all_kinds_of_clips_have_the_same_finite_losses(videos, target):
    """As uint8 or float, under autocast too, and with flat frames that never change."""
    model, clips = model_of(target), channels_first(target_clips(videos))
    torch.manual_seed(1)
    pred = torch.randn(6, 32, model.decoder_pred.out_features)
    expected = model.patch_losses(clips, pred)
    torch.testing.assert_close(model.patch_losses(normalize(clips), pred), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.patch_losses(clips, pred), expected)
    flat = model.patch_losses(clips[-2:], torch.zeros_like(pred[-2:]))
    assert (flat == 0).all()
    loss, _, _ = model(clips, 0.75)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
def test_the_compiled_loss_is_the_eager_one(videos, target):
    model, clips = model_of(target), channels_first(target_clips(videos))
    pred = torch.randn(6, 32, model.decoder_pred.out_features)
    compiled = torch.compile(model.patch_losses, fullgraph=True)(clips, pred)
    torch.testing.assert_close(compiled, model.patch_losses(clips, pred), rtol=1e-4, atol=1e-5)


def test_hog_needs_whole_cells():
    with pytest.raises(ValueError, match="patch_size that is a multiple of 8, not 14"):
        mae_vit_huge_patch14(target="hog", depth=1)


@pytest.mark.parametrize("target", OTHERS)
def test_a_file_says_what_its_model_predicts(tmp_path, target):
    model = model_of(target)
    path = tmp_path / "mae.pth"
    torch.save({"model": model.state_dict(), "arguments": model.arguments}, path)
    found = read_weights(str(path)).arguments
    assert (found["target"], found["pred_t_dim"]) == (target, 4)
    if target == "hog":  # the demo, the page and the notebook load models by this function
        with pytest.raises(UserError, match="'hog' predicts histograms of gradients, not pictures"):
            visualize.load_model(str(path))
    else:
        assert visualize.load_model(str(path)).target == target


def test_hog_has_no_pictures():
    with pytest.raises(ValueError, match="'hog' predicts histograms of gradients, not pictures"):
        reconstruct(model_of("hog"), torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8), 0.75)


def test_pictures_of_motion_are_differences_on_grey(videos, monkeypatch):
    model, clips = model_of("motion"), target_clips(videos)
    levels = clips.int()
    change = torch.cat([levels[:, 1:2] - levels[:, :1], levels.diff(dim=1)], dim=1)
    perfect = model.target_patches(channels_first(clips))
    perfect = (
        perfect / (perfect.square().mean(dim=(1, 2), keepdim=True) + (1 / 255 / 0.225) ** 2).sqrt()
    )
    monkeypatch.setattr(model, "forward_decoder", lambda *_: perfect)
    result = reconstruct(model, clips, 0.75, paste_visible=False)
    shown = (change + 128).clamp(0, 255)
    assert torch.equal(result.original.int(), shown)
    assert torch.equal(result.reconstruction, result.original)
    assert shown.float().std() > 10
