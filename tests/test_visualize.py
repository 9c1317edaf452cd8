"""Tests of reconstructions and pictures (util/visualize.py, demo/visualize.py)."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import main_test
from demo import visualize
from models_mae import mae_vit_tiny_patch8
from models_vit import vit_tiny_patch8
from tests import golden
from tests.conftest import numbered_frame, read_number
from tests.test_models import RULES, plain_targets, target_clips
from tests.video_files import write_video
from util import file_io
from util.errors import UserError
from util.features import load_clips
from util.file_io import printable
from util.masking import fixed_masks
from util.video.decode import Video
from util.video.transforms import channels_first, normalize
from util.visualize import (
    encode_gif,
    encode_mp4,
    enlarge,
    last_attention,
    lay_over,
    reconstruct,
    tile,
)

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


def small_classifier(**arguments):
    torch.manual_seed(0)
    model = vit_tiny_patch8(**({"img_size": 32, "num_frames": 8} | arguments))
    with torch.no_grad():  # fresh weights make all tokens alike
        for parameter in model.patch_embed.parameters():
            parameter.mul_(5)
        for attn in (block.attn for block in model.blocks):
            attn.q.weight.mul_(3)
        model.head.weight.mul_(20)
    return model.eval()


def without(model, *starts):
    return {k: v for k, v in model.state_dict().items() if not k.startswith(starts)}


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


# --- attention


@pytest.mark.parametrize(
    ("arguments", "reads"),
    [
        ({}, slice(1, None)),
        ({"cls_embed": False}, slice(None)),
        ({"num_classes": 3}, slice(1, None)),
        ({"num_classes": 3, "pool": "cls"}, slice(1)),
        ({"num_classes": 3, "pool": "cls", "cls_embed": False}, slice(1)),
    ],
)
def test_attention_is_the_last_blocks(arguments, reads):
    """The same weights, applied to the values, give what the block computes."""
    model = (
        small_classifier(**arguments) if "num_classes" in arguments else small_model(**arguments)
    )
    attn, seen = model.blocks[-1].attn, []
    hook = attn.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    weights = last_attention(model, clips())
    hook.remove()
    (x, output), (N, nh) = seen[0], (2, attn.num_heads)
    with torch.no_grad():
        q, k, v = (
            layer(x).view(N, -1, nh, 32).transpose(1, 2) for layer in (attn.q, attn.k, attn.v)
        )
        full = torch.softmax(q @ k.transpose(2, 3) / 32**0.5, dim=-1)  # (N, nh, L, L)
        torch.testing.assert_close(attn.proj((full @ v).transpose(1, 2).flatten(2)), output)
    torch.testing.assert_close(weights, full[:, :, reads].mean(dim=(1, 2)))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    assert weights.std() > 0.1 / weights.shape[1]  # not all alike
    assert not model.blocks[-1]._forward_pre_hooks


def test_heat_lies_over_its_patches():
    video = torch.full((4, 16, 16, 3), 100, dtype=torch.uint8)
    heat = torch.zeros(2, 4, 4)
    heat[0, 3, 0], heat[1, 0, 3] = 0.1, 0.25
    shown = lay_over(video, heat).int().sum(dim=-1)
    assert (shown[0, :8] == shown[2, -1, 0]).all()  # black and grey
    assert torch.equal(shown[0], shown[1]) and torch.equal(shown[2], shown[3])
    assert shown[0].max() < 0.8 * shown[2].max()
    hottest = divmod(shown[2].argmax().item(), 16)
    assert hottest[0] < 4 and hottest[1] >= 12
    stretched = lay_over(video, 3 * heat + 1).int().sum(dim=-1)  # the same, but for rounding
    assert abs(stretched - shown).max() <= 6
    assert (lay_over(video, torch.ones(2, 4, 4)).int().sum(dim=-1) == shown[0, 0, 0]).all()


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


NAMES = ["moving \U0001f680", "a\x00b\n", "caf\udce9", "<b>|" * 300, "\u8dd1\u6b65", "e", "f"]


@pytest.mark.parametrize("names", [NAMES, []])
@pytest.mark.parametrize("sampling", ["dense", "segments"])
def test_classifiers_show_their_five_best_classes(tmp_path, videos, capsys, names, sampling):
    """They are those of main_test.py with one view; any name leaves the picture whole."""
    checkpoint = saved(
        tmp_path / "vit.pth",
        small_classifier(num_classes=7),
        classes=names,
        args={"sampling": sampling, "sampling_rate": 2},
    )
    out = tmp_path / "out"
    run(videos / "v0.mp4", "--checkpoint", checkpoint, "--output_dir", out)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  0.")]
    one_view = ["--num_clips", "1", "--num_crops", "1", "--num_workers", "1", "--output_dir", ""]
    argv = ["--videos", str(videos / "v0.mp4"), "--finetune", checkpoint, *one_view]
    main_test.main(main_test.parse_args([*argv, "--device", "cpu"]))
    tested = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  0.")]
    assert lines == tested and len(lines) == 5
    frames, _ = gif_frames(out / "v0.gif")
    assert frames.shape[1:] == (130, 128 + 8 + visualize.BARS_WIDTH, 3)
    assert len(frames) == 8
    widths = (frames[0, :, -visualize.BARS_WIDTH :, 0] < 60).sum(axis=1)[20::26]
    shares = [float(line.split()[0]) for line in lines]
    assert widths / visualize.BARS_WIDTH == pytest.approx(shares, abs=0.02)


def test_long_names_leave_room_for_the_probability():
    shown, nameless = (
        visualize.draw_classes(clips(1), [(name, 0.5) for name in names])
        for names in (list(map(printable, NAMES)), [""] * len(NAMES))
    )
    assert torch.equal(shown[:, :, -36:], nameless[:, :, -36:])
    assert not torch.equal(shown, nameless)


def test_attention_of_the_command(tmp_path, videos, capsys):
    """A file with a decoder, one with a head, and one with neither: the clip and its attention."""
    files = {"mae": small_model(target="hog"), "vit": small_classifier(num_classes=7)}
    files = [saved(tmp_path / f"{name}.pth", model) for name, model in files.items()]
    files.append(str(tmp_path / "encoder.pth"))
    encoder = without(small_model(), "decoder", "mask_token")
    torch.save({"model": encoder, "args": {"num_frames": 8, "input_size": 32}}, files[-1])
    for number, file in enumerate(files):
        out = tmp_path / str(number)
        run(videos / "v0.mp4", "--checkpoint", file, "--attention", "--output_dir", out)
        assert "v0.mp4: frames " in capsys.readouterr().out
        frames, _ = gif_frames(out / "v0.gif")
        assert len(frames) == 8  # all of the clip, not only those that are predicted
        clip, heat = frames[:, 17 + 4 : 17 + 4 + 128, :128], frames[:, 17 + 4 : 17 + 4 + 128, 132:]
        assert heat.shape == (8, 128, 128, 3)
        assert abs(clip.astype(int) - heat).mean() > 20


@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_results_that_are_not_numbers_are_refused(tmp_path, videos, kind):
    model = small_model() if kind == "mae" else small_classifier(num_classes=7)
    with torch.no_grad():
        model.blocks[-1].norm1.weight[0] = float("nan")
    checkpoint = saved(tmp_path / "model.pth", model)
    flags = ["--attention"] if kind == "mae" else []
    with pytest.raises(UserError, match="what the model computes is not a number"):
        run(videos / "v0.mp4", "--checkpoint", checkpoint, "--output_dir", tmp_path, *flags)


def test_flags_of_masks_are_refused_where_nothing_is_masked(tmp_path, videos):
    checkpoint = saved(tmp_path / "vit.pth", small_classifier(num_classes=7))
    with pytest.raises(UserError, match=r"--mask_ratio is for reconstructions"):
        run(videos / "v0.mp4", "--checkpoint", checkpoint, "--mask_ratio", "0.5")
    checkpoint = saved(tmp_path / "mae.pth", small_model())
    with pytest.raises(UserError, match=r"--seed is for reconstructions"):
        run(videos / "v0.mp4", "--checkpoint", checkpoint, "--attention", "--seed", "2")


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
    model = visualize.load_model(
        saved(tmp_path / "mae.pth", small_model(pred_t_dim=8), args={"sampling_rate": 2})
    )
    for start, first in ((0, 0), (0.5, 22), (1, 44)):  # 60 frames at 30 fps, 16 of them spanned
        clip = visualize.load_clip(videos / "v0.mp4", model, start)
        assert clip.fps(8) == 15
        assert clip.pixels.shape == (1, 8, 32, 32, 3)
        numbers = [read_number(frame) for frame in clip.pixels[0]]
        assert numbers == [first + int(i * 15 / 7) for i in range(8)]
        shown = f"frames {first}, {first + 2}, {first + 4}, ..., {first + 15} of 60"
        assert clip.frames == f"{shown}, {first / 30:.2f} to {(first + 15) / 30:.2f} s"


@pytest.mark.parametrize("flags", [{"sampling_rate": 2}, {"sampling": "segments"}])
def test_the_central_clip_is_the_one_that_is_tested(tmp_path, flags):
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(61)])
    model = visualize.load_model(saved(tmp_path / "mae.pth", small_model(), args=flags))
    clip = visualize.load_clip(path, model)
    assert torch.equal(normalize(channels_first(clip.pixels)), load_clips(path, model))


def test_segments_are_shown_as_trained(tmp_path, videos):
    flags = {"sampling": "segments", "sampling_rate": 2}
    model = visualize.load_model(saved(tmp_path / "mae.pth", small_model(), args=flags))
    for start, place in ((0, 0), (0.5, 3.75), (1, 7.4999)):  # 8 segments of 7.5 frames
        clip = visualize.load_clip(videos / "v0.mp4", model, start)
        numbers = [int(7.5 * i + place) for i in range(8)]
        assert [read_number(frame) for frame in clip.pixels[0]] == numbers
        shown = f"frames {numbers[0]}, {numbers[1]}, {numbers[2]}, ..., {numbers[7]} of 60"
        assert clip.frames == f"{shown}, {numbers[0] / 30:.2f} to {numbers[7] / 30:.2f} s"
    assert clip.fps(8) == 4  # the video lasts two seconds
    assert clip.fps(2) == 2  # not a slide show


@pytest.mark.parametrize(
    ("sampling", "frames"), [("dense", "0, 2, 2, ..., 2"), ("segments", "0, 0, 0, ..., 2")]
)
def test_a_video_shorter_than_a_clip(tmp_path, capsys, sampling, frames):
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(3)])
    checkpoint = saved(tmp_path / "mae.pth", small_model(), args={"sampling": sampling})
    run(path, "--checkpoint", checkpoint, "--output_dir", tmp_path)
    different = 2 if sampling == "dense" else 3
    text = f"v.mp4: frames {frames} of 3 ({different} different), 0.00 to 0.07 s\n"
    assert text in capsys.readouterr().out


def test_a_clip_of_a_variable_frame_rate_lies_where_asked(tmp_path):
    """Ten frames per second for a second, then fifty: the last half second has half the frames."""
    stamps = [*range(0, 1000, 100), *range(1000, 1800, 20)]
    frames = [numbered_frame(i) for i in range(50)]
    path = write_video(tmp_path / "v.mp4", frames, fps=1000, stamps=stamps, options={"crf": "4"})
    checkpoint = saved(tmp_path / "mae.pth", small_model(), args={"sampling_rate": 2})
    model = visualize.load_model(checkpoint)
    for start, first, last, seconds in ((0, 0, 5, (0, 0.5)), (1, 24, 49, (1.28, 1.78))):
        clip = visualize.load_clip(path, model, start)
        numbers = [read_number(frame) for frame in clip.pixels[0]]
        assert [numbers[0], numbers[-1]] == pytest.approx([first, last], abs=1)
        assert f"frames {numbers[0]}, " in clip.frames
        said = re.search(r"of 50.*, (\S+) to (\S+) s$", clip.frames)
        assert list(map(float, said.groups())) == pytest.approx(seconds, abs=0.03)


def test_model_is_rebuilt_from_its_file(tmp_path):
    model = small_model(norm_pix_loss=True, sep_pos_embed=False, pred_t_dim=8)
    path = saved(tmp_path / "mae.pth", model.half())
    loaded = visualize.load_model(path)
    assert (loaded.sampling_rate, loaded.sampling) == (4, "dense")
    assert {**loaded.arguments, **UNSAID} == {**model.arguments, **UNSAID}
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].float())
    clip = clips(1)
    noted, also_noted, plain = (
        visualize.draw(m.eval(), clip, [0.9])
        for m in (model.float(), small_model(target="channel"), small_model(norm_pix_loss=False))
    )
    assert noted.shape[1] == also_noted.shape[1] > plain.shape[1]  # said only where it is true


def test_captions_state_what_is_removed(monkeypatch):
    words, caption = [], visualize._caption

    def note_words(text, width, num_frames):
        words.append(text)
        return caption(text, width, num_frames)

    monkeypatch.setattr(visualize, "_caption", note_words)
    model = small_model(norm_pix_loss=True)
    visualize.draw(model, clips(1), [0.95, 0.5], "time")  # one of four steps stays
    rows = ["original", "masked", "reconstruction"]
    assert words == ["75% masked, time", "50% masked, time", *rows, visualize.NOTE["patch"]]


def test_default_checkpoint_is_the_newest_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "DEMO_RUN", tmp_path)
    assert visualize.default_checkpoint() == "k400/vit_large"
    monkeypatch.setattr(file_io, "ADDRESS", "http://127.0.0.1:9/{size}_{data}.pth")
    file_io.fetch.cache_clear()  # of other tests' addresses
    problem = r"`make demo` has left no .* and cannot fetch http://127.*give --checkpoint"
    with pytest.raises(UserError, match=problem):
        visualize.load_model()
    for epoch in (2, 10):
        newest = saved(tmp_path / f"checkpoint-{epoch:05d}.pth", small_model())
    assert visualize.default_checkpoint() == newest
    assert visualize.load_model().pred_t_dim == SIZES["pred_t_dim"]


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
    encoder = small_model()
    path = saved(tmp_path / "encoder.pth", encoder)
    torch.save({"model": without(encoder, "decoder", "mask_token")}, path)
    problem = (
        r"encoder.pth has no decoder: .* pre-trained checkpoint, and to classify, a fine-tuned"
    )
    with pytest.raises(UserError, match=problem):
        run(video, "--checkpoint", path)
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
