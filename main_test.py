"""Test a fine-tuned classifier on K temporal x S spatial views of every video.

    python main_test.py --path_to_data_dir /data/k400 --finetune checkpoint-00049.pth

The model is the one in the checkpoint, which may be of another project. See FINETUNE.md.
"""

import argparse
import csv
import io
import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

import models_vit
from engine_finetune import VideoScores, test
from util import args as flags
from util import run
from util.checkpoint import apply_weights, read_weights
from util.confusion import count_confusions, read_class_names, report_classes
from util.dist import is_main, print0
from util.errors import UserError
from util.file_io import write_atomically
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader
from util.meters import RunLog
from util.resume import append_log

MODEL_FLAGS = (
    "input_size",
    "num_frames",
    "sampling_rate",
    "sampling",
    "t_patch_size",
    "sep_pos_embed",
    "sincos_pos_embed",
    "cls_embed",
    "no_qkv_bias",
    "num_classes",
)

# Flags of training that the reference's test script has, too, and that change no result.
OBSOLETE_FLAGS = flags.OBSOLETE_FLAGS | {
    "checkpoint_period": 1,
    "drop_path_rate": 1,
    "dropout": 1,
    "eval": 0,
    "rand_aug": 0,
    "repeat_aug": 1,
}


def get_args_parser() -> flags.Parser:
    """Build the flags; views default to 10 x 3 (the paper's tables use 7 x 3)."""
    parser = flags.Parser("Multi-view testing of a video classifier")
    flags.add_data_args(parser)
    flags.add_model_args(parser, ["", *models_vit.MODELS], "")
    flags.add_classifier_args(parser)
    group = parser.add_argument_group("test")
    group.add_argument(
        "--finetune",
        "--resume",
        default="",
        help="fine-tuned classifier: path or address of a checkpoint, also of other projects",
    )
    group.add_argument(
        "--num_clips", type=flags.positive_int, default=10, help="temporal views of a video"
    )
    group.add_argument(
        "--num_crops", type=flags.positive_int, default=3, help="spatial views of a clip"
    )
    group.add_argument(
        "--ensemble", choices=("sum", "max"), default="sum", help="how views are combined"
    )
    group.add_argument(
        "--batch_size", type=flags.positive_int, default=32, help="views per forward pass"
    )
    flags.add_run_args(parser, output_dir="./output/test", training=False)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    add_args: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Parse flags; those of the model default to what the checkpoint holds.

    Args:
        add_args: adds a launcher's own flags.
    """

    def default_flags(args: argparse.Namespace) -> list[str]:
        if not args.finetune:
            raise UserError("main_test.py needs --finetune CHECKPOINT, a fine-tuned classifier")
        return checkpoint_flags(args.finetune)

    parser = get_args_parser()
    add_args(parser)
    return flags.parse(parser, argv, default_flags, OBSOLETE_FLAGS)


def checkpoint_flags(path: str, names: Sequence[str] = MODEL_FLAGS) -> list[str]:
    """Return the named flags as the checkpoint has them: of its model and its clips."""
    weights = read_weights(path)
    values = weights.flags | weights.arguments | {"input_size": weights.arguments["img_size"]}
    if weights.doubt:  # the user must say
        values |= {"input_size": None, "num_frames": None}
    return flags.as_flags(values, names)


def main(args: argparse.Namespace) -> None:
    """Build data and model, score every video, report and write the scores."""
    device = run.start(args)

    folder = run.data_dir(args, "finetune")
    index = VideoIndex(os.path.join(folder, "test.csv"), args.path_prefix, args.num_classes)
    dataset = Kinetics(
        index,
        "test",
        **run.clip_options(args),
        num_clips=args.num_clips,
        num_crops=args.num_crops,
    )
    # one video at a time: its views fill the forward passes
    loader = VideoLoader(dataset, 1, args.num_workers, 1.0, device)
    print0(f"{len(index)} videos, {args.num_clips} x {args.num_crops} views each")

    weights = read_weights(args.finetune)
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
        )
    apply_weights(model, weights, keep_head=True)
    if args.dry_run:
        run.print_flops(model, args)
        return
    model.to(device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"{args.finetune}: {millions:.1f} M parameters")

    log = RunLog("", args.print_freq, device)
    result = test(model, loader, device, args.precision, args.batch_size, args.ensemble, log)
    if is_main():
        report(result, index, args)


def report(result: VideoScores, index: VideoIndex, args: argparse.Namespace) -> None:
    """Print the accuracy and write predictions.csv, classes.csv, scores.npz and log.txt.

    Unreadable videos count as wrong, so that numbers of different machines can be compared.
    """
    if not result.readable.any():
        raise UserError(f"none of the {len(index)} videos of {index.csv_path} could be read", 1)
    ranking = np.argsort(-result.scores, axis=1, kind="stable")[:, :5]  # the first among equals
    hits = (ranking == index.labels[:, None]) & result.readable[:, None]
    top1, top5 = (100 * int(hits[:, :k].sum()) / len(index) for k in (1, 5))

    views = args.num_clips * args.num_crops if args.ensemble == "sum" else 1
    names = read_class_names(os.path.dirname(index.csv_path), args.num_classes)
    tables = {
        "predictions.csv": prediction_rows(result, index, ranking, views),
        "classes.csv": class_rows(result, index.labels, ranking, hits, names),
    }
    errors = [error for error in result.errors if error]
    if errors:
        print(f"{len(errors)} unreadable videos, counted as wrong:")
        print("\n".join(f"  {error}" for error in errors))
    print(
        f"{len(index)} videos x {args.num_clips * args.num_crops} views ({args.ensemble}): "
        f"top-1 {top1:.2f} %  top-5 {top5:.2f} %; predictions, classes and scores go to "
        f"{args.output_dir}",
        flush=True,
    )
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        data = text.getvalue().encode("utf-8", "surrogateescape")
        write_atomically(os.path.join(args.output_dir, name), lambda file, d=data: file.write(d))
    write_atomically(
        os.path.join(args.output_dir, "scores.npz"),
        lambda file: np.savez(file, scores=result.scores, labels=index.labels),
    )
    seen = np.bincount(index.labels)
    per_class = np.bincount(index.labels, weights=hits[:, 0])[seen > 0] / seen[seen > 0]
    record = {"test_acc1": top1, "test_acc5": top5, "videos": len(index), "bad": len(errors)}
    record["test_mean_class_acc"] = 100 * float(per_class.mean())
    names = "finetune", "num_clips", "num_crops", "ensemble"
    record |= {name: getattr(args, name) for name in names}
    append_log(args.output_dir, record)


def prediction_rows(
    result: VideoScores, index: VideoIndex, ranking: np.ndarray, views: int
) -> list[list[str | int]]:
    """Make the lines of predictions.csv; the score is a mean over views, or their maximum."""
    rows: list[list[str | int]] = [
        ["video", "label", "prediction", "correct", "score", "top5", "error"]
    ]
    for i, label in enumerate(index.labels.tolist()):
        if result.readable[i]:
            best = ranking[i].tolist()
            score = f"{result.scores[i, best[0]] / views:.4f}"
            told = [best[0], int(best[0] == label), score, " ".join(map(str, best)), ""]
        else:
            told = ["", 0, "", "", result.errors[i]]
        rows.append([index.path(i), label, *told])
    return rows


def class_rows(
    result: VideoScores,
    labels: np.ndarray,
    ranking: np.ndarray,
    hits: np.ndarray,
    names: list[str],
) -> list[list[str | int]]:
    """Make the lines of classes.csv, in the order of the labels; accuracies in percent."""
    good = result.readable
    pairs = torch.from_numpy(labels[good]), torch.from_numpy(ranking[good, 0])
    confusion = count_confusions(*pairs, len(names)).numpy()
    unreadable = np.bincount(labels[~good], minlength=len(names))
    top5 = np.bincount(labels[hits.any(axis=1)], minlength=len(names))
    header = "label name videos unreadable top1 top5 confused_with confusions".split()
    rows: list[list[str | int]] = [list(header)]
    for entry in report_classes(confusion, unreadable):
        c, other = entry.label, entry.confused_with
        accuracies = ["", ""]
        if entry.videos:
            accuracies = [f"{entry.accuracy:.2f}", f"{100 * top5[c] / entry.videos:.2f}"]
        taken_for = "" if other is None else names[other]
        counts = [entry.videos, int(unreadable[c])]
        rows.append([c, names[c], *counts, *accuracies, taken_for, entry.confusions])
    return rows


if __name__ == "__main__":
    run.run(main, parse_args)
