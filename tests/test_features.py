"""Features: equal to the model's bit for bit, whatever the ranks, kills and files."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_features
import main_test
import models_mae
import models_vit
from demo import neighbours
from tests import formats
from tests.test_kills import family
from tests.test_scripts import call, finish, spawn
from tests.video_files import moving_frames, write_counter_video, write_video
from util import features
from util.errors import UserError
from util.features import load_clips
from util.kinetics import cut_views, dense_frames
from util.video.decode import Video
from util.video.sampling import uniform_crop_box
from util.video.transforms import channels_first
from util.weights import read_weights
from util.windows import cut_windows, window_frames

SIZES = {"img_size": 32, "num_frames": 4}
CPU = "--device cpu --num_workers 0 --print_freq 1".split()
BUILD = {
    "mae": lambda: models_mae.mae_vit_tiny_patch8(**SIZES, pred_t_dim=2),
    "mean": lambda: models_vit.vit_tiny_patch8(**SIZES, num_classes=5),
    "cls": lambda: models_vit.vit_tiny_patch8(**SIZES, num_classes=5, pool="cls"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Write a checkpoint of each kind; all but the first were trained with other sampling."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    flags = (
        {"sampling_rate": 4},
        {"sampling_rate": 2, "sampling": "dense"},
        {"sampling": "segments"},
    )
    paths = {}
    for (kind, build), args in zip(BUILD.items(), flags, strict=True):
        model = build()
        paths[kind] = folder / f"{kind}.pth"
        torch.save(
            {"model": model.state_dict(), "arguments": model.arguments, "args": args}, paths[kind]
        )
    return paths


@pytest.fixture(scope="module")
def many(videos, tmp_path_factory) -> Path:
    """Write a list of 40 rows, five parts with --tokens: the same six videos again and again."""
    folder = tmp_path_factory.mktemp("many")
    rows = "".join(f"{videos}/v{i % 6}.mp4 {i % 3}\n" for i in range(40))
    (folder / "val.csv").write_text(rows)
    return folder


def run(checkpoint: Path, out: Path, *argv: object) -> dict[str, dict]:
    """Run main_features in this process and return the files that it leaves, by split."""
    call(main_features, "--finetune", checkpoint, "--output_dir", out, *CPU, *argv)
    return {path.stem: read(path) for path in out.glob("*.npz")}


def read(path: Path) -> dict:
    with np.load(path) as file:  # without pickle
        arrays = dict(file)
    arrays["arguments"] = json.loads(str(arrays["arguments"]))
    return arrays


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left.keys() - {"arguments"}:
        assert np.array_equal(left[name], right[name]), name


def load(checkpoint: Path) -> torch.nn.Module:
    return main_features.load_model(read_weights(str(checkpoint)))


# --- what a feature is


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize("kind", BUILD)
def test_features_and_tokens_are_the_models_bit_for_bit(kind, layer, videos, checkpoints, tmp_path):
    flags = ["--path_to_data_dir", videos, "--splits", "val", "--num_clips", 2, "--num_crops", 3]
    flags += ["--tokens", *(["--layer", layer] if layer else [])]
    found = run(checkpoints[kind], tmp_path, *flags)["val"]
    tokens = np.load(tmp_path / "val.tokens.npy", mmap_mode="r")
    model = load(checkpoints[kind])
    for i in range(6):
        clips = load_clips(videos / f"v{i}.mp4", model, 2, 3)
        expected, expected_tokens = model.encode_features(clips, layer)
        assert np.array_equal(found["features"][i], expected)
        assert np.array_equal(tokens[i], expected_tokens)
    assert found["features"].dtype == tokens.dtype == np.float32
    assert found["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found["rows"].tolist() == list(range(6))
    assert found["paths"].tolist() == [f"{videos}/v{i}.mp4" for i in range(6)]
    assert found["unreadable"].tolist() == found["classes"].tolist() == []
    assert found["arguments"]["layer"] == layer and found["arguments"]["num_crops"] == 3
    assert found["arguments"]["checkpoint"] == str(checkpoints[kind])
    assert not (tmp_path / "parts").exists()


@torch.no_grad()
@pytest.mark.parametrize("kind", BUILD)
def test_definitions(kind):
    model, clips = BUILD[kind]().eval(), torch.randn(2, 3, 4, 32, 32)
    found, tokens = model.encode_features(clips)
    assert torch.equal(tokens, model.forward_features(clips))
    if kind == "mae":
        assert torch.equal(found, tokens.mean(dim=1))
    else:
        assert torch.equal(model.head(found), model(clips))
    outputs = []
    model.blocks[1].register_forward_hook(lambda *x: outputs.append(x[-1]))
    found, tokens = model.encode_features(clips, layer=2)
    assert torch.equal(tokens, outputs[0][:, 1:])
    assert torch.equal(found, outputs[0][:, 0] if kind == "cls" else tokens.mean(dim=1))
    for layer in (0, 5):
        with pytest.raises(ValueError, match=f"layer = {layer} is not one of the blocks 1 to 4"):
            model.encode_features(clips, layer)


@pytest.mark.parametrize("kind", ["mean", "cls"])
def test_load_clips_gives_the_views_that_main_test_scores(
    kind, videos, checkpoints, tmp_path, monkeypatch
):
    seen, load_model = [], main_test.load_model

    def watched(args, weights):
        model = load_model(args, weights)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return model

    monkeypatch.setattr(main_test, "load_model", watched)
    call(main_test, "--videos", videos / "v0.mp4", "--finetune", checkpoints[kind], *CPU,
         "--output_dir", tmp_path, "--num_clips", 5, "--num_crops", 1)  # fmt: skip
    model = load(checkpoints[kind])
    clips = load_clips(videos / "v0.mp4", model, num_clips=5)
    assert clips.dtype == torch.float32 and clips.shape == (5, 3, 4, 32, 32)
    assert torch.equal(clips, features.normalize(seen[0].contiguous()))
    assert model.sampling == ("segments" if kind == "cls" else "dense")
    hub = torch.hub.load(
        str(Path(__file__).parent.parent), "load_clips", videos / "v0.mp4", model, 5, source="local"
    )
    assert torch.equal(hub, clips)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing.mp4", {}, "missing.mp4 is no file"),
        ("", {}, "is a folder"),
        ("text.mp4", {}, "text.mp4: cannot be opened as a video"),
        ("text.mp4", {"num_clips": 0}, "text.mp4: num_clips = 0, num_crops = 1 give no view"),
    ],
)
def test_load_clips_names_the_file_at_fault(tmp_path, name, options, message):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=re.escape(message)):
        load_clips(tmp_path / name, BUILD["mae"](), **options)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (formats.pyslowfast(), "MaskedAutoencoderViT"),
        (formats.pyslowfast(decoder=False), "VisionTransformer"),
        (formats.videomae("pretrain"), "MaskedAutoencoderViT"),
        (formats.reference(decoder=False), "VisionTransformer"),
    ],
    ids=["PySlowFast", "PySlowFast's classifier", "VideoMAE", "the reference's classifier"],
)
def test_checkpoints_of_other_projects(videos, tmp_path, content, kind):
    torch.save(content, tmp_path / "file.pth")
    model = load(tmp_path / "file.pth")
    assert type(model).__name__ == kind and model.sampling_rate == 4
    found = run(tmp_path / "file.pth", tmp_path / "out", "--videos", videos / "v0.mp4")["videos"]
    with torch.no_grad():
        expected = model.encode_features(load_clips(videos / "v0.mp4", model))[0]
    assert np.array_equal(found["features"][0], expected)
    assert found["labels"].tolist() == [-1]


@torch.no_grad()
def test_an_encoder_without_a_decoder(videos, tmp_path):
    model = models_mae.mae_vit_tiny_patch8(img_size=32, num_frames=12, pred_t_dim=6)
    content = {"model": model.state_dict(), "arguments": model.arguments}
    torch.save(content, tmp_path / "whole.pth")
    for name in [name for name in content["model"] if "decoder" in name or name == "mask_token"]:
        del content["model"][name]
    torch.save(content, tmp_path / "encoder.pth")
    whole, bare = (load(tmp_path / f"{name}.pth") for name in ("whole", "encoder"))
    clips = load_clips(videos / "v0.mp4", whole)
    assert torch.equal(whole.encode_features(clips)[0], bare.encode_features(clips)[0])
    first = run(tmp_path / "encoder.pth", tmp_path / "out", "--path_to_data_dir", videos)
    assert first.keys() == {"train", "val", "test"}
    run(tmp_path / "encoder.pth", tmp_path / "out", "--path_to_data_dir", videos)  # recognised


# --- ranks, kills, folders


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(many, checkpoints, tmp_path):
    (many / "classes.txt").write_text("a\nb\nc\n")
    flags = ["--path_to_data_dir", many, "--finetune", checkpoints["mae"], *CPU, "--tokens"]
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        finish(spawn("main_features.py", *flags, "--output_dir", out, ranks=ranks))
    (many / "classes.txt").unlink()
    one, two = (read(tmp_path / str(ranks) / "val.npz") for ranks in (1, 2))
    assert_equal(one, two)
    assert one["arguments"] == two["arguments"]
    assert one["classes"].tolist() == ["a", "b", "c"]
    left, right = (np.load(tmp_path / str(ranks) / "val.tokens.npy") for ranks in (1, 2))
    assert left.shape == (40, 1, 32, 128) and np.array_equal(left, right)


@pytest.mark.parametrize(
    ("ranks", "then"),
    [
        (1, 0),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on(many, checkpoints, tmp_path, capsys, ranks, then):
    """`then` is the number of ranks that go on, 0: in this process."""
    flags = ["--path_to_data_dir", many, "--num_clips", 8, "--tokens"]
    part = ["--finetune", checkpoints["mae"], "--output_dir", tmp_path, *CPU, *flags]
    process = spawn("main_features.py", *part, ranks=ranks, start_new_session=True)
    parts = tmp_path / "parts"
    while len(list(parts.glob("*.npz"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    for pid in family(process.pid):  # torchrun's ranks, too
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    done = list(parts.glob("*.npz"))
    assert 2 <= len(done) < 5 and not (tmp_path / "val.npz").exists()

    if then:
        out = finish(spawn("main_features.py", *part, ranks=then))
    else:
        call(main_features, *part)
        out = capsys.readouterr().out
    assert f"val: going on with {5 - len(done)} of 5 parts" in out
    if then < 2:  # nothing that is in a part is computed again
        left = 40 - 8 * len(done)
        assert f"[{left}/{left}]" in out
    whole = run(checkpoints["mae"], tmp_path / "whole", *flags)["val"]
    found = read(tmp_path / "val.npz")
    # the last bit differs between processes, see tests.test_scripts.spawn
    np.testing.assert_allclose(found.pop("features"), whole.pop("features"), rtol=0, atol=1e-5)
    assert_equal(found, whole)
    assert not parts.exists()


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        pytest.param("remove", 1, id="first part"),
        pytest.param("remove", 4, id="last part", marks=pytest.mark.slow),
        pytest.param("replace", 10, id="tokens"),
        pytest.param("replace", 11, id="file", marks=pytest.mark.slow),
        pytest.param("remove", 5, id="after the file", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_it_merges_tokens(many, checkpoints, tmp_path, monkeypatch, name, calls):
    """It ends after so many calls that remove a file, or that give one its name."""
    flags = ["--path_to_data_dir", many, "--tokens", "--half"]
    expected = run(checkpoints["mae"], tmp_path / "whole", *flags)["val"]
    function, left = getattr(os, name), iter(range(calls))

    def interrupted(*paths):
        next(left)
        function(*paths)

    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(StopIteration):
        run(checkpoints["mae"], tmp_path / "part", *flags)
    monkeypatch.undo()
    found = run(checkpoints["mae"], tmp_path / "part", *flags)["val"]
    assert_equal(found, expected)
    tokens, whole = (np.load(tmp_path / out / "val.tokens.npy") for out in ("part", "whole"))
    assert tokens.dtype == np.float16 and np.array_equal(tokens, whole)
    assert sorted(x.name for x in (tmp_path / "part").iterdir() if x.is_file()) == [
        ".lock_features", "val.npz", "val.tokens.npy"
    ]  # fmt: skip


def test_a_finished_split_is_left_as_it_is(videos, checkpoints, tmp_path, capsys):
    flags = ["--path_to_data_dir", videos, "--splits", "val"]
    run(checkpoints["mae"], tmp_path, *flags)
    before = (tmp_path / "val.npz").stat().st_mtime_ns
    shutil.copy(checkpoints["mae"], tmp_path / "moved.pth")
    run(tmp_path / "moved.pth", tmp_path, *flags)
    assert f"{tmp_path}/val.npz is complete\n" in capsys.readouterr().out
    assert (tmp_path / "val.npz").stat().st_mtime_ns == before


def test_other_videos_of_the_same_names_are_refused(videos, checkpoints, tmp_path, capsys):
    for folder, number in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "val.csv").write_text("v.mp4 0\n")
        shutil.copy(videos / f"v{number}.mp4", tmp_path / folder / "v.mp4")
    run(checkpoints["mae"], tmp_path / "out", "--path_to_data_dir", tmp_path / "a")
    with pytest.raises(SystemExit):
        run(checkpoints["mae"], tmp_path / "out", "--path_to_data_dir", tmp_path / "b")
    assert "val.npz was made of other videos or labels: give" in capsys.readouterr().err


def test_a_damaged_part_is_named(many, checkpoints, tmp_path, capsys, monkeypatch):
    flags = ["--path_to_data_dir", many, "--tokens"]
    monkeypatch.setattr(features.FeatureFile, "merge", lambda *_: "")
    run(checkpoints["mae"], tmp_path, *flags)
    monkeypatch.undo()
    part = tmp_path / "parts/val-00003.npz"
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(SystemExit):
        run(checkpoints["mae"], tmp_path, *flags)
    assert re.search(rf"{part} is damaged .*: delete it and extract", capsys.readouterr().err)
    part.unlink()
    assert len(run(checkpoints["mae"], tmp_path, *flags)["val"]["features"]) == 40


# --- bad input


def test_unreadable_videos_are_listed(videos, checkpoints, tmp_path, capsys):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    rows = [videos / "v0.mp4", bad, videos / "v1.mp4", tmp_path / "gone.mp4"]
    (tmp_path / "val.csv").write_text("".join(f"{path}\n" for path in rows))
    flags = ["--path_to_data_dir", tmp_path, "--tokens"]
    found = run(checkpoints["mae"], tmp_path / "out", *flags)["val"]
    assert found["rows"].tolist() == [0, 2] and len(found["features"]) == 2
    assert np.load(tmp_path / "out/val.tokens.npy").shape[0] == 2
    first, second = found["unreadable"].tolist()
    assert first.startswith(f"{bad}: cannot be opened") and second.endswith(
        "gone.mp4: no such file"
    )
    out = capsys.readouterr().out
    assert f"features of 2 videos; 2 unreadable videos:\n  {first}\n  {second}\n" in out

    (tmp_path / "val.csv").write_text(f"{bad}\n{bad}\n")
    for stride in ([], ["--window_stride", 1]):
        with pytest.raises(SystemExit) as end:
            run(checkpoints["mae"], tmp_path / f"none{len(stride)}", *flags[:2], *stride)
        assert end.value.code == 1
        assert re.search(r"none of the [12] videos of .* cannot be op", capsys.readouterr().err)
    assert not list((tmp_path / "none0").glob("**/*.npz"))  # the next run tries again


def bad_cases() -> list:
    other = "give another --output_dir"
    return [
        pytest.param([], "needs --finetune CHECKPOINT", id="no checkpoint"),
        pytest.param(["mae", "--layer", 5], "mae.pth has 4 blocks", id="layer"),
        pytest.param(["mae", "--layer", 2], rf"layer = None, not 2: {other}", id="other layer"),
        pytest.param(["mean", "--sampling_rate", 4], f"weights = .*{other}", id="other weights"),
        pytest.param(["mae", "--splits", "test"], "test.csv lists no videos", id="empty csv"),
        pytest.param(["mae", "--splits", "train"], "cannot open .*train.csv", id="no csv"),
        pytest.param(["mae", "--half"], "--half is for --tokens", id="half"),
        pytest.param(["mae", "--pool", "cls"], "mae.pth has no head: --pool is", id="pool"),
        pytest.param(["mae", "--output_dir", ""], "--output_dir must be a folder", id="no output"),
        pytest.param(["mae", "--videos", "x.mp4"], "give --videos or --path_to_data", id="both"),
        pytest.param(["mae", "--window_stride", 1, "--tokens"], "allows no --tokens", id="windows"),
        pytest.param(["cls", "--window_stride", 1], "give --sampling dense", id="segments"),
        pytest.param(["mae", "--model", "vit_base_patch16"], "does not fit the model", id="model"),
    ]


@pytest.mark.parametrize(("argv", "message"), bad_cases())
def test_bad_input_gets_one_sentence(argv, message, videos, checkpoints, tmp_path, capsys):
    shutil.copy(videos / "v0.mp4", tmp_path)
    (tmp_path / "val.csv").write_text("v0.mp4 0\n")
    (tmp_path / "test.csv").write_text("\n")
    flags = ["--path_to_data_dir", tmp_path, "--output_dir", tmp_path / "out", *CPU]
    call(main_features, *flags, "--splits", "val", "--finetune", checkpoints["mae"])
    before = read(tmp_path / "out/val.npz")
    if argv:
        argv = ["--splits", "val", "--finetune", checkpoints[argv[0]], *argv[1:]]
    with pytest.raises(SystemExit) as end:
        call(main_features, *flags, *argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert_equal(read(tmp_path / "out/val.npz"), before)


def test_no_csv_at_all(checkpoints, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(checkpoints["mae"], tmp_path / "out", "--path_to_data_dir", tmp_path)
    assert "holds no train.csv, val.csv or test.csv" in capsys.readouterr().err


@pytest.mark.parametrize(("scale", "flags", "what"), [
    (float("nan"), [], "its features are not finite numbers: the weights are damaged, or too large "
     "for --precision fp32\n"),
    (1e6, ["--tokens", "--half"], "its tokens are not finite .* --precision fp32 or --half"),
])  # fmt: skip
def test_values_that_are_not_finite(scale, flags, what, videos, checkpoints, tmp_path, capsys):
    content = torch.load(checkpoints["mae"])
    content["model"]["norm.weight"] *= scale
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "odd.pth", tmp_path / "out", "--path_to_data_dir", videos, *flags)
    assert end.value.code == 1
    assert re.search(rf"train\.csv|{videos}/v0.mp4: {what}", capsys.readouterr().err)
    assert not list((tmp_path / "out").glob("**/*.npz"))


def test_a_disk_without_room_for_tokens(videos, checkpoints, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = 2 * 6 * 2 * 32 * 128 * 4  # bytes: in one part, and merged
    for free, status in ((need - 1, 1), (need, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        flags = ["--path_to_data_dir", videos, "--splits", "val", "--tokens", "--num_clips", 2]
        if status:
            with pytest.raises(SystemExit) as end:
                run(checkpoints["mae"], tmp_path, *flags)
            assert end.value.code == status
            out, err = capsys.readouterr()
            assert "val: the tokens of 6 videos need 0.000393 GB" in out
            assert re.search(r"--tokens: .* has only 0.000393 GB free", err)
        else:
            run(checkpoints["mae"], tmp_path, *flags)
    assert (tmp_path / "val.tokens.npy").stat().st_size == need // 2 + 128


# --- windows


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    """Write 20 seconds at 12 frames per second; the numbers of frames can be read."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return Path(write_counter_video(path, 240, fps=12, bframes=2))


@torch.no_grad()
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_are_clips_that_start_there(
    workers, long_video, checkpoints, tmp_path, monkeypatch
):
    decoded, to_rgb = [], Video._to_rgb
    monkeypatch.setattr(Video, "_to_rgb", lambda *x: decoded.append(1) or to_rgb(*x))
    flags = ["--videos", long_video, "--window_stride", 0.3, "--batch_size", 1]
    run(checkpoints["mae"], tmp_path, *flags, "--num_workers", workers)
    found = read(tmp_path / "windows/videos/long.npz")
    length = 4 * 4 / 30  # seconds: num_frames x sampling_rate at 30 fps
    count = int((20 - length) / 0.3) + 1
    expected = 0.3 * np.arange(count)[:, None] + [0, length]
    np.testing.assert_allclose(found["times"], expected)
    if workers == 0:  # each frame once, although windows overlap
        assert len(decoded) == len(np.unique(window_frames(Video(str(long_video)), 4, 4, 0.3)[0]))

    model = load(checkpoints["mae"])
    video = Video(str(long_video))
    for number in (0, 1, 7, count - 1):
        frames = dense_frames(video, 4, 4, lambda *_, n=number: n * 0.3 * 12)
        clip = torch.empty((1, 4, 32, 32, 3), dtype=torch.uint8)
        cut_views(video, frames[None], lambda H, W: [uniform_crop_box(H, W, 32, 0, 1)], clip, 32)
        assert np.array_equal(
            found["features"][number], model.encode_features(channels_first(clip))[0][0]
        )


def test_windows_need_no_more_memory_for_longer_videos(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(200), bframes=2)
    video = Video(path)
    frames, times = window_frames(video, 4, 4, 1 / 30)
    assert len(frames) == 200 - 16 + 1 and times[-1].tolist() == pytest.approx([184 / 30, 200 / 30])
    clips, most = cut_windows(video, frames, 32), 0
    for _ in clips:
        most = max(most, len(clips.gi_frame.f_locals["held"]))
    assert most == 16  # the frames that a window spans


def test_windows_of_short_odd_and_equally_named_videos(
    videos, long_video, checkpoints, tmp_path, capsys
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    short = write_video(tmp_path / "short.mp4", moving_frames(5))  # shorter than a clip
    broken = tmp_path / "broken.mp4"
    shutil.copy(videos / "v0.mp4", tmp_path / "a/v.mp4")
    shutil.copy(long_video, tmp_path / "b/v.mp4")
    data = Path(write_video(broken, moving_frames(120), bframes=2)).read_bytes()
    quarter = len(data) // 4  # its first windows can be read
    broken.write_bytes(data[:quarter] + bytes(2 * quarter) + data[3 * quarter :])
    flags = ["--videos", short, tmp_path / "a/v.mp4", broken, tmp_path / "b/v.mp4",
             "--batch_size", 1, "--window_stride", 0.5]  # fmt: skip
    run(checkpoints["mae"], tmp_path / "out", *flags)
    out = capsys.readouterr().out
    assert re.search(rf"1 unreadable videos:\n  {broken}: ", out), out
    assert re.search(r"videos  \[\d\.\d/4 videos\]  eta 0:00:0\d  windows/s \d", out)
    found = {path: read(path) for path in (tmp_path / "out/windows/videos").iterdir()}
    by_name = {arrays["path"].item(): arrays for arrays in found.values()}
    assert by_name.keys() == {short, f"{tmp_path}/a/v.mp4", f"{tmp_path}/b/v.mp4"}
    assert by_name[short]["times"].tolist() == [[0, pytest.approx(5 / 30)]]
    assert len(by_name[short]["features"]) == 1
    lengths = [len(by_name[f"{tmp_path}/{folder}/v.mp4"]["times"]) for folder in "ab"]
    assert lengths == [3, 39]

    # the same command makes only what is missing; another one is refused
    path, gone = sorted(found)[:2]
    before = path.stat().st_mtime_ns
    gone.unlink()
    run(checkpoints["mae"], tmp_path / "out", *flags)
    assert "videos: windows of 2 videos; 2 are there" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    assert np.array_equal(read(gone)["features"], found[gone]["features"])
    with pytest.raises(SystemExit):
        run(checkpoints["mae"], tmp_path / "out", *flags[:-1], 1)
    assert "window_stride = 0.5, not 1.0: give another --output_dir" in capsys.readouterr().err
    shutil.copy(short, tmp_path / "a/short.mp4")
    with pytest.raises(SystemExit):
        run(checkpoints["mae"], tmp_path / "out", "--videos", tmp_path / "a/short.mp4", *flags[-2:])
    assert f"was made of {short} with label -1: give another" in capsys.readouterr().err


def test_windows_of_splits_and_changed_labels(videos, checkpoints, tmp_path, capsys):
    """Videos of two splits may have the same names; what was made with another label is refused."""
    for split, number in (("train", 0), ("val", 1)):
        (tmp_path / split).mkdir()
        shutil.copy(videos / f"v{number}.mp4", tmp_path / split / "v.mp4")
        (tmp_path / f"{split}.csv").write_text(f"{split}/v.mp4 {number}\n" * 2)
    flags = ["--path_to_data_dir", tmp_path, "--window_stride", 1]
    run(checkpoints["mae"], tmp_path / "out", *flags)
    assert "val: windows of 1 videos; 0 are there" in capsys.readouterr().out
    found = [read(tmp_path / f"out/windows/{split}/v.npz") for split in ("train", "val")]
    assert [int(x["label"]) for x in found] == [0, 1]
    assert [x["path"].item() for x in found] == [f"{tmp_path}/{x}/v.mp4" for x in ("train", "val")]
    (tmp_path / "val.csv").write_text("val/v.mp4 3\n")
    with pytest.raises(SystemExit):
        run(checkpoints["mae"], tmp_path / "out", *flags)
    assert "val/v.mp4 with label 1: give another --output_dir" in capsys.readouterr().err


# --- nearest neighbours


def test_neighbours(videos, tmp_path, capsys):
    """Row by row: the query, and beside it the video with the most similar features."""
    for name, order in (("queries", [0, 3]), ("gallery", [3, 1, 0])):
        vectors = np.eye(6, dtype=np.float32)[order] + 0.1
        paths = np.array([str(videos / f"v{i}.mp4") for i in order])
        labels, classes = np.array(order), np.array([f"number {i}" for i in range(6)])
        np.savez(tmp_path / f"{name}.npz", features=vectors[:, None], paths=paths, labels=labels,
                 classes=classes)  # fmt: skip
    drawn, draw_cell = [], neighbours.draw_cell
    neighbours.draw_cell = lambda *cell: drawn.append(cell[1:]) or draw_cell(*cell)
    output = tmp_path / "new/picture.gif"
    try:
        argv = [str(tmp_path / "queries.npz"), "--neighbours", "1", "--output", str(output)]
        neighbours.main(neighbours.parse_args([*argv, "--gallery", str(tmp_path / "gallery.npz")]))
        same = [(f"number {i}", colour) for i in (0, 3) for colour in ("black", neighbours.GREEN)]
        assert drawn == same
        drawn.clear()
        neighbours.main(neighbours.parse_args(argv))  # from the same file, without itself
        assert [name for name, _ in drawn] == [f"number {i}" for i in (0, 3, 3, 0)]
    finally:
        neighbours.draw_cell = draw_cell
    with Image.open(output) as picture:
        assert (picture.size, picture.n_frames) == ((2 * 92 + 16, 2 * 108), neighbours.FRAMES)
    np.savez(tmp_path / "other.npz", a=1)
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name, problem in (("other", "is damaged or not a file of main_features"),
                          ("array", "is damaged or"), ("gone", "No such file")):  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}\.npz:? {problem}"):
            neighbours.main(neighbours.parse_args([str(tmp_path / f"{name}.npz")]))
