"""Write features of videos by a frozen encoder to files that numpy reads.

    python main_features.py --path_to_data_dir /data/k400 --finetune checkpoint-00199.pth
    python main_features.py --videos a.mp4 b.mp4 --finetune checkpoint-00199.pth --window_stride 0.5

The checkpoint may be an autoencoder or a classifier of any project. If a run is interrupted, the
same command goes on. See FEATURES.md.
"""

import argparse
import json
import os
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch

import models_mae
import models_vit
from util import args as flags
from util import run
from util.classes import is_absent, read_classes
from util.dist import barrier, gather_objects, print0, rank, world_size
from util.dry_run import print_flops
from util.errors import UserError
from util.features import NAMES, FeatureFile, check_folder, count_videos, encode, on_main, read_npz
from util.file_io import is_remote, make_dirs, path_to_text, write_atomically
from util.formats import Weights, is_decoder
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader, default_num_workers, make_loader
from util.meters import RunLog
from util.signals import child_signal_kept, signals_blocked
from util.synthetic import data_dir
from util.video_vit import Encoder
from util.weights import SIZES, WHOLE, apply_weights, checkpoint_flags, read_weights
from util.windows import WindowReader, window_names

SPLITS = NAMES[:3]


def add_feature_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is encoded."""
    add = flags.adder(parser, "features")
    add("--finetune --resume", "", "path, address or name of a checkpoint of any project")
    add("--use_ema", False, "take the moving average of the weights in --finetune")
    text = "block whose output is taken, counted from 1; not given: the end of the encoder"
    add("--layer", None, text, flags.positive_int)
    add("--tokens", False, "write all patch tokens, too")
    add("--half", False, "write tokens in float16")
    text = "clips spread evenly over a video; a single one is centred"
    add("--num_clips", 1, text, flags.small_int)
    add("--num_crops", 1, "crops of a clip; a single one is centred", flags.small_int)
    add("--batch_size", 32, "views of a video per forward pass", flags.positive_int)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse flags; the model's flags default to those of the checkpoint."""

    def default_flags(args: argparse.Namespace) -> list[str]:
        if not args.finetune:
            raise UserError("main_features.py needs --finetune CHECKPOINT, the encoder")
        return checkpoint_flags(args.finetune, use_ema=args.use_ema)

    parser = flags.Parser("Features of videos by a frozen encoder")
    flags.add_data_args(parser)
    flags.add_model_args(parser, ["", *models_vit.MODELS], "", classifier=True)
    add_feature_args(parser)
    add = flags.adder(parser, "videos")
    add("--splits", None, "csvs; not given: those that there are", nargs="+", choices=SPLITS)
    add("--videos", None, "files, in place of the csvs", nargs="+", metavar="FILE")
    text = "seconds from clip to clip over whole videos; not given: --num_clips of each"
    add("--window_stride", None, text, flags.between(float, 0.001, 10**6))
    flags.add_run_args(parser, output_dir="./output/features", training=False)
    args = flags.parse(parser, argv, default_flags)
    if args.videos and (args.path_to_data_dir or args.splits):
        raise UserError("give --videos or --path_to_data_dir and --splits, not both")
    if not args.output_dir or is_remote(args.output_dir):
        raise UserError("--output_dir must be a folder on this machine")
    if args.half and not args.tokens:
        raise UserError("--half is for --tokens; features are always float32")
    if args.window_stride and (args.tokens or args.num_clips * args.num_crops > 1):
        raise UserError("--window_stride allows no --tokens, --num_clips and --num_crops")
    if args.window_stride and args.sampling == "segments":
        raise UserError("--window_stride slides dense clips: give --sampling dense, too")
    return args


def load_model(weights: Weights, **arguments: Any) -> Encoder:
    """Rebuild the model of a checkpoint for its features, on the CPU and in evaluation mode.

    It is a classifier if the file has a head, else an autoencoder; one without a decoder gets one
    of no blocks. The file also sets the model's `sampling_rate` and `sampling`. `arguments` of the
    constructor replace the file's; UserError if weights are missing or do not fit them.
    """
    is_whole = weights.has_head or weights.has_decoder
    if not is_whole:
        fields = weights.arguments | arguments
        pred_t_dim = fields["num_frames"] // fields["t_patch_size"]
        arguments = {"decoder_depth": 0, "pred_t_dim": pred_t_dim} | arguments
    # drawing weights that the file replaces would take seconds
    with run.usage_errors(), torch.device("meta" if is_whole else "cpu"):
        if weights.has_head:
            model = models_vit.VisionTransformer(**weights.classifier_arguments(**arguments))
        else:
            model = models_mae.MaskedAutoencoderViT(**weights.autoencoder_arguments(**arguments))
    apply_weights(model, weights, keep_head=True, keep_decoder=weights.has_decoder)
    return model.eval()


def build_model(args: argparse.Namespace) -> Encoder:
    """Load the model of --finetune; flags override what its file records."""
    weights = read_weights(args.finetune, args.use_ema)
    arguments = {name: getattr(args, name) for name in ("num_frames", "t_patch_size", *WHOLE)}
    arguments["img_size"] = args.input_size
    if args.model:
        build: Any = models_vit.MODELS[args.model]
        arguments |= {name: build.keywords[name] for name in SIZES}
    if weights.has_head:
        arguments |= {"num_classes": args.num_classes, "pool": args.pool}
    elif args.pool == "cls":
        raise weights.lacks("head", "--pool is for classifiers")
    model = load_model(weights, **arguments)
    model.sampling_rate, model.sampling = args.sampling_rate, args.sampling
    if args.layer and args.layer > len(model.blocks):
        raise UserError(f"--layer {args.layer}: {args.finetune} has {len(model.blocks)} blocks")
    return model


def open_indices(args: argparse.Namespace) -> dict[str, tuple[VideoIndex, list[str]]]:
    """Open --videos, or the csvs of the splits; return by name the videos and names of classes."""
    if args.videos:
        return {"videos": (VideoIndex.of_files(args.videos), [])}
    folder, indices = data_dir(args, "finetune"), {}
    classes = read_classes(folder).names
    for name in args.splits or SPLITS:
        options = args.path_prefix, len(classes) or None, False
        try:
            indices[name] = VideoIndex(os.path.join(folder, f"{name}.csv"), *options), classes
        except UserError as error:
            if args.splits or not is_absent(error):
                raise
    if not indices:
        raise UserError(f"{folder} holds no train.csv, val.csv or test.csv")
    return indices


def describe(args: argparse.Namespace, model: Encoder) -> dict[str, Any]:
    """Return the arguments of features as plain data; equal ones give equal features."""
    names = "use_ema layer tokens half num_clips num_crops sampling sampling_rate precision"
    checksum = 0
    for name, tensor in model.state_dict().items():
        if not is_decoder(name):
            checksum = zlib.crc32(tensor.cpu().numpy(), checksum)
    found = {name: getattr(args, name) for name in names.split()}
    found |= {"checkpoint": args.finetune, "weights": checksum, **vars(model)["arguments"]}
    found["window_stride"] = getattr(args, "window_stride", None)
    return json.loads(json.dumps(found))


def extract(
    args: argparse.Namespace,
    model: Encoder,
    name: str,
    index: VideoIndex,
    classes: list[str],
    device: torch.device,
) -> None:
    """Write the features of an index to OUTPUT_DIR/NAME.npz, on all ranks.

    Raise UserError if no video can be read, features are not finite, or the folder has others.
    """
    views, embed = args.num_clips * args.num_crops, model.patch_embed
    shape = (views, embed.num_patches, embed.proj.out_channels) if args.tokens else ()
    paths = [index.path(row) for row in range(len(index))]
    absolute = "\0".join(path if is_remote(path) else os.path.abspath(path) for path in paths)
    rows = {"csv": index.csv_path, "index": zlib.crc32(os.fsencode(absolute), index.fingerprint())}
    file = FeatureFile(args.output_dir, name, index, describe(args, model) | rows, shape)
    chunks = on_main(file.open)
    if chunks is None:
        return print0(f"{file.path} is complete")
    if len(chunks) < len(file.chunks):
        print0(f"{name}: going on with {len(chunks)} of {len(file.chunks)} parts")
    own = [row for chunk in chunks[rank() :: world_size()] for row in file.rows(chunk)]
    options = flags.clip_options(args) | {"num_clips": args.num_clips, "num_crops": args.num_crops}
    loader = VideoLoader(Kinetics(index, "test", **options), 1, args.num_workers, 1.0, device, own)
    log = RunLog("", args.print_freq, device)
    for _, batch in log.every(loader, name, views * world_size()):
        row, errors, made = int(batch.row), list(batch.errors[0].values()), None
        if not errors:
            made = encode(model, batch.clips[0], index.path(row), device, args)
        file.add(row, made, errors)
    barrier()
    print0(on_main(partial(file.merge, classes)))


def extract_windows(
    args: argparse.Namespace, model: Encoder, name: str, index: VideoIndex, device: torch.device
) -> None:
    """Write the features of windows over each video to OUTPUT_DIR/windows/NAME; see extract."""
    folder, names = os.path.join(args.output_dir, "windows", name), window_names(index)
    paths = {row: os.path.join(folder, f"{stem}.npz") for row, stem in names.items()}
    arguments = describe(args, model)

    def list_missing() -> list[int]:
        make_dirs(folder)
        check_folder(args.output_dir, name, arguments)
        there = [row for row, path in paths.items() if os.path.exists(path)]
        for row in there:
            other, label = (str(x) for x in read_npz(paths[row], "path", "label"))
            if (other, label) != (path_to_text(index.path(row)), str(index.labels[row])):
                made = f"{paths[row]} was made of {other} with label {label}"
                raise UserError(f"{made}: give another --output_dir")
        return sorted(paths.keys() - there)

    missing = on_main(list_missing)
    print0(f"{name}: windows of {len(missing)} videos; {len(paths) - len(missing)} are there")

    # Start the workers; each reads whole videos.
    rows = missing[rank() :: world_size()]
    dataset = Kinetics(index, "test", **flags.clip_options(args))
    workers = default_num_workers() if args.num_workers is None else args.num_workers
    reader = WindowReader(dataset, rows, args.window_stride, args.batch_size)
    with signals_blocked(), child_signal_kept():
        batches = iter(make_loader(reader, workers))

    # Encode windows as they come, and write those of a video after its last.
    start, share, errors, count = time.perf_counter(), dict.fromkeys(rows, 0.0), [], 0
    made: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {row: [] for row in rows}
    for step, windows in enumerate(batches):
        row, path = windows.row, index.path(windows.row)
        share[row] = windows.share
        if windows.error:
            made.pop(row)
            errors.append(windows.error)
            continue
        clips = torch.from_numpy(windows.clips)
        count += len(clips)
        made[row].append((encode(model, clips, path, device, args)[0], windows.times))
        if windows.share == 1:
            features, times = map(np.concatenate, zip(*made.pop(row), strict=True))
            arrays = {"features": features, "times": times, "path": path_to_text(path),
                      "label": index.labels[row], "arguments": json.dumps(arguments)}  # fmt: skip
            write_atomically(paths[row], lambda file, arrays=arrays: np.savez(file, **arrays))
        if (step + 1) % args.print_freq == 0:
            done, seconds = sum(share.values()), time.perf_counter() - start
            eta = timedelta(seconds=int(seconds * (len(rows) / done - 1)))
            line = f"{name}  [{done:.1f}/{len(rows)} videos]  eta {eta}"
            print0(f"{line}  windows/s {count / seconds:.1f}")

    unreadable = [error for errors in gather_objects(errors) for error in errors]
    print0(f"{folder}: windows of {count_videos(index, len(paths) - len(unreadable), unreadable)}")


def main(args: argparse.Namespace) -> None:
    """Build data and model, and write the features of every split."""
    device = run.start(args, lock=".lock_features")
    indices = open_indices(args)
    model = build_model(args)
    if args.dry_run:
        model.forward = partial(model.encode_features, layer=args.layer)  # what is counted
        return print_flops(model, args)
    model.to(device)
    print0(f"{args.finetune}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    for name, (index, classes) in indices.items():
        if args.window_stride:
            extract_windows(args, model, name, index, device)
        else:
            extract(args, model, name, index, classes, device)


if __name__ == "__main__":
    run.run(main, parse_args)
