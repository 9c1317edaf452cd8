"""Tests of reconstructions and pictures (util/visualize.py, demo/visualize.py)."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from demo import visualize
from models_mae import mae_vit_tiny_patch8
from models_vit import vit_tiny_patch8
from tests import golden
from tests.conftest import numbered_frame, read_number
from tests.test_models import RULES, plain_targets, target_clips
from tests.video_files import write_video
from util import file_io
from util.errors import UserError
from util.masking import fixed_masks
from util.video.decode import Video
from util.video.transforms import channels_first, normalize
from util.visualize import encode_gif, encode_mp4, enlarge, reconstruct, tile

UNSAID = {"pos_embed_std": None, "decoder_sep_pos_embed": None}  # in files: from the shapes
SIZES = {"img_size": 32, "num_frames": 8, "pred_t_dim": 4}


def small_model(**arguments):
    torch.manual_seed(0)
    model = mae_vit_tiny_patch8(**(SIZES | arguments))
    with torch.no_grad():  # fresh weights predict next to nothing
        model.decoder_pred.weight.mul_(5)
    return model


def clips(num_clips=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_clips, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)


def saved(path, model, **others) -> str:
    torch.save({"model": model.state_dict(), "arguments": model.arguments} | others, path)
    return str(path)


# --- reconstructions


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm_pix_loss": True},
        {"norm_pix_loss": False},
        {"cls_embed": False},
        {"cls_through_decoder": True, "strided_targets": True},
    ],
)
def test_reconstruction_is_the_models_own(arguments):
    """The same mask in training gives the same loss, and the same pixels where it is raw."""
    model = small_model(**arguments)
    result = reconstruct(model, clips(), 0.75, seed=2)
    order = fixed_masks(2, model.patch_embed.input_size, 0.75, seed=2).ids_restore.float()
    imgs = normalize(channels_first(clips()))
    with torch.no_grad(), golden.masking_noise(order):
        loss, pred, mask = model(imgs, 0.75)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close((result.loss * mask).sum() / mask.sum(), loss)
    target = model.patchify(model.target_frames(imgs))
    if model.target == "patch":
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    pixels = model.unpatchify(torch.where(mask.bool().unsqueeze(-1), pred, target))
    levels = ((pixels * 0.225 + 0.45) * 255).clamp(0, 255).permute(0, 2, 3, 4, 1)
    assert (result.reconstruction - levels).abs().max() <= 0.51
    assert levels.std() > 30  # there is something to compare


def test_rows():
    model = small_model()
    frames = [0, 2, 4, 7]  # linspace, truncated
    result = reconstruct(model, clips(), 0.75, seed=2)
    assert torch.equal(result.original, clips()[:, frames])
    t, h, w = model.patch_embed.input_size
    removed = result.mask.view(2, t, h, w).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    assert (result.masked[removed] == 128).all()
    assert torch.equal(result.masked[~removed], result.original[~removed])
    assert torch.equal(result.reconstruction[~removed], result.original[~removed])
    assert not torch.equal(result.reconstruction[removed], result.original[removed])
    whole = reconstruct(model, clips(), 0.75, seed=2, paste_visible=False)
    assert torch.equal(whole.reconstruction[removed], result.reconstruction[removed])
    assert not torch.equal(whole.reconstruction[~removed], result.original[~removed])


@pytest.mark.parametrize("rule", RULES)
def test_a_perfect_prediction_shows_the_original(monkeypatch, videos, rule):
    """The prediction is what the project of that target trains; the picture is exact to a level."""
    model = small_model(num_frames=4, pred_t_dim=4, **RULES[rule])
    shown = target_clips(videos)
    perfect = plain_targets(shown, 2, 8, rule).float()
    monkeypatch.setattr(model, "forward_decoder", lambda *_: perfect)
    result = reconstruct(model, shown, 0.75, paste_visible=False)
    assert torch.equal(result.original, shown)
    assert (result.reconstruction.int() - shown.int()).abs().max() <= 1
    assert result.loss.max() < 5e-9


def test_normalised_targets_get_the_truths_statistics():
    model = small_model(norm_pix_loss=True)
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
    result = reconstruct(model, clips(), 0.75, paste_visible=False)
    patches = result.original.unflatten(3, (4, 8)).unflatten(2, (4, 8)).float()
    means = patches.mean(dim=(3, 5, 6), keepdim=True).expand_as(patches)
    got = result.reconstruction.unflatten(3, (4, 8)).unflatten(2, (4, 8))
    assert (got - means).abs().max() <= 0.51


def test_reconstructing_leaves_training_alone():
    model = small_model().train()
    state = torch.get_rng_state()
    result = reconstruct(model, clips(), 0.75)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(result.loss, reconstruct(model, clips(), 0.75).loss)
    assert not torch.equal(result.loss, reconstruct(model, clips(), 0.75, seed=1).loss)


def test_clips_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"clips of shape \[2, 4, 32, 32, 3\] are not the model's"):
        reconstruct(small_model(), clips()[:, :4], 0.75)


# --- pictures


def test_tile_and_enlarge():
    red, green, blue = (torch.zeros(2, 2, 3, 3, dtype=torch.uint8) for _ in range(3))
    for channel, video in enumerate((red, green, blue)):
        video[..., channel] = 9
    sheet = tile([[red, green], [enlarge(blue, 1)]], gap=1)
    assert sheet.shape == (2, 5, 7, 3)
    assert (sheet[:, :2, :3] == red).all()
    assert (sheet[:, :2, 4:] == green).all()
    assert (sheet[:, 3:, :3] == blue).all()
    assert (sheet[:, 2] == 255).all()
    assert (sheet[:, 3:, 3:] == 255).all()
    large = enlarge(torch.arange(6, dtype=torch.uint8).view(1, 2, 3, 1), 2)
    assert large[0, :, :, 0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_gif():
    levels = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    video = levels.view(3, 1, 1, 3).expand(3, 20, 30, 3).clone()
    video[:, :, :10] = torch.tensor([40, 80, 120], dtype=torch.uint8)
    with Image.open(io.BytesIO(encode_gif(video, fps=4))) as gif:
        assert (gif.format, gif.size, gif.n_frames) == ("GIF", (30, 20), 3)
        assert gif.info["loop"] == 0
        for number in range(3):
            gif.seek(number)
            assert gif.info["duration"] == 250
            shown = np.asarray(gif.convert("RGB")).astype(int)
            assert abs(shown - video[number].numpy()).max() <= 8


def test_picture_of_the_readme():
    path = Path(__file__).parent.parent / "docs/reconstructions.gif"
    assert path.stat().st_size < 2e6
    with Image.open(path) as gif:
        assert gif.n_frames == 8


def test_mp4(tmp_path):
    ramp = torch.linspace(0, 255, 31).to(torch.uint8).view(1, 1, 31, 1)
    video = torch.stack([ramp.expand(1, 21, 31, 3)[0] // k for k in (1, 2, 4)])
    path = tmp_path / "ramp.mp4"
    path.write_bytes(encode_mp4(video, fps=3.75))
    with Video(str(path)) as decoded:
        assert (decoded.num_frames, decoded.height, decoded.width) == (3, 22, 32)
        assert decoded.fps == pytest.approx(3.75)
        for number, frame in decoded.frames(range(3)):
            difference = frame[:21, :31].astype(int) - video[number].numpy()
            assert abs(difference).mean() < 4


# --- the command


def run(*arguments):
    visualize.main(visualize.parse_args([str(a) for a in arguments]))


def gif_frames(path):
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
        return np.stack(frames), gif.info["duration"]


def test_files_of_the_command(tmp_path, videos, capsys):
    checkpoint = saved(tmp_path / "mae.pth", small_model(), args={"sampling_rate": 2})
    out = tmp_path / "out"
    files = videos / "v0.mp4", videos / "v1.mp4", videos / "v0.mp4"
    run(*files, "--checkpoint", checkpoint, "--output_dir", out, "--mask_ratio", "0.5", "0.95")
    names = [f"{stem}.{end}" for stem in ("v0", "v0_2", "v1") for end in ("gif", "mp4")]
    assert sorted(path.name for path in out.iterdir()) == names
    assert f"{out}/v1.gif {out}/v1.mp4" in capsys.readouterr().out
    frames, duration = gif_frames(out / "v0.gif")
    assert len(frames) == 4
    assert duration == 130  # 8 frames at 15 per second, every second one shown
    with Video(str(out / "v0.mp4")) as video:
        assert video.num_frames == 4
        for number, frame in video.frames(range(4)):
            frame = frame[: frames.shape[1], : frames.shape[2]].astype(int)
            assert abs(frame - frames[number]).mean() < 14  # 256 colours
    # the same video drawn with the next seed: same truth, other mask
    second, _ = gif_frames(out / "v0_2.gif")
    grey = [(f[:, :, 20:] == 128).all(-1) for f in (frames, second)]
    assert not np.array_equal(*grey)
    left, right = (np.count_nonzero(part) / 4 / 128**2 for part in np.split(grey[0], [130], 2))
    assert left == pytest.approx(0.5, abs=0.02)
    assert right == pytest.approx(61 / 64, abs=0.02)


def test_grid_and_frame_rate(tmp_path, videos):
    checkpoint = saved(tmp_path / "mae.pth", small_model())
    files = [videos / f"v{i}.mp4" for i in range(3)]
    run(*files, "--checkpoint", checkpoint, "--output_dir", tmp_path / "one", "--fps", "5")
    run(*files, "--checkpoint", checkpoint, "--output_dir", tmp_path / "all", "--grid", "2")
    one, duration = gif_frames(tmp_path / "one/v1.gif")
    grid, _ = gif_frames(tmp_path / "all/grid.gif")
    assert duration == 200
    assert grid.shape == (4, 2 * one.shape[1] + 16, 2 * one.shape[2] + 16, 3)
    assert abs(grid[:, : one.shape[1], -one.shape[2] :].astype(int) - one).mean() < 4
    assert (grid[:, one.shape[1] :, one.shape[2] :] == 255).all()
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["grid.gif", "grid.mp4"]


def test_clip_lies_where_asked(tmp_path, videos):
    model = small_model(pred_t_dim=8)
    autoencoder = visualize.load_autoencoder(
        saved(tmp_path / "mae.pth", model, args={"sampling_rate": 2})
    )
    assert autoencoder.fps == 15
    for start, first in ((0, 0), (0.5, 22), (1, 44)):  # 60 frames at 30 fps, 16 of them spanned
        clip = visualize.load_clip(videos / "v0.mp4", autoencoder, start)
        assert clip.shape == (1, 8, 32, 32, 3)
        numbers = [read_number(frame) for frame in clip[0]]
        assert numbers == [first + int(i * 15 / 7) for i in range(8)]


def test_a_clip_of_a_variable_frame_rate_lies_where_asked(tmp_path):
    """Ten frames per second for a second, then fifty: the last half second has half the frames."""
    stamps = [*range(0, 1000, 100), *range(1000, 1800, 20)]
    frames = [numbered_frame(i) for i in range(50)]
    path = write_video(tmp_path / "v.mp4", frames, fps=1000, stamps=stamps, options={"crf": "4"})
    checkpoint = saved(tmp_path / "mae.pth", small_model(), args={"sampling_rate": 2})
    autoencoder = visualize.load_autoencoder(checkpoint)
    for start, first, last in ((0, 0, 5), (1, 24, 49)):
        clip = visualize.load_clip(path, autoencoder, start)[0]
        assert [read_number(clip[0]), read_number(clip[-1])] == pytest.approx([first, last], abs=1)


def test_model_is_rebuilt_from_its_file(tmp_path):
    model = small_model(norm_pix_loss=True, sep_pos_embed=False, pred_t_dim=8)
    path = saved(tmp_path / "mae.pth", model.half())
    loaded = visualize.load_autoencoder(path)
    assert loaded.sampling_rate == 4
    assert {**loaded.model.arguments, **UNSAID} == {**model.arguments, **UNSAID}
    assert not loaded.model.training
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].float())
    clip = clips(1)
    noted, also_noted, plain = (
        visualize.draw(visualize.Autoencoder(m.eval(), 4), clip, [0.9])
        for m in (model.float(), small_model(target="channel"), small_model(norm_pix_loss=False))
    )
    assert noted.shape[1] == also_noted.shape[1] > plain.shape[1]  # said only where it is true


def test_captions_state_what_is_removed(monkeypatch):
    words, caption = [], visualize._caption

    def note_words(text, width, num_frames):
        words.append(text)
        return caption(text, width, num_frames)

    monkeypatch.setattr(visualize, "_caption", note_words)
    autoencoder = visualize.Autoencoder(small_model(norm_pix_loss=True), 4)
    visualize.draw(autoencoder, clips(1), [0.95, 0.5], "time")  # one of four steps stays
    rows = ["original", "masked", "reconstruction"]
    assert words == ["75% masked, time", "50% masked, time", *rows, visualize.NOTE["patch"]]


def test_default_checkpoint_is_the_newest_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "DEMO_RUN", tmp_path)
    assert visualize.default_checkpoint() == "k400/vit_large"
    monkeypatch.setattr(file_io, "ADDRESS", "http://127.0.0.1:9/{size}_{data}.pth")
    file_io.fetch.cache_clear()  # of other tests' addresses
    problem = r"`make demo` has left no .* and cannot fetch http://127.*give --checkpoint"
    with pytest.raises(UserError, match=problem):
        visualize.load_autoencoder()
    for epoch in (2, 10):
        newest = saved(tmp_path / f"checkpoint-{epoch:05d}.pth", small_model())
    assert visualize.default_checkpoint() == newest
    assert visualize.load_autoencoder().model.pred_t_dim == SIZES["pred_t_dim"]


def test_embedded_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "ROOT", tmp_path)
    found = visualize.embedded_videos()
    assert len({path.parent.name for path in found}) == len(found) == 8
    (tmp_path / "data/visualize/dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"the embedded videos cannot be written: .*visualize"):
        visualize.embedded_videos()


def test_mistakes_are_named(tmp_path, videos, capsys):
    checkpoint = saved(tmp_path / "mae.pth", small_model())
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "file").touch()
    video = videos / "v0.mp4"
    with pytest.raises(UserError, match=r"nothing.mp4: no such file"):
        run("nothing.mp4", "--checkpoint", checkpoint, "--output_dir", tmp_path)
    with pytest.raises(UserError, match=r"text.mp4: cannot be opened as a video"):
        run(tmp_path / "text.mp4", "--checkpoint", checkpoint, "--output_dir", tmp_path)
    with pytest.raises(UserError, match=r"nothing.pth"):
        run(video, "--checkpoint", "nothing.pth")
    with pytest.raises(UserError, match=r"cannot create the folder .*file: it is a file"):
        run(video, "--checkpoint", checkpoint, "--output_dir", tmp_path / "file")
    classifier = saved(tmp_path / "vit.pth", vit_tiny_patch8(img_size=32, num_frames=8))
    with pytest.raises(
        UserError, match=r"vit.pth has no decoder: to reconstruct, give a pre-trained"
    ):
        run(video, "--checkpoint", classifier)
    (tmp_path / "v0.gif").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*v0.gif"):
        run(video, "--checkpoint", checkpoint, "--output_dir", tmp_path)
    for flags, problem in (
        (["--mask_ratio", "95"], "--mask_ratio: 95 is not a share above 0 and below 1"),
        (["--clip_start", "2"], "--clip_start: 2 is not a number from 0 to 1"),
        (["--seed", "-1"], "--seed: -1 is not a whole number of at least 0"),
        (["--fps", "nan"], "--fps: nan is not a number"),
        (["--mask_type", "cube"], "--mask_type: invalid choice: 'cube'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(video, *flags)
        assert problem in capsys.readouterr().err
