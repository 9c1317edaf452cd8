"""Test a fine-tuned classifier on K temporal x S spatial views of every video.

    python main_test.py --path_to_data_dir /data/k400 --finetune checkpoint-00049.pth
    python main_test.py --videos a.mp4 b.mp4 --finetune checkpoint-00049.pth

The checkpoint defines the model and may come from another project. See FINETUNE.md.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial

import models_vit
from engine_finetune import test
from util import args as flags
from util import run
from util.classes import read_classes, warn_of_one
from util.dist import is_main, print0
from util.dry_run import print_flops
from util.errors import UserError
from util.formats import Weights
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader
from util.meters import RunLog
from util.report import report
from util.synthetic import data_dir
from util.weights import apply_weights, checkpoint_flags, read_weights

# Training flags that the reference's test script also has; they change no result.
OBSOLETE_FLAGS = flags.OBSOLETE_FLAGS | {"checkpoint_period": 1, "drop_path_rate": 1, "dropout": 1}
OBSOLETE_FLAGS |= {"eval": 0, "rand_aug": 0, "repeat_aug": 1}


def get_args_parser() -> flags.Parser:
    """Build the flags; views default to 10 x 3 (the paper's tables use 7 x 3)."""
    parser = flags.Parser("Multi-view testing of a video classifier")
    flags.add_data_args(parser)
    flags.add_model_args(parser, ["", *models_vit.MODELS], "", classifier=True)
    add = flags.adder(parser, "test")
    add("--finetune --resume", "", "path or address of a fine-tuned classifier of any project")
    add("--use_ema", False, "take the moving average of the weights in --finetune")
    text = "files to classify, in place of test.csv; prints the five best classes of each"
    add("--videos", None, text, nargs="+", metavar="FILE")
    add("--num_clips", 10, "temporal views of a video", flags.small_int)
    add("--num_crops", 3, "spatial views of a clip", flags.small_int)
    add("--ensemble", "sum", "how the scores of views are combined", choices=("sum", "max"))
    add("--batch_size", 32, "views per forward pass", flags.positive_int)
    flags.add_run_args(parser, output_dir="./output/test", training=False)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    add_args: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Parse flags; the model's flags default to those of the checkpoint.

    Args:
        add_args: adds a launcher's own flags.
    """

    def default_flags(args: argparse.Namespace) -> list[str]:
        if not args.finetune:
            raise UserError("main_test.py needs --finetune CHECKPOINT, a fine-tuned classifier")
        return checkpoint_flags(args.finetune, use_ema=args.use_ema)

    parser = get_args_parser()
    add_args(parser)
    args = flags.parse(parser, argv, default_flags, OBSOLETE_FLAGS)
    if args.videos and args.path_to_data_dir:
        raise UserError("give --videos or --path_to_data_dir, not both")
    return args


def open_index(args: argparse.Namespace, weights: Weights) -> tuple[VideoIndex, list[str]]:
    """Open test.csv or --videos, with the model's labels; return also the names of its classes."""
    if args.num_classes is None:
        raise weights.lacks("head", "fine-tune it first (main_finetune.py)")
    numbers = [str(label) for label in range(args.num_classes)]
    if args.videos:
        return VideoIndex.of_files(args.videos), weights.classes or numbers
    folder = data_dir(args, "finetune")
    found = read_classes(folder)
    csv_path, num_labels = os.path.join(folder, "test.csv"), len(found.names) or args.num_classes
    index = VideoIndex(csv_path, args.path_prefix, num_labels, needs_labels=False)
    if index.has_labels:
        index.match_labels(found, weights.classes, args.num_classes)
    own = found.names if len(found.names) == args.num_classes else numbers
    return index, weights.classes or own


def load_model(args: argparse.Namespace, weights: Weights) -> models_vit.VisionTransformer:
    """Rebuild the classifier of --finetune; flags override what its file records."""
    sizes = {"num_frames": args.num_frames, "img_size": args.input_size}
    build = partial(models_vit.VisionTransformer, **weights.classifier_arguments(**sizes))
    if args.model:
        build = models_vit.MODELS[args.model]
    with run.usage_errors():
        model = build(
            **sizes,
            t_patch_size=args.t_patch_size,
            num_classes=args.num_classes,
            no_qkv_bias=args.no_qkv_bias,
            sep_pos_embed=args.sep_pos_embed,
            cls_embed=args.cls_embed,
            sincos_pos_embed=args.sincos_pos_embed,
            pool=args.pool,
        )
    apply_weights(model, weights, keep_head=True)
    return model


def main(args: argparse.Namespace) -> None:
    """Build data and model, score every video, report and write the scores."""
    device = run.start(args, lock=".lock_test")  # a training run may use the same folder

    # Data: one video at a time; its views fill the forward passes.
    weights = read_weights(args.finetune, args.use_ema)
    index, names = open_index(args, weights)
    views = {"num_clips": args.num_clips, "num_crops": args.num_crops}
    dataset = Kinetics(index, "test", **flags.clip_options(args), **views)
    loader = VideoLoader(dataset, 1, args.num_workers, 1.0, device)
    warn_of_one(args.num_classes)
    print0(f"{len(index)} videos, {args.num_clips} x {args.num_crops} views each")

    # Model.
    model = load_model(args, weights)
    del weights  # frees its memory
    if args.dry_run:
        return print_flops(model, args)
    model.to(device)
    print0(f"{args.finetune}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # Score every video; the main process reports.
    log = RunLog("", args.print_freq, device)
    result = test(model, loader, device, args.precision, args.batch_size, args.ensemble, log)
    if is_main():
        report(result, index, args, names)


if __name__ == "__main__":
    run.run(main, parse_args)
