"""Flags shared by the scripts, in groups; each script adds its own and sets its recipe."""

import argparse
import math
import shlex
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from util.errors import UserError

Kind = Callable[[str], Any]  # converts the text of a flag to its value

# flags that do not change what a run learns
NOT_COMPARED = """
    notice dry_run ranks eval device output_dir log_dir resume print_freq dist_timeout vis_period
    num_workers item_timeout max_bad_share max_pixels cache_dir cache_gb checkpoint_period
    checkpoint_minutes keep_last keep_every cluster nodes ngpus tasks_per_node cpus_per_task mem_gb
    time partition account qos constraint comment job_name job_dir signal_delay_s probe_csv
    time_loader clips_per_second
""".split()


def compared(args: Namespace) -> dict[str, Any]:
    """Return the flags that change what a run learns, with their values."""
    return {name: value for name, value in vars(args).items() if name not in NOT_COMPARED}


def number(kind: Kind, description: str, allows: Callable[[float], bool]) -> Kind:
    """Make a parser of numbers; the error about a bad one is "TEXT is not DESCRIPTION"."""

    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allows(value):  # NaN fails every comparison
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value

    return parse_number


def between(kind: Kind, low: float, high: float) -> Kind:
    """Make a parser of numbers from low to high."""
    name = "a whole number" if kind is int else "a number"
    return number(kind, f"{name} from {low:,} to {high:,}", lambda value: low <= value <= high)


positive_int = number(int, "a whole number of at least 1", lambda value: 1 <= value < 2**63)
natural_int = number(int, "a whole number of at least 0", lambda value: 0 <= value < 2**63)
up_to_1000, small_int = between(int, 0, 1000), between(int, 1, 10_000)
positive_float = number(float, "a number above 0 and at most 1e12", lambda value: 0 < value <= 1e12)
natural_float = between(float, 0, 10**12)
share = between(float, 0, 1)
share_below_1 = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)


class Range(argparse.Action):
    """Accept two numbers in ascending order."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        low, high = values
        if low > high:
            raise argparse.ArgumentError(self, f"{low:g} is above {high:g}: give MIN MAX")
        setattr(namespace, self.dest, values)


class Parser(ArgumentParser):
    """ArgumentParser that shows defaults in --help and reads more flags from @FILE."""

    def __init__(self, description: str):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False)
        self.formatter_class = argparse.ArgumentDefaultsHelpFormatter

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an @FILE like a shell; # starts a comment."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:  # of quotes
            raise UserError(f"a line of an @FILE, {arg_line!r}: {error}") from error


def adder(parser: ArgumentParser, group: str = "") -> Callable[..., None]:
    """Return add(names, default, text, kind=None, **options), which adds a flag.

    A default of True adds --name and --no-name; False adds --name alone. `names` are separated
    by spaces, `kind` is the type of a value, and `options` go to ArgumentParser.add_argument.
    `group` is the title of a new group in --help.
    """
    target = parser.add_argument_group(group) if group else parser

    def add(names: str, default: Any, text: str, kind: Kind | None = None, **options: Any) -> None:
        if isinstance(default, bool):
            options.setdefault("action", BooleanOptionalAction if default else "store_true")
        if kind is not None:
            options["type"] = kind
        target.add_argument(*names.split(), default=default, help=text, **options)

    return add


# --- groups of flags ----------------------------------------------------------------------------


def add_data_args(parser: ArgumentParser, jitter_scales: tuple[float, float] | None = None) -> None:
    """Add the flags of the videos; with jitter_scales, also those of training videos."""
    add = adder(parser, "data")
    add("--path_to_data_dir", "", "folder of train.csv, val.csv, test.csv; empty: synthetic videos")
    add("--path_prefix", "", "folder that relative paths start from; empty: the csv file's folder")
    add("--num_workers", None, "loaders per rank; not given: one per CPU, up to 16", up_to_1000)
    add("--item_timeout", 60.0, "seconds before a slow video counts as unreadable", positive_float)
    add("--max_pixels", 8192**2, "width x height above which a video is unreadable", positive_int)
    text = "folder of fetched s3:// and https:// videos; empty: mae_video_UID in $TMPDIR or /tmp"
    add("--cache_dir", "", text)
    text = "10^9 bytes that --cache_dir may hold; the least recently used files leave; 0: no limit"
    add("--cache_gb", 0.0, text, natural_float)
    how = "dense: spread evenly over a clip; segments: one in each of --num_frames equal parts"
    add("--sampling", "dense", how, choices=("dense", "segments"))
    if not jitter_scales:
        return
    add("--max_bad_share", 0.1, "stop when a larger share of a csv's videos is unreadable", share)
    add("--repeat_aug", 1, "clips taken from each loaded video", small_int)
    pair = {"nargs": 2, "action": Range, "metavar": ("MIN", "MAX")}
    area, aspect = "random crop's area / frame's area", "width / height of the random crop"
    add("--jitter_scales_relative", jitter_scales, area, positive_float, **pair)
    add("--jitter_aspect_relative", (3 / 4, 4 / 3), aspect, positive_float, **pair)
    add("--hflip", True, "mirror half of the clips; wrong if left and right are different classes")


def add_model_args(
    parser: ArgumentParser, models: Sequence[str], default: str, classifier: bool = False
) -> None:
    """Add the flags of the model; the data set also uses its clip sizes."""
    add = adder(parser, "model")
    names = "one of " + ", ".join(filter(None, models))
    checkpoint = "; empty: the model in the checkpoint" if "" in models else ""
    add("--model", default, names + checkpoint, choices=models, metavar="NAME")
    add("--input_size", 224, "height and width of a clip, pixels", small_int)
    add("--num_frames", 16, "frames of a clip", small_int)
    span = "a clip's frames are spread evenly over --num_frames x --sampling_rate frames at 30 fps"
    add("--sampling_rate", 4, span, small_int)
    add("--t_patch_size", 2, "frames of a patch", small_int)
    add("--sep_pos_embed", True, "separate position embeddings for space and time, not joint ones")
    text = "fixed sine-cosine position embeddings, as in VideoMAE; needs --no-sep_pos_embed"
    add("--sincos_pos_embed", False, text, action=BooleanOptionalAction)
    add("--cls_embed", True, "prepend a class token")
    add("--no_qkv_bias", False, "leave out the biases of q, k and v")
    if classifier:
        text = "classes of the head; not given: as classes.txt or, in a test, the checkpoint says"
        add("--num_classes --nb_classes", None, text, between(int, 1, 20_000))
        text = "what the head reads: the mean of the patch tokens, or the first (class) token"
        add("--pool", "mean", text, choices=("mean", "cls"))


def add_optim_args(parser: ArgumentParser) -> None:
    """Add the flags of batch, schedule and optimiser."""
    add = adder(parser, "optimisation")
    add("--batch_size", 2, "videos per rank and micro-step", positive_int)
    add("--accum_iter", 1, "micro-steps whose gradients are added up for one update", positive_int)
    add("--epochs", 100, "passes over train.csv", positive_int)
    add("--warmup_epochs", 5, "epochs of linear warm-up from 0", natural_float)
    add("--lr", None, "peak learning rate; not given: --blr x batch / 256", natural_float)
    add("--blr", 1e-3, "base learning rate, for a batch of 256", natural_float)
    add("--min_lr", 1e-6, "learning rate at the end", natural_float)
    add("--weight_decay", 0.05, "AdamW's weight decay", natural_float)
    add("--beta", (0.9, 0.999), "AdamW's betas", share_below_1, nargs=2)
    add("--clip_grad", None, "largest global gradient norm; 0: no limit", natural_float)
    text = "skip up to N updates in a row whose loss or gradient is not finite, and read the loss "
    text += "at every step; 0: stop at the first"
    add("--skip_nonfinite", 0, text, natural_int, metavar="N")
    add("--compile", False, "compile blocks and loss with torch.compile")
    add("--ranks", None, "with --dry_run: ranks to assume; none are started", positive_int)
    add("--grad_checkpointing", False, "recompute the blocks in the backward pass, to save memory")


def add_run_args(parser: ArgumentParser, output_dir: str, training: bool = True) -> None:
    """Add the flags of device, folders and logging."""
    add = adder(parser, "run")
    text = "folder of all that the run writes; %%j: the id of its Slurm job; empty: write nothing"
    add("--output_dir", output_dir, text)
    if training:
        add("--log_dir", "", "TensorBoard folder; empty: OUTPUT_DIR/tensorboard")
        add("--seed", 0, "seed of all random choices", natural_int)
    add("--device", "auto", "cuda, mps, cpu, or auto (the first of these that the machine has)")
    text = "precision of the forward pass; not given: bf16 if the GPU supports it, else fp32"
    add("--precision", None, text, choices=("bf16", "fp16", "fp32"))
    fp32 = {"dest": "precision", "action": "store_const", "const": "fp32"}
    add("--fp32", argparse.SUPPRESS, "short for --precision fp32", **fp32)
    text = "open the data, print updates, learning rate, memory of a step and FLOPs, then exit"
    add("--dry_run", False, text if training else "build data and model, print FLOPs, then exit")
    if training:
        text = "time the loader for N seconds, say what limits it, then exit"
        add("--time_loader", None, text, positive_float, metavar="N")
        text = "with --time_loader: what is to be fed; not given: a few rates"
        add("--clips_per_second", None, text, positive_float, metavar="X")
    add("--print_freq", 20, "steps between printed lines", positive_int)
    minutes = between(float, 1e-4, 1e7)  # more would overflow PyTorch's clock
    add("--dist_timeout", 30, "minutes that a rank waits for the others", minutes)


def add_checkpoint_args(parser: ArgumentParser) -> None:
    """Add the flags of saving and resuming."""
    add = adder(parser, "checkpoints")
    add("--checkpoint_period", 1, "epochs between checkpoints", positive_int)
    add("--checkpoint_minutes", 30, "minutes between saves within an epoch; 0: none", natural_float)
    text = "number of newest epoch checkpoints to keep, besides the best; 0: all"
    add("--keep_last", None, text + "; not given: 3, or as the resumed run has it", natural_int)
    text = "keep every n-th epoch's checkpoint too; 0: none"
    add("--keep_every", None, text + "; not given: 50, or as the resumed run has it", natural_int)
    add("--resume", "", "checkpoint to continue from; empty: the newest in --output_dir, if any")


# --- parsing ------------------------------------------------------------------------------------

# flags of the reference that have no effect in some script here, and how many values each takes
OBSOLETE_FLAGS = {
    **dict.fromkeys("distributed no_env dist_on_itp dist_eval pin_mem no_pin_mem".split(), 0),
    **dict.fromkeys("global_pool cls_token cpu_mix resplit".split(), 0),
    **dict.fromkeys("dist_url local_rank world_size start_epoch num_checkpoint_del".split(), 1),
    **dict.fromkeys("decoder_backend decoder_device encoder_attn color_jitter seed".split(), 1),
    "log_dir": 1,
}
# flags of the reference that would change the result: the only value that is allowed
FIXED_FLAGS = {"remode": "pixel", "recount": "1", "mixup_mode": "batch"}


def parse(
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    default_flags: Callable[[Namespace], Sequence[str]],
    obsolete: dict[str, int] = OBSOLETE_FLAGS,
) -> Namespace:
    """Parse flags; obsolete ones that the script does not have are listed in args.notice.

    Args:
        default_flags: takes the parsed flags and returns more flags, which argv overrides (a recipe
            for the embedded videos, or the flags that a checkpoint was trained with).
    """
    argv = sys.argv[1:] if argv is None else argv
    # flags on the command line override those of an @FILE, whether it comes before or after them
    argv = sorted(argv, key=lambda word: not word.startswith("@"))
    add = adder(parser)
    for name, num_values in obsolete.items():
        if f"--{name}" not in parser._option_string_actions:
            options = {"nargs": 1} if num_values else {"action": "store_true"}
            add(f"--{name}", None, argparse.SUPPRESS, dest=f"obsolete_{name}", **options)
    for name, value in FIXED_FLAGS.items():
        add(f"--{name}", argparse.SUPPRESS, argparse.SUPPRESS, choices=[value])
    args = parser.parse_args([*default_flags(parser.parse_args(argv)), *argv])
    values = vars(args)
    ignored = [f"--{name}" for name in obsolete if values.pop(f"obsolete_{name}", None) is not None]
    for name in FIXED_FLAGS:
        values.pop(name, None)
    if getattr(args, "ranks", None) and not args.dry_run:
        raise UserError("--ranks is for a --dry_run; torchrun and srun start ranks")
    timed = getattr(args, "time_loader", None)
    if timed and args.dry_run:
        raise UserError("--dry_run and --time_loader exclude each other")
    if getattr(args, "clips_per_second", None) and not timed:
        raise UserError("--clips_per_second needs --time_loader")
    args.notice = f"no longer needed, ignored: {' '.join(ignored)}" if ignored else ""
    return args


def clip_options(args: Namespace, training: bool = False) -> dict[str, Any]:
    """Return the arguments of Kinetics that the flags set for every data set, or training set."""
    names = "input_size num_frames sampling_rate sampling max_pixels item_timeout"
    names += " cache_dir cache_gb" + " seed repeat_aug hflip" * training
    options = {name: getattr(args, name) for name in names.split()}
    if training:
        options |= {"scales": args.jitter_scales_relative, "ratios": args.jitter_aspect_relative}
    return options
