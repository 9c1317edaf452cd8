"""Tests of probes: each against a plain formula, on real videos, and beside pre-training."""

import json
import math
import multiprocessing
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import simplejson
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main_pretrain
import main_probe
from models_mae import mae_vit_tiny_patch8
from tests.test_scripts import PRETRAIN, assert_same_weights, call, finish, spawn
from util import probes
from util.args import clip_options
from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex
from util.lr_sched import learning_rate
from util.meters import RunLog
from util.probes import Split
from util.synthetic import write_dataset
from util.video.transforms import channels_first

CPU = torch.device("cpu")


def clusters(videos, seed, noise=2.0, views=2, D=16, C=4):
    """Return features around a centre of each class, with labels in turn."""
    centres = torch.randn(C, D, generator=torch.Generator().manual_seed(99))
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(videos) % C
    noise = noise * torch.randn(videos, views, D, generator=generator)
    return Split(1 + centres[labels].unsqueeze(1) + noise, labels)


def three(**options):
    return {
        name: clusters(videos, seed, **options)
        for seed, (name, videos) in enumerate({"train": 60, "val": 40, "test": 50}.items())
    }


# --- each probe -------------------------------------------------------------------------------


def test_neighbours_vote_by_the_formula():
    splits = three()
    bank, labels = splits["train"].features.double(), splits["train"].labels

    def direction(x):
        x = (x / x.norm(dim=-1, keepdim=True)).mean(dim=0)
        return x / x.norm()

    result = probes.knn(splits)
    assert list(result.values) == [1, 5, 10, 20]
    for i, k in enumerate(result.values):
        for name, split in splits.items():
            right = 0
            for video, (x, label) in enumerate(
                zip(split.features.double(), split.labels, strict=True)
            ):
                votes = []
                for other in range(60):
                    if name != "train" or other != video:
                        cosine = direction(x) @ direction(bank[other])
                        votes.append((cosine.item(), int(labels[other])))
                score = [0.0] * 4
                for cosine, vote in sorted(votes)[-int(k) :]:
                    score[vote] += math.exp(cosine / 0.07)
                right += int(np.argmax(score)) == label
            assert result.right[name][i] == right, (k, name)


def test_no_more_neighbours_than_videos():
    splits = {name: clusters(videos, 0) for name, videos in (("train", 7), ("val", 4))}
    assert list(probes.knn(splits).values) == [1, 5]


def test_linear_probe_is_a_plain_loop():
    splits, rate, updates = three(), 0.0006, 500
    x = {name: split.features.mean(dim=1) for name, split in splits.items()}
    mean, var = x["train"].mean(dim=0), x["train"].var(dim=0, correction=0)
    layer = nn.Linear(16, 4)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    for update in range(updates):  # a batch is all of train
        optimizer.param_groups[0]["lr"] = learning_rate(update / updates, rate, 0.0, 0.05, 1)
        logits = layer((x["train"] - mean) / (var + 1e-6).sqrt())
        optimizer.zero_grad()
        F.cross_entropy(logits, splits["train"].labels).backward()
        optimizer.step()
    right = {
        name: int((layer((v - mean) / (var + 1e-6).sqrt()).argmax(1) == splits[name].labels).sum())
        for name, v in x.items()
    }
    result = probes.linear(splits, rates=[1e-6, rate])
    assert {name: counts[1] for name, counts in result.right.items()} == right
    assert result.right["train"][0] != right["train"]
    assert right["test"] > 25  # of 50, in 4 classes


def test_batches_cover_all_videos_and_depend_on_the_seed():
    seen = []

    def read(name, numbers):
        seen.append((name, numbers.tolist()))
        return torch.zeros(len(numbers), 2)

    orders = []
    for seed in (0, 0, 1):
        seen.clear()
        heads, weights = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 4))), torch.ones(1)
        optimizer = torch.optim.SGD(heads.parameters())
        options = {"batch_size": 15, "least": 8, "seed": seed}
        probes.sweep(three(), heads, optimizer, weights, read, **options)
        batches = [numbers for name, numbers in seen if name == "train"]
        orders.append(batches)
        assert len(batches) == 80 + 4  # 20 epochs of 4 batches, and one pass to count
        assert sorted(number for batch in batches[:4] for number in batch) == list(range(60))
    assert orders[0] == orders[1] != orders[2]


def test_attention_with_keys_merged_is_multi_head_attention():
    torch.manual_seed(0)
    D, H, tokens = 128, 2, 3 * torch.randn(5, 7, 128)
    probe, attn = probes.AttentiveProbe(D, 3), nn.MultiheadAttention(D, H, batch_first=True)
    query = 10 * torch.randn(D)
    w_q, w_k, w_v = attn.in_proj_weight.view(3, H, D // H, D)
    with torch.no_grad():
        keyed = torch.einsum("hid,hie,e->dh", w_k, w_q, query)
        probe.queries.copy_(keyed * (D // H) ** -0.5)
        probe.values.copy_(w_v.mT)
        probe.proj.load_state_dict(attn.out_proj.state_dict())
        attended = attn(query.expand(5, 1, D), tokens, tokens)[0].squeeze(1)
        expected = probe.head(attended + probe.mlp(attended))
        torch.testing.assert_close(probe(tokens), expected)


def one_token(videos, seed, path=None, L=16, D=16):
    """Return tokens of which one, at any place, is marked and tells one of two classes.

    Another one has the opposite number, so that the mean says nothing.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((videos, 1, L, D)).astype(np.float16)
    labels = np.arange(videos) % 2
    for video, label in enumerate(labels):
        marked, other = rng.permutation(L)[:2]
        tokens[video, 0, :, :2] = 0
        tokens[video, 0, marked] = 0
        tokens[video, 0, marked, :2] = 4, 8 * label - 4
        tokens[video, 0, other, 1] = 4 - 8 * label
    if path:
        np.save(path, tokens)
        tokens = np.load(path, mmap_mode="r")
    features = torch.from_numpy(tokens.astype(np.float32)).mean(dim=2)
    return Split(features, torch.from_numpy(labels), tokens)


def test_attentive_probe_finds_what_the_mean_hides(tmp_path):
    sizes = {"train": 256, "val": 64, "test": 100}
    splits = {
        name: one_token(videos, seed, tmp_path / f"{name}.npy")
        for seed, (name, videos) in enumerate(sizes.items())
    }
    splits = probes.prepare(splits, CPU)
    mean = probes.linear(splits, rates=[0.01, 0.1])
    assert probes.is_chance(mean.right["test"][mean.best], splits["test"].labels)
    found = probes.attentive(splits, rates=[1e-5, 3e-3])
    assert found.best == 1
    assert found.right["test"][1] >= 95
    again = probes.attentive(splits, rates=[1e-5, 3e-3])
    assert found == again


# --- splits and guessing ------------------------------------------------------------------------


def test_without_val_a_share_of_every_class_is_held_out(capsys, tmp_path):
    whole = one_token(40, 0)
    whole.labels[7] = 2  # the only video of its class stays in train
    parts = probes.prepare(
        {"train": whole, "val": Split(whole.features[:0], whole.labels[:0])}, CPU
    )
    assert "without a val, 8 of 40 videos of train (20 % of every class)" in capsys.readouterr().out
    assert parts["val"].labels.bincount().tolist() == [4, 4]
    assert parts["train"].labels.bincount().tolist() == [16, 15, 1]
    rows = [row for part in parts.values() if part.rows is not None for row in part.rows.tolist()]
    assert sorted(rows) == list(range(40))
    for part in parts.values():
        numbers = torch.arange(len(part.labels)).flip(0)
        torch.testing.assert_close(part.read_tokens(numbers).mean(dim=1, keepdim=True),
                                   part.features[numbers])  # fmt: skip


def test_labels_may_be_any_numbers():
    splits = three()
    expected = probes.knn(splits), probes.linear(splits, rates=[0.01])
    for split in splits.values():
        split.labels = torch.tensor([3, 70, 71, 10**15])[split.labels]
    splits = probes.prepare(splits, CPU)
    assert (probes.knn(splits), probes.linear(splits, rates=[0.01])) == expected


@pytest.mark.parametrize("n, p", [(80, 0.25), (50, 0.5), (8, 0.125)])
def test_chance_is_a_binomial_bound(n, p):
    labels = torch.arange(n) % round(1 / p)

    def tail(right):
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(right, n + 1))

    for right in range(n + 1):
        assert probes.is_chance(right, labels) == (tail(right) > 0.01)
        assert probes.is_chance(right, labels, tries=13) == (13 * tail(right) > 0.01)
    assert probes.guessing(torch.tensor([0, 1, 1, 1])) == 0.75


def broken(fault):
    splits = three()
    if fault == "no labels":
        splits["train"].labels[:] = -1
    if fault == "some labels":
        splits["test"].labels[3] = -1
    if fault == "not a number":
        splits["val"].features[3, 0, 1] = torch.nan
    if fault == "one class":
        splits["train"].labels[:] = 1
    if fault == "nothing to hold out":
        splits = {"train": clusters(4, 0)}
    return splits


@pytest.mark.parametrize(
    "fault, problem",
    [
        ("no labels", "60 of 60 videos of train have no label"),
        ("some labels", "1 of 50 videos of test have no label"),
        ("not a number", r"features of 1 of \d+ videos of val are not finite"),
        ("one class", "train has less than two classes"),
        ("nothing to hold out", "no class of train has two videos"),
    ],
)
def test_bad_splits_are_refused(fault, problem):
    with pytest.raises(UserError, match=problem):
        probes.prepare(broken(fault), CPU)


def test_unlabelled_test_and_unknown_classes_are_said(capsys):
    splits = three()
    splits["test"].labels[:] = -1
    kept = splits["train"].labels != 3
    splits["train"] = Split(splits["train"].features[kept], splits["train"].labels[kept])
    splits = probes.prepare(splits, CPU)
    out = capsys.readouterr().out
    assert "test is not used: it has no labels" in out
    assert "train lacks the classes of 10 videos of val, which count as wrong" in out
    assert splits.keys() == {"train", "val"}
    assert max(probes.knn(splits).right["val"]) <= 30
    assert max(probes.linear(splits, rates=[0.1]).right["val"]) <= 30


# --- on real videos -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movements(tmp_path_factory):
    """Write videos of four movements and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("probe")
    sizes = {"num_videos": 128, "num_labelled": 128, "num_val": 40, "num_test": 64}
    write_dataset(folder / "set", num_classes=4, size=32, num_frames=16, num_workers=2, **sizes)
    torch.manual_seed(0)
    model = mae_vit_tiny_patch8(img_size=32, num_frames=8, pred_t_dim=8, decoder_depth=1)
    state = {"model": model.state_dict(), "arguments": model.arguments}
    torch.save({**state, "args": {"sampling_rate": 2}}, folder / "mae.pth")
    return folder


def extracting(folder, out):
    return ["--finetune", folder / "mae.pth", "--path_to_data_dir", folder / "set/finetune",
            "--output_dir", out, "--num_workers", 0, "--device", "cpu"]  # fmt: skip


def table(text):
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("top-1"))
    return lines[start:]


def read_probes(folder):
    return json.loads((folder / "probe.json").read_text())


@pytest.fixture(scope="module")
def probed(movements):
    out = movements / "probed"
    call(main_probe, *extracting(movements, out), "--probes", "linear", "knn", "--half", "--tokens")
    return out


def test_movements_are_told_apart_by_random_weights(probed):
    result = read_probes(probed)
    knn, linear = result["probes"]
    assert [knn["probe"], linear["probe"]] == ["knn", "linear"]
    assert not linear["is_chance"]
    assert linear["top1"]["test"][linear["best"]] > 45
    assert linear["best"] == np.argmax(linear["top1"]["val"])
    assert result["chance"] == {"train": 25.0, "val": 25.0, "test": 25.0}
    assert result["videos"] == {"train": 128, "val": 40, "test": 64}


def test_shuffled_labels_are_at_chance_and_the_table_says_so(probed, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("train", "val", "test"):
        arrays = dict(np.load(probed / f"{name}.npz"))
        arrays["labels"] = rng.permutation(arrays["labels"])
        np.savez(tmp_path / f"{name}.npz", **arrays)
    call(main_probe, "--features", tmp_path, "--output_dir", tmp_path / "out", "--device", "cpu")
    found = read_probes(tmp_path / "out")["probes"]
    assert [one["is_chance"] for one in found] == [True, True]
    words = [line for line in table(capsys.readouterr().out) if "guessing" in line]
    assert [word.split()[0] for word in words] == ["knn", "linear"]
    assert all(word.endswith("25.0 %, no better than guessing") for word in words)


def test_a_test_that_repeats_val_is_none(probed, tmp_path, capsys):
    """As prepare_kinetics writes it: judged as a test, it would be too good."""
    for name, source in (("train", "train"), ("val", "val"), ("test", "val")):
        shutil.copy(probed / f"{source}.npz", tmp_path / f"{name}.npz")
    call(main_probe, "--features", tmp_path, "--output_dir", tmp_path / "out", "--device", "cpu")
    assert "test repeats val, which chooses the settings: it is no test" in capsys.readouterr().out
    assert read_probes(tmp_path / "out")["videos"].keys() == {"train", "val"}


def test_features_are_extracted_once_and_read_from_a_folder(movements, probed, tmp_path, capsys):
    chosen = ["--probes", "knn"]
    call(main_probe, *extracting(movements, probed), *chosen, "--half", "--tokens")
    again = capsys.readouterr().out
    assert again.count("is complete") == 3
    call(main_probe, "--features", probed, "--output_dir", tmp_path, "--device", "cpu", *chosen)
    assert table(capsys.readouterr().out) == table(again)
    assert read_probes(tmp_path)["probes"] == read_probes(probed)["probes"]


@pytest.mark.slow
def test_two_ranks_and_all_probes(movements, tmp_path):
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        finish(spawn("main_probe.py", *extracting(movements, out), ranks=ranks))
        found.append(read_probes(out)["probes"])
    assert found[0] == found[1]
    attentive = found[0][2]
    assert attentive["probe"] == "attentive"
    assert attentive["top1"]["test"][attentive["best"]] > 60


def test_mistakes_of_flags_and_folders_are_named(movements, probed, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("train", "val"):
        arrays = dict(np.load(probed / f"{name}.npz"))
        told = json.loads(str(arrays["arguments"]))
        arrays["arguments"] = json.dumps(told | {"weights": len(name)})
        np.savez(tmp_path / "other" / f"{name}.npz", **arrays)
    (tmp_path / "foreign").mkdir()
    np.savez(tmp_path / "foreign/train.npz", features=np.zeros((2, 3)))
    out = ["--output_dir", tmp_path / "out", "--device", "cpu"]
    for argv, problem in (
        ([], "needs either --finetune CHECKPOINT or --features FOLDER"),
        (["--features", probed, "--finetune", "x.pth"], "needs either --finetune"),
        (["--features", probed, "--path_to_data_dir", "x"], "not both"),
        (["--features", tmp_path / "empty"], "empty has no train.npz"),
        (["--features", tmp_path / "other"], "val.npz differs from the other splits in weights"),
        (["--features", tmp_path / "foreign"], "train.npz is damaged or not a file of main_feat"),
        (["--features", tmp_path / "other", "--probes", "attentive"], "differs"),
    ):
        with pytest.raises(SystemExit, match="2"):
            call(main_probe, *argv, *out)
        assert problem in capsys.readouterr().err
    for name in ("train", "val", "test"):  # beside tokens of an earlier run
        arrays = dict(np.load(probed / f"{name}.npz"))
        arrays["arguments"] = json.dumps(json.loads(str(arrays["arguments"])) | {"tokens": False})
        np.savez(tmp_path / "empty" / f"{name}.npz", **arrays)
        shutil.copy(probed / f"{name}.tokens.npy", tmp_path / "empty")
    with pytest.raises(SystemExit, match="2"):
        call(main_probe, "--features", tmp_path / "empty", "--probes", "attentive", *out)
    assert "lacks tokens" in capsys.readouterr().err


# --- beside pre-training ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe_csv(videos, tmp_path_factory):
    """List the six videos, of three classes, and one that is unreadable."""
    path = tmp_path_factory.mktemp("probe_csv") / "probe.csv"
    rows = [f"{videos}/v{i}.mp4 {i % 3}\n" for i in range(6)]
    path.write_text("".join([*rows, "missing.mp4 1\n"]))
    return path


def test_curve_of_nearest_neighbours(videos, probe_csv, tmp_path, capsys):
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", tmp_path, "--epochs", 3,
         "--vis_period", 2, "--probe_csv", probe_csv, *PRETRAIN)  # fmt: skip
    out = capsys.readouterr().out
    assert len(re.findall(r"kNN on --probe_csv: .* %, chance: 33.3 %.* \(.* s\)", out)) == 2
    assert out.count("missing.mp4: ") == 1
    log = [simplejson.loads(line) for line in (tmp_path / "log.txt").open()]
    assert ["probe_knn_acc1" in line for line in log] == [False, True, True]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in curves.Scalars("probe/knn_acc1")]
    logged = [line["probe_knn_acc1"] for line in log[1:]]
    assert points == [(3999, pytest.approx(logged[0])), (5999, pytest.approx(logged[1]))]


def test_curve_is_leave_one_out_and_leaves_training_alone(videos, probe_csv):
    flags = ["--path_to_data_dir", videos, "--probe_csv", probe_csv, "--epochs", 1, *PRETRAIN]
    args = main_pretrain.parse_args([str(flag) for flag in flags])
    args.precision = "fp32"
    model = main_pretrain.build_model(args).train()
    curve = probes.ProbeCurve(args, CPU)
    before = torch.get_rng_state()
    log = RunLog("", 1, CPU)
    found = curve.measure(model, 0, log, stop=lambda: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert curve.measure(model, 0, log, stop=lambda: True) == {}
    args.num_workers = 2
    curve = probes.ProbeCurve(args, CPU)
    assert curve.measure(model, 0, log, stop=lambda: False) == found
    assert not multiprocessing.active_children()  # none until the next measurement

    dataset = Kinetics(VideoIndex(str(probe_csv)), "test", **clip_options(args))
    with torch.no_grad():
        clips = torch.stack([channels_first(dataset[0, row].clips)[0] for row in range(6)])
        x = F.normalize(model.encode_features(clips)[0], dim=1)
    votes = (x @ x.T / 0.07).exp().fill_diagonal_(0) @ F.one_hot(torch.arange(6) % 3).float()
    right = int((votes.argmax(dim=1) == torch.arange(6) % 3).sum())
    assert found == {"probe_knn_acc1": 100 * right / 6}


@pytest.mark.slow
def test_curve_changes_no_bit_of_training(videos, probe_csv, tmp_path):
    last, common = "checkpoint-00002.pth", ["--path_to_data_dir", videos, "--epochs", 3, *PRETRAIN]
    common += ["--num_workers", 1, "--vis_period", 1]
    plain, curve, resumed = (tmp_path / name for name in ("plain", "curve", "resumed"))
    probe = ["--probe_csv", probe_csv]
    finish(spawn("main_pretrain.py", "--output_dir", plain, *common))
    finish(spawn("main_pretrain.py", "--output_dir", curve, *common, *probe))
    assert_same_weights(plain / last, curve / last)
    # a run without the flag goes on with it, from its first epoch
    resumed.mkdir()
    shutil.copy(curve / "checkpoint-00000.pth", resumed)
    out = finish(spawn("main_pretrain.py", "--output_dir", resumed, *common, *probe))
    assert "some flags differ" not in out
    assert_same_weights(plain / last, resumed / last)
    assert (resumed / "log.txt").read_text() == (curve / "log.txt").read_text()


@pytest.mark.slow
def test_curve_of_two_ranks_is_that_of_one(videos, probe_csv, tmp_path):
    start = tmp_path / "one"
    common = ["--path_to_data_dir", videos, "--probe_csv", probe_csv, "--lr", 0, "--min_lr", 0]
    common += ["--epochs", 1, *PRETRAIN]
    finish(spawn("main_pretrain.py", "--output_dir", start, *common))
    finish(spawn("main_pretrain.py", "--output_dir", tmp_path / "two", *common, ranks=2))
    one, two = (simplejson.loads((tmp_path / n / "log.txt").read_text()) for n in ("one", "two"))
    assert one["probe_knn_acc1"] == two["probe_knn_acc1"]


@pytest.mark.parametrize(
    "rows, problem",
    [
        (None, "probe.csv"),
        (["a.mp4", "b.mp4 1"], "every video needs a label"),
        (["a.mp4 1"], "needs two classes, and two videos of one"),
        (["a.mp4 1", "b.mp4 1"], "needs two classes, and two videos of one"),
        (["a.mp4 1", "b.mp4 2"], "needs two classes, and two videos of one"),
    ],
)
def test_bad_probe_csvs_are_refused_at_the_start(rows, problem, tmp_path):
    path = tmp_path / "probe.csv"
    if rows:
        path.write_text("\n".join(rows))
    flags = ["--path_to_data_dir", "x", "--probe_csv", str(path)]
    with pytest.raises(UserError, match=problem):
        probes.ProbeCurve(main_pretrain.parse_args([*flags, *map(str, PRETRAIN)]), CPU)
    with pytest.raises(UserError, match="--probe_csv needs a --vis_period above 0"):
        main_pretrain.parse_args([*flags, "--vis_period", "0"])


def test_videos_alone_in_their_class_are_said(tmp_path, capsys):
    path = tmp_path / "probe.csv"
    path.write_text("a.mp4 1\nb.mp4 1\nc.mp4 2\n")
    args = main_pretrain.parse_args(["--probe_csv", str(path), *map(str, PRETRAIN)])
    probes.ProbeCurve(args, CPU)
    assert "1 videos are alone in their class, so they count as wrong" in capsys.readouterr().out
    curve = probes.ProbeCurve(Namespace(probe_csv=""), CPU)
    assert curve.measure(None, 0, RunLog("", 1, CPU), stop=lambda: False) == {}
