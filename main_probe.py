"""Probe a frozen encoder: nearest neighbours, a linear layer and attention on its features.

    python main_probe.py --path_to_data_dir /data/k400 --finetune checkpoint-00199.pth
    python main_probe.py --features output/features

The first form extracts the features of train.csv, val.csv and test.csv to --output_dir, once; the
second takes those that main_features.py has written. See FEATURES.md.
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import main_features
import models_vit
from util import args as flags
from util import probes, run
from util.classes import same_classes
from util.dist import is_main
from util.dry_run import print_flops
from util.errors import UserError
from util.features import read_npz
from util.file_io import is_remote, write_atomically
from util.weights import checkpoint_flags

PROBES = ("knn", "linear", "attentive")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse flags; the model's flags default to those of the checkpoint."""

    def default_flags(args: argparse.Namespace) -> list[str]:
        if bool(args.finetune) == bool(args.features):
            raise UserError("main_probe.py needs either --finetune CHECKPOINT or --features FOLDER")
        return checkpoint_flags(args.finetune, use_ema=args.use_ema) if args.finetune else []

    parser = flags.Parser("Probes of a frozen encoder")
    flags.add_data_args(parser)
    flags.add_model_args(parser, ["", *models_vit.MODELS], "", classifier=True)
    main_features.add_feature_args(parser)
    add = flags.adder(parser, "probes")
    add("--features", "", "folder that main_features.py has written, in place of --finetune")
    text = "which probes; not given: all, but attentive only where --features has tokens"
    add("--probes", None, text, nargs="+", choices=PROBES)
    add("--seed", 0, "seed of the probes", flags.natural_int)
    flags.add_run_args(parser, output_dir="./output/probe", training=False)
    parser.set_defaults(videos=None, splits=None)
    args = flags.parse(parser, argv, default_flags)
    args.tokens |= "attentive" in (args.probes or PROBES)
    if args.features and args.path_to_data_dir:
        raise UserError("give --features or --path_to_data_dir, not both")
    if not args.features and (not args.output_dir or is_remote(args.output_dir)):
        raise UserError("--output_dir must be a folder on this machine")
    return args


def read_splits(folder: str) -> tuple[probes.Splits, dict[str, Any]]:
    """Read what main_features.py has written; return also its arguments.

    Raises:
        UserError: there is no train.npz, or the files are damaged or of different encoders.
    """
    splits, names, told, listed = {}, [], {}, {}
    for name in main_features.SPLITS:
        path, tokens = (os.path.join(folder, name + end) for end in (".npz", ".tokens.npy"))
        if not os.path.exists(path):
            continue
        keys = "features", "labels", "classes", "arguments", "unreadable", "paths"
        features, labels, classes, arguments, unreadable, paths = read_npz(path, *keys)
        listed[name] = paths.tolist()
        if name == "test" and listed["test"] == listed.get("val"):
            print("test repeats val, which chooses the settings: it is no test")
            continue
        told[name] = json.loads(str(arguments))
        first = next(iter(told.values()))
        for key in first.keys() - {"checkpoint", "csv", "index"}:
            if told[name].get(key) != first[key]:
                raise UserError(f"{path} differs from the other splits in {key}: extract it again")
        if not same_classes(names, classes.tolist()):
            raise UserError(f"{path} has other classes than the other splits")
        names = names or classes.tolist()
        if len(unreadable):
            print(f"{name}: {len(unreadable)} unreadable videos are left out")
        has_tokens = first["tokens"] and os.path.exists(tokens)  # not those of an earlier run
        array = np.load(tokens, mmap_mode="r") if has_tokens else None
        splits[name] = probes.Split(torch.from_numpy(features), torch.from_numpy(labels), array)
    if "train" not in splits:
        raise UserError(f"{folder} has no train.npz: a probe learns from the features of train")
    return splits, told


def run_probes(args: argparse.Namespace, folder: str, device: torch.device) -> None:
    """Run the probes on the features in a folder; print a table, write all numbers."""
    splits, arguments = read_splits(folder)
    splits = probes.prepare(splits, device, args.seed)
    has_tokens = all(split.tokens is not None for split in splits.values())
    chosen = args.probes or (PROBES if has_tokens else PROBES[:2])
    if "attentive" in chosen and not has_tokens:
        raise UserError(f"--probes attentive: {folder} lacks tokens (main_features.py --tokens)")
    if args.dry_run:
        return

    # Each is judged by test, or by val, of which it has seen the best, if there is no test.
    judge, found = "test" if "test" in splits else "val", []
    videos = {name: len(split.labels) for name, split in splits.items()}
    chance = {name: 100 * probes.guessing(split.labels) for name, split in splits.items()}
    print(f"{'top-1':10} {'chosen':10}" + "".join(f"{x:>10}" for x in (*splits, "chance")))
    for name in (x for x in PROBES if x in chosen):
        more = () if name == "knn" else (args.seed,)
        result: probes.Result = getattr(probes, name)(splits, *more)
        best, tries = result.best, 1 if judge == "test" else len(result.values)
        is_chance = probes.is_chance(result.right[judge][best], splits[judge].labels, tries)
        top1 = {x: [100 * n / videos[x] for n in counts] for x, counts in result.right.items()}
        shown = *(values[best] for values in top1.values()), chance[judge]
        setting = f"{result.setting} {result.values[best]:.3g}"
        cells = "".join(f"{x:8.1f} %" for x in shown)
        print(f"{name:10} {setting:10}{cells}{probes.NO_BETTER * is_chance}", flush=True)
        one = {"probe": name, **result._asdict(), "best": best, "top1": top1}
        found.append(one | {"is_chance": is_chance})

    if args.output_dir:
        whole = {"probes": found, "chance": chance, "videos": videos}
        text = json.dumps(whole | {"features": arguments, "arguments": vars(args)}, indent=2)
        path = os.path.join(args.output_dir, "probe.json")
        write_atomically(path, lambda file: file.write(text.encode()))


def main(args: argparse.Namespace) -> None:
    """Extract the features on all ranks, unless they are there; probe them on the main one."""
    device = run.start(args, lock=".lock_features")
    folder = args.features or args.output_dir
    if not args.features:
        indices = main_features.open_indices(args)
        model = main_features.build_model(args)
        if args.dry_run:
            model.forward = partial(model.encode_features, layer=args.layer)  # what is counted
            return print_flops(model, args)
        model.to(device)
        for name, (index, classes) in indices.items():
            main_features.extract(args, model, name, index, classes, device)
        del model  # frees its memory
    if is_main():
        run_probes(args, folder, device)


if __name__ == "__main__":
    run.run(main, parse_args)
