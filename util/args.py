"""Flags shared by the scripts, in groups; each script adds its own and states its recipe."""

import argparse
import math
import shlex
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from typing import Any

# flags that have no part in what a run learns
NOT_COMPARED = """
    notice dry_run eval device output_dir log_dir resume print_freq dist_timeout vis_period
    num_workers item_timeout max_bad_share max_pixels
    checkpoint_period checkpoint_minutes keep_last keep_every
    cluster nodes ngpus tasks_per_node cpus_per_task mem_gb time partition account qos constraint
    comment job_name job_dir signal_delay_s
""".split()


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def natural_int(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return value


def positive_float(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def natural_float(text: str) -> float:
    """Parse a number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def share(text: str) -> float:
    """Parse a probability, or a part of a whole."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


class Range(argparse.Action):
    """Take two numbers in order."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        """Store them."""
        low, high = values
        if low > high:
            raise argparse.ArgumentError(self, f"{low:g} is above {high:g}: give MIN MAX")
        setattr(namespace, self.dest, values)


class Parser(ArgumentParser):
    """ArgumentParser with defaults in --help and @FILE holding more flags (recipes/*.args)."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an @FILE as a shell does; # starts a comment."""
        return shlex.split(arg_line, comments=True)


def add_data_args(parser: ArgumentParser, jitter_scales: tuple[float, float] | None = None) -> None:
    """Add the flags of videos and, given the range of the random crop's area, of their jitter."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--path_to_data_dir",
        default="",
        help="folder with train.csv, val.csv, test.csv; empty: the embedded synthetic videos",
    )
    group.add_argument(
        "--path_prefix", default="", help="folder of relative paths in the csvs; empty: the csv's"
    )
    group.add_argument(
        "--num_workers",
        type=natural_int,
        default=None,
        help="loader processes per rank; not given: from the CPUs this process may use",
    )
    group.add_argument(
        "--item_timeout",
        type=positive_float,
        default=60.0,
        help="seconds after which a video that is still being read counts as unreadable",
    )
    group.add_argument(
        "--max_pixels",
        type=positive_int,
        default=8192 * 8192,
        help="width x height above which a video counts as unreadable",
    )
    group.add_argument(
        "--sampling",
        choices=("dense", "segments"),
        default="dense",
        help="frames: every --sampling_rate-th, or one from each of --num_frames equal segments",
    )
    if jitter_scales:
        group.add_argument(
            "--max_bad_share",
            type=share,
            default=0.1,
            help="stop when more than this share of a csv's videos cannot be read",
        )
        group.add_argument(
            "--repeat_aug", type=positive_int, default=1, help="clips taken from each loaded video"
        )
        group.add_argument(
            "--jitter_scales_relative",
            type=positive_float,
            action=Range,
            nargs=2,
            default=jitter_scales,
            metavar=("MIN", "MAX"),
            help="area of the random crop, share of the frame",
        )
        group.add_argument(
            "--jitter_aspect_relative",
            type=positive_float,
            action=Range,
            nargs=2,
            default=(3 / 4, 4 / 3),
            metavar=("MIN", "MAX"),
            help="width / height of the random crop",
        )
        group.add_argument(
            "--hflip",
            action=BooleanOptionalAction,
            default=True,
            help="mirror half of the clips; wrong where left and right are classes",
        )


def add_model_args(parser: ArgumentParser, models: Sequence[str], default: str) -> None:
    """Add the flags of the model; clip sizes reach model and data alike."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=default, choices=models, metavar="NAME", help=str(models))
    group.add_argument(
        "--input_size", type=positive_int, default=224, help="clip height and width, pixels"
    )
    group.add_argument("--num_frames", type=positive_int, default=16, help="frames of a clip")
    group.add_argument(
        "--sampling_rate",
        type=positive_int,
        default=4,
        help="take every n-th frame, counted at 30 fps",
    )
    group.add_argument("--t_patch_size", type=positive_int, default=2, help="frames of a patch")
    group.add_argument(
        "--sep_pos_embed",
        action=BooleanOptionalAction,
        default=True,
        help="separable positions (space + time) in place of joint ones",
    )
    group.add_argument(
        "--sincos_pos_embed",
        action=BooleanOptionalAction,
        default=False,
        help="fixed sine-cosine positions, as VideoMAE has; needs --no-sep_pos_embed",
    )
    group.add_argument(
        "--cls_embed", action=BooleanOptionalAction, default=True, help="prepend a class token"
    )
    group.add_argument(
        "--no_qkv_bias", action="store_true", help="leave out the biases of q, k and v"
    )


def add_classifier_args(parser: ArgumentParser) -> None:
    """Add the flag that every classifier has on top of add_model_args."""
    parser.add_argument(
        "--num_classes", "--nb_classes", type=positive_int, default=400, help="classes of the head"
    )


def add_optim_args(parser: ArgumentParser) -> None:
    """Add the flags of batch, schedule and optimiser."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--batch_size", type=positive_int, default=2, help="videos per rank and micro-step"
    )
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, help="micro-steps per update, to save memory"
    )
    group.add_argument("--epochs", type=positive_int, default=100, help="passes over train.csv")
    group.add_argument(
        "--warmup_epochs", type=natural_float, default=5, help="epochs of linear warm-up from 0"
    )
    group.add_argument(
        "--lr",
        type=natural_float,
        default=None,
        help="peak learning rate; not given: from --blr and the batch",
    )
    group.add_argument(
        "--blr", type=natural_float, default=1e-3, help="base learning rate, for a batch of 256"
    )
    group.add_argument(
        "--min_lr", type=natural_float, default=1e-6, help="learning rate at the end"
    )
    group.add_argument("--weight_decay", type=natural_float, default=0.05)
    group.add_argument("--beta", type=share, nargs=2, default=(0.9, 0.999), help="AdamW's betas")
    group.add_argument(
        "--clip_grad",
        type=natural_float,
        default=None,
        help="largest global gradient norm; 0: no limit",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the transformer blocks by torch.compile"
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute every block again in the backward pass, to save memory",
    )


def add_guard_args(parser: ArgumentParser) -> None:
    """Add the flags of what to do with a loss that is not finite, or leaps."""
    group = parser.add_argument_group("bad steps")
    group.add_argument(
        "--skip_nonfinite",
        type=natural_int,
        default=0,
        metavar="N",
        help="skip up to N updates in a row whose loss or gradient is not finite, reading the "
        "loss every step; 0: stop at the first",
    )
    group.add_argument(
        "--kill_loss_factor",
        type=natural_float,
        default=0.0,
        metavar="F",
        help="stop when a step's loss is more than F times the epoch's mean before it; 0: never",
    )


def add_run_args(parser: ArgumentParser, output_dir: str, training: bool = True) -> None:
    """Add the flags of device, folders and logging."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=output_dir, help="folder of log.txt and results")
    if training:
        group.add_argument(
            "--log_dir",
            default="",
            help="TensorBoard folder; empty: OUTPUT_DIR/tensorboard",
        )
        group.add_argument("--seed", type=natural_int, default=0)
    group.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto")
    group.add_argument(
        "--precision",
        choices=("bf16", "fp16", "fp32"),
        default=None,
        help="of the forward pass; not given: bf16 where the accelerator has it, else fp32",
    )
    group.add_argument(
        "--fp32",
        dest="precision",
        action="store_const",
        const="fp32",
        default=argparse.SUPPRESS,
        help="short for --precision fp32",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="build data and model, print the arithmetic and the FLOPs, and exit",
    )
    group.add_argument(
        "--print_freq", type=positive_int, default=20, help="steps between printed lines"
    )
    group.add_argument(
        "--dist_timeout",
        type=positive_float,
        default=30,
        help="minutes a rank waits for the others",
    )


def add_checkpoint_args(parser: ArgumentParser) -> None:
    """Add the flags of saving and resuming."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpoint_period", type=positive_int, default=1, help="epochs between checkpoints"
    )
    group.add_argument(
        "--checkpoint_minutes",
        type=natural_float,
        default=30,
        help="also save within an epoch, after so many minutes; 0: never",
    )
    group.add_argument(
        "--keep_last",
        type=natural_int,
        default=0,
        help="finished epochs whose checkpoints stay; 0: all",
    )
    group.add_argument(
        "--keep_every",
        type=natural_int,
        default=0,
        help="keep every n-th epoch's checkpoint anyway",
    )
    group.add_argument(
        "--resume",
        default="",
        help="checkpoint to continue; empty: the newest of --output_dir, if any",
    )


# Flags of the reference that mean nothing here, or not in every script, with the number of values
# they take.
OBSOLETE_FLAGS = {
    "distributed": 0,
    "no_env": 0,
    "dist_on_itp": 0,
    "dist_eval": 0,
    "pin_mem": 0,
    "no_pin_mem": 0,
    "global_pool": 0,
    "cpu_mix": 0,
    "resplit": 0,
    "dist_url": 1,
    "local_rank": 1,
    "world_size": 1,
    "start_epoch": 1,
    "num_checkpoint_del": 1,
    "decoder_backend": 1,
    "decoder_device": 1,
    "encoder_attn": 1,
    "color_jitter": 1,
    "seed": 1,
    "log_dir": 1,
}
# Flags of the reference that would change the result, with the one value that is built here.
FIXED_FLAGS = {"remode": "pixel", "recount": "1", "mixup_mode": "batch"}


def parse(
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    default_flags: Callable[[Namespace], Sequence[str]] | None = None,
    obsolete: dict[str, int] = OBSOLETE_FLAGS,
) -> Namespace:
    """Parse flags, accepting obsolete ones with one line of notice.

    Args:
        default_flags: maps the parsed flags to more flags, which those of argv then override
            (a recipe for the embedded data, or the flags a checkpoint was trained with).
        obsolete: those flags that the script does not have, with the number of their values.
    """
    argv = sys.argv[1:] if argv is None else argv
    # what is given by hand overrides what is in an @FILE, before it or behind it
    argv = sorted(argv, key=lambda word: not word.startswith("@"))
    for name, values in obsolete.items():
        if f"--{name}" in parser._option_string_actions:
            continue
        options = {"dest": f"obsolete_{name}", "help": argparse.SUPPRESS, "default": None}
        options |= {"nargs": 1} if values else {"action": "store_true"}
        parser.add_argument(f"--{name}", **options)
    for name, value in FIXED_FLAGS.items():
        parser.add_argument(
            f"--{name}", choices=[value], default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    args = parser.parse_args(argv)
    if default_flags is not None:
        args = parser.parse_args([*default_flags(args), *argv])
    ignored = []
    for name in obsolete:
        if vars(args).pop(f"obsolete_{name}", None) is not None:
            ignored.append(f"--{name}")
    for name in FIXED_FLAGS:
        vars(args).pop(name, None)
    args.notice = f"no longer needed, ignored: {' '.join(ignored)}" if ignored else ""
    return args


def compared(args: Namespace) -> dict[str, Any]:
    """Return the flags that have a part in what a run learns."""
    return {k: v for k, v in vars(args).items() if k not in NOT_COMPARED}


def clip_options(args: Namespace) -> dict[str, Any]:
    """Return what the flags say of the clips of every data set, for Kinetics."""
    names = "input_size num_frames sampling_rate sampling max_pixels item_timeout"
    return {name: getattr(args, name) for name in names.split()}
