"""What runs and dry runs print at the start: memory of a step, updates, rate, warnings."""

import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import main_finetune
import main_pretrain
from tests.test_scripts import FINETUNE, PRETRAIN, call, fails, finish, spawn
from util.dry_run import step_memory
from util.lr_sched import effective_lr

ROOT = Path(__file__).parent.parent
SIZES = "--input_size 64 --num_frames 8 --num_workers 0 --device cpu --batch_size 6 --repeat_aug 1"
TINY = {
    main_pretrain: f"{SIZES} --model mae_vit_tiny_patch8 --decoder_embed_dim 64 --decoder_depth 1"
    " --decoder_num_heads 4 --pred_t_dim 4",
    main_finetune: f"{SIZES} --model vit_tiny_patch8 --num_classes 3",
}
SMALL = {"synthetic_finetune": 32, "small_finetune": 137, "finetune_ucf101": 9537}  # videos
UNITS = {"MiB": 2**20, "GiB": 2**30}
WARNINGS = {
    "rate": "is far below that of the recipes (5e-4 or more): give --lr, or more",
    "updates": "updates are few: every recipe makes more than",
    "videos": "videos are few to pre-train on from fresh weights",
}
ALWAYS = {"updates", "videos"}  # what tests can afford is too little


def allocated_peak(*argv: object) -> int:
    """Run a script; return the most bytes that PyTorch's allocator on the CPU held at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call(*argv)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("module", "words"),
    [
        pytest.param(main_pretrain, "--mask_ratio 0.9", marks=pytest.mark.slow),
        (main_pretrain, "--mask_ratio 0.9 --mask_ratio_end 0.5 --epochs 5 --mask_type tube"),
        (main_pretrain, "--mask_ratio 0.5 --grad_checkpointing"),
        pytest.param(
            main_pretrain,
            "--mask_ratio 0.5 --repeat_aug 2 --precision bf16",
            marks=pytest.mark.slow,
        ),
        (main_pretrain, "--mask_ratio 0.5 --target hog --batch_size 1 --accum_iter 3"),
        (main_finetune, "--mask_ratio 0.5 --epochs 5 --precision bf16"),
        pytest.param(
            main_finetune,
            "--input_size 32 --batch_size 1 --lr 1e-3 --model_ema 0.9",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_estimated_memory_is_what_training_takes(videos, capsys, module, words):
    flags = [*TINY[module].split(), "--epochs", 2, *words.split(), "--output_dir", ""]
    argv = module, "--path_to_data_dir", videos, *flags
    call(*argv, "--dry_run")
    number, unit = re.search(r"step: ([\d.]+) (\w+) \(", capsys.readouterr().out).groups()
    assert float(number) * UNITS[unit] == pytest.approx(allocated_peak(*argv), rel=0.15)


@pytest.mark.parametrize(
    ("size", "clips", "measured"),
    [
        ("base", 64, 13.3),
        pytest.param("large", 16, 8.5, marks=pytest.mark.slow),
        pytest.param("huge", 64, 31.3, marks=pytest.mark.slow),
    ],
)
def test_estimated_memory_is_what_a_gpu_took(size, clips, measured):
    """Measured eagerly in bf16 on an H200 (benchmarks/RESULTS.md), in GiB."""
    words = f"--path_to_data_dir X --model mae_vit_{size}_patch16 --precision bf16 --repeat_aug 1"
    args = main_pretrain.parse_args([*words.split(), "--batch_size", str(clips)])
    with torch.device("meta"):
        model = main_pretrain.build_model(args)
    peak, _ = step_memory(model, args, torch.uint8, mask_ratio=0.9)
    assert peak / 2**30 == pytest.approx(measured, rel=0.03)


def test_gradients_of_several_ranks_stay_in_memory():
    """In DDP's buckets, or to be added up: the most is then held with all gradients and clips."""
    peaks = []
    for words in ("", "--ranks 2 --dry_run", "--accum_iter 2"):
        words += " --precision fp32"
        argv = [*TINY[main_finetune].split(), "--path_to_data_dir", "X", *words.split()]
        args = main_finetune.parse_args(argv)
        model = main_finetune.build_model(args)
        peak, parts = step_memory(model, args, torch.float32)
        peaks.append(peak)
    assert peaks[1] == peaks[2] > peaks[0]
    assert parts["weights"] == parts["gradients"] == parts["AdamW's moments"] / 2


def told(out: str) -> set[str]:
    """Return which warnings of WARNINGS are in a text."""
    return {name for name, words in WARNINGS.items() if words in out}


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.args")), ids=lambda path: path.stem)
def test_recipes_give_no_warning(path, capsys):
    """On their number of GPUs, with the data set that they are for."""
    ranks = re.search(r"# (\d+) GPUs x", path.read_text())
    module = main_pretrain if "pretrain" in path.stem else main_finetune
    args = module.parse_args([f"@{path}", "--path_to_data_dir", "X"])
    args.ranks, counted, num_videos = int(ranks[1]) if ranks else 1, "videos", 240_000
    if not ranks:
        num_videos = 2048 if module is main_pretrain else 512
    if path.stem in SMALL:
        num_videos = SMALL[path.stem]
    counted = "videos" if module is main_pretrain else "clips"
    assert effective_lr(args, counted, num_videos) >= 5e-4
    out = capsys.readouterr().out
    assert "WARNING" not in out and " updates in " in out


@pytest.mark.parametrize(
    ("module", "words", "warnings"),
    [
        (main_pretrain, "", {"rate", *ALWAYS}),
        (main_pretrain, "--lr 1e-4", ALWAYS),
        (main_pretrain, "--lr 1e-4 --epochs 333", ALWAYS),
        (main_pretrain, "--lr 1e-4 --epochs 334", {"videos"}),
        (main_finetune, "", {"rate", "updates"}),
        (main_finetune, "--lr 1e-3 --epochs 34", set()),
    ],
)
def test_a_run_far_below_the_recipes_is_warned(videos, capsys, module, words, warnings):
    """With six videos; without further flags in a dry run, as a user sees it."""
    flags = PRETRAIN if module is main_pretrain else FINETUNE
    argv = ["--path_to_data_dir", str(videos), *flags, *words.split(), "--dry_run"]
    if words:
        counted = "videos" if module is main_pretrain else "clips"
        effective_lr(module.parse_args(argv), counted, 6)
    else:
        call(module, *argv)
    assert told(capsys.readouterr().out) == warnings


def test_continuing_from_a_checkpoint_with_few_videos_is_no_warning(capsys):
    args = main_pretrain.parse_args("--path_to_data_dir X --finetune f --epochs 999".split())
    effective_lr(args, "videos", 6)
    assert told(capsys.readouterr().out) == {"rate"}


@pytest.mark.slow
def test_ranks_stand_for_ranks_in_a_dry_run(videos, capsys):
    """What they print of the run is what two real ranks print; these need no --ranks."""
    argv = "--path_to_data_dir", videos, *PRETRAIN, "--batch_size", 1, "--epochs", 400, "--dry_run"
    out = finish(spawn("main_pretrain.py", *argv, ranks=2))
    call(main_pretrain, *argv, "--ranks", 2)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("videos per update"))
    assert "1 per rank x 1 accumulated x 2 ranks = 2; clips per update: 2 x 2 = 4" in lines[start]
    assert lines[start + 1] == "1,200 updates in 400 epochs of 3"
    assert "\n".join(lines[start:]) in out and lines[-1].startswith("estimated peak memory")
    out = finish(spawn("main_pretrain.py", *argv, "--ranks", 2, ranks=2), status=1)
    assert "--ranks stands for ranks that do not run: give it to a single process" in out


def test_ranks_without_a_dry_run_are_refused(videos, capsys):
    status, text = fails(
        capsys, main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, "--ranks", 2
    )
    assert (status, "--ranks is for a --dry_run; torchrun and srun start ranks" in text) == (
        2,
        True,
    )


def test_the_cost_of_a_tiny_model_is_no_zero(videos, capsys):
    call(main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, "--dry_run")
    assert re.search(
        r"\n[1-9][\d.]* MFLOPs per clip forward at --mask_ratio", capsys.readouterr().out
    )


def test_a_dry_run_allocates_no_weights(videos):
    """ViT-H would take long to draw, and 2.4 GiB; these are 100 MiB."""
    words = "--model mae_vit_small_patch16 --input_size 64 --num_workers 0 --device cpu --dry_run"
    argv = main_pretrain, "--path_to_data_dir", videos, *words.split()
    assert allocated_peak(*argv) < 20 * UNITS["MiB"]
