"""Fine-tune a classifier from pre-trained weights, or train one from scratch.

    python main_finetune.py --path_to_data_dir /data/k400 --finetune pretrained.pth
    torchrun --nproc_per_node 8 main_finetune.py ...

The same command resumes from the newest checkpoint of --output_dir. See FINETUNE.md.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import args as flags
from util import run
from util.checkpoint import Checkpoints, load_latest
from util.classes import count_classes, read_classes, same_classes, some_names, warn_of_one
from util.dist import print0, seed_step
from util.dry_run import print_flops, print_step
from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader
from util.lr_sched import effective_lr
from util.meters import RunLog, last_x, open_log
from util.optim import (
    NonFiniteError,
    WeightAverage,
    make_optimizer,
    make_scaler,
    param_groups_lrd,
    prepare_model,
)
from util.synthetic import data_dir, synthetic_recipe
from util.time_loader import time_loader
from util.video.mixup import Mixup
from util.video.rand_augment import RandAugment, parse_config
from util.visualize import show_validation
from util.weights import MODEL_FLAGS, apply_weights, checkpoint_flags, has_head_for, read_weights


def get_args_parser() -> flags.Parser:
    """Build the flags; their defaults are the recipe for ViT-L on Kinetics-400."""
    parser = flags.Parser("Fine-tuning of a video classifier")
    flags.add_data_args(parser, jitter_scales=(0.08, 1.0))
    flags.add_model_args(parser, list(models_vit.MODELS), "vit_large_patch16", classifier=True)
    add = flags.adder(parser, "augmentation and regularisation")
    add("--dropout", 0.3, "dropout probability before the head", flags.share)
    add("--drop_path_rate", 0.2, "drop-path probability of the last block", flags.share)
    add("--rand_aug", True, "apply RandAugment and random erasing")
    add("--aa", "rand-m7-mstd0.5-inc1", "RandAugment policy in timm's notation")
    add("--reprob", 0.25, "probability of random erasing; 0 with --no-rand_aug", flags.share)
    add("--smoothing", 0.1, "label smoothing", flags.share)
    add("--mixup", 0.8, "mixup alpha; 0: no mixup", flags.natural_float)
    add("--cutmix", 1.0, "cutmix alpha; 0: no cutmix", flags.natural_float)
    side = "smallest and largest side of the cutmix box, as a share of the clip's"
    add("--cutmix_minmax", None, side, flags.share, action=flags.Range, nargs=2)
    add("--mixup_prob", 1.0, "probability of mixing a batch at all", flags.share)
    add("--mixup_switch_prob", 0.5, "probability of cutmix instead of mixup", flags.share)
    text = "share of patches left out for speed; falls to 0 by a cosine, in steps of 0.01"
    add("--mask_ratio", 0.0, text, flags.share_below_1)
    flags.add_optim_args(parser)
    add = flags.adder(parser)
    text = "freeze patch embedding, positions and the first N blocks; if these are all, also the "
    add("--freeze", 0, text + "norm: only the head learns", flags.up_to_1000, metavar="N")
    text = "decay of a moving average of the weights, validated and saved beside them; 0: none"
    add("--model_ema", 0.0, text, flags.share_below_1, metavar="DECAY")
    text = "learning rate of a layer relative to the next"
    add("--layer_decay", 0.75, text, flags.positive_float)
    flags.add_checkpoint_args(parser)
    text = "checkpoint of the encoder to start from, also from other projects: path, address or "
    add("--finetune", "", text + "released name (k400/vit_large); empty: train from scratch")
    add("--keep_head", False, "keep the head of --finetune if it has the same number of classes")
    add("--allow_missing", False, "start even if --finetune lacks some of the encoder's weights")
    add("--eval", False, "validate the weights of --resume, then exit")
    add("--use_ema", False, "load the weights' moving average in --finetune or --eval --resume")
    flags.add_run_args(parser, output_dir="./output/finetune")
    parser.set_defaults(repeat_aug=2, epochs=50, warmup_epochs=5)
    parser.set_defaults(blr=2.4e-3, min_lr=1e-5, clip_grad=5.0)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    add_args: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Parse flags; without --path_to_data_dir, the embedded videos' recipe sets the defaults.

    With --eval, the model's flags default to those of the checkpoint.

    Args:
        add_args: adds a launcher's own flags.
    """
    parser = get_args_parser()
    add_args(parser)
    recipe = synthetic_recipe("synthetic_finetune.args")

    def default_flags(args: argparse.Namespace) -> Sequence[str]:
        if not (args.eval and args.resume):
            return recipe(args)
        names = ("model", *MODEL_FLAGS)
        return [*recipe(args), *checkpoint_flags(args.resume, names, args.use_ema)]

    args = flags.parse(parser, argv, default_flags)
    if args.use_ema and not (args.finetune or args.eval):
        raise UserError("--use_ema needs --finetune, or --eval with --resume")
    if args.freeze and not (args.finetune or args.resume):
        raise UserError("--freeze needs --finetune: frozen random weights would never learn")
    args.reprob *= args.rand_aug
    if args.rand_aug:
        parse_config(args.aa)  # refuse a wrong one before a job is queued
    return args


def make_mixup(args: argparse.Namespace) -> Mixup | None:
    """Build mixup and cutmix for the clips of a batch; return None if both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        num_classes=args.num_classes,
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        smoothing=args.smoothing,
    )


def build_model(args: argparse.Namespace) -> models_vit.VisionTransformer:
    """Build the classifier that the flags describe, with fresh weights drawn from --seed."""
    seed_step(args.seed)
    with run.usage_errors():
        model = models_vit.MODELS[args.model](
            num_frames=args.num_frames,
            t_patch_size=args.t_patch_size,
            img_size=args.input_size,
            num_classes=args.num_classes,
            no_qkv_bias=args.no_qkv_bias,
            dropout=args.dropout,
            sep_pos_embed=args.sep_pos_embed,
            cls_embed=args.cls_embed,
            drop_path_rate=args.drop_path_rate,
            sincos_pos_embed=args.sincos_pos_embed,
            pool=args.pool,
        )
        model.check_mask_ratio(args.mask_ratio)
        if args.freeze:
            model.freeze(args.freeze)
    return model


def open_train(args: argparse.Namespace, folder: str, device: torch.device) -> VideoLoader:
    """Open the training videos: repeat_aug augmentations of a random clip of each."""
    index = VideoIndex(os.path.join(folder, "train.csv"), args.path_prefix, args.num_classes)
    dataset = Kinetics(
        index,
        "finetune",
        **flags.clip_options(args, training=True),
        rand_augment=RandAugment(args.aa) if args.rand_aug else None,
        reprob=args.reprob,
    )
    highest = int(index.labels.max())
    if highest + 1 < args.num_classes:
        print0(f"WARNING: {args.num_classes} classes, but the largest label is {highest}")
    return VideoLoader(dataset, args.batch_size, args.num_workers, args.max_bad_share, device)


def open_val(
    args: argparse.Namespace, folder: str, device: torch.device, num_classes: int
) -> VideoLoader:
    """Open the validation videos: a centre view of each, as many clips per batch as in training."""
    index = VideoIndex(os.path.join(folder, "val.csv"), args.path_prefix, num_classes)
    dataset = Kinetics(index, "test", **flags.clip_options(args))
    batch_size = args.batch_size * args.repeat_aug
    return VideoLoader(dataset, batch_size, args.num_workers, args.max_bad_share, device)


def validate(args: argparse.Namespace, device: torch.device) -> None:
    """Print the accuracy of the weights of --resume on the validation videos (--eval)."""
    if not args.resume:
        raise UserError("--eval needs weights: give --resume CHECKPOINT")
    folder = data_dir(args, "finetune")
    weights, found = read_weights(args.resume, args.use_ema), read_classes(folder)
    if args.num_classes is None:
        raise weights.lacks("head", "fine-tune it first")
    loader = open_val(args, folder, device, len(found.names) or args.num_classes)
    loader.dataset.index.match_labels(found, weights.classes, args.num_classes)
    warn_of_one(args.num_classes)
    model = build_model(args)
    if args.dry_run:
        return print_flops(model, args)
    apply_weights(model, weights, keep_head=True)
    model.to(device)
    log = RunLog("", args.print_freq, device)
    val, _ = evaluate(model, loader, device, args.precision, args.num_classes, log)
    print_validation(val)


def print_validation(val: dict[str, float], more: str = "", what: str = "validation") -> None:
    """Print the statistics that evaluate returns, in one line."""
    unreadable = f"  unreadable {val['bad']}" if val["bad"] else ""
    not_finite = f"  not numbers {val['not_finite']}" if val["not_finite"] else ""
    print0(
        f"{what}: top-1 {val['acc1']:.2f} %  top-5 {val['acc5']:.2f} %  "
        f"loss {val['loss']:.4f}{unreadable}{not_finite}{more}"
    )


def load_pretrained(
    model: models_vit.VisionTransformer, args: argparse.Namespace, names: list[str]
) -> list[str]:
    """Load the encoder of --finetune; draw a small head unless --keep_head finds one that fits.

    Return the names of the classes: those given or, if there are none, those of the head kept.
    """
    weights = read_weights(args.finetune, args.use_ema)
    keep_head = args.keep_head and has_head_for(weights, model)
    if keep_head and not same_classes(names, weights.classes):
        raise UserError(
            f"--keep_head: the head of {args.finetune} has other classes, or another order, than "
            f"classes.txt: {some_names(weights.classes)}; leave the flag out"
        )
    apply_weights(model, weights, keep_head, args.allow_missing)
    for name in ("sampling", "sampling_rate"):
        theirs, ours = weights.flags.get(name), getattr(args, name)
        if theirs not in (ours, None):
            print0(f"WARNING: {args.finetune} has seen clips of --{name} {theirs}, not {ours}")
    if not keep_head:
        torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return names or (weights.classes if keep_head else [])


def validate_epoch(
    model: torch.nn.Module,
    loader: VideoLoader,
    device: torch.device,
    checkpoints: Checkpoints,
    log: RunLog,
    args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Validate the weights ("val") and their moving average ("val_ema"), if there is one.

    Return the statistics of each, and show them in TensorBoard. A signal ends the process.
    """
    checkpoints.before_validation()
    stop = checkpoints.interruption.after_step
    options = loader, device, args.precision, args.num_classes, log, stop
    val, counts = evaluate(model, *options)
    checkpoints.exit_if_stopped()
    x = last_x(checkpoints.progress.epoch, args.repeat_aug)
    show_validation(val, counts, checkpoints.classes, log, x)
    for name in ("acc1", "loss"):  # HParams shows five metrics: the first in alphabetical order
        log.scalar(f"epoch/val_{name}", val[name], x)
    results = {"val": val}
    if checkpoints.ema is not None:
        results["val_ema"], _ = evaluate(checkpoints.ema.module, *options)
        checkpoints.exit_if_stopped()
        for name, value in results["val_ema"].items():
            log.scalar(f"val_ema/{name}", value, x)
    log.flush()
    return results


def main(args: argparse.Namespace) -> None:
    """Build data, model and optimiser in this order, then train and validate."""
    device = run.start(args)
    if args.eval:
        return validate(args, device)

    # Data.
    folder = data_dir(args, "finetune")
    found = read_classes(folder)
    class_names, args.num_classes = found.names, count_classes(found, args.num_classes)
    train_loader = open_train(args, folder, device)
    if args.time_loader:
        return time_loader(train_loader.dataset, args)
    train_set, mixup = train_loader.dataset, make_mixup(args)
    val_loader = open_val(args, folder, device, args.num_classes)
    print0(f"{len(train_set)} videos to train on, {len(val_loader.dataset)} to validate on")

    # Model. --finetune is not read if a checkpoint of this run will replace the weights anyway.
    with torch.device("meta" if args.dry_run and not args.finetune else "cpu"):
        model = build_model(args)  # a dry run needs no weights of its own
    latest = None if args.dry_run else load_latest(args)
    if args.finetune and not latest:
        class_names = load_pretrained(model, args, class_names)
    print0(f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # Learning rate: unlike in pre-training, the published recipes count the repeated clips.
    args.lr = effective_lr(args, "clips", len(train_set))
    if args.dry_run:
        train_set.index.refuse_missing()
        return print_step(model, args, torch.float32)

    # Optimiser: earlier layers get a smaller learning rate.
    model.to(device)
    groups = param_groups_lrd(model, len(model.blocks), args.weight_decay, args.layer_decay)
    optimizer = make_optimizer(groups, args.beta, device)
    scaler = make_scaler(device, args.precision)
    ema = WeightAverage(model, args.model_ema, optimizer) if args.model_ema else None

    # Resume from the newest checkpoint, if there is one.
    fingerprint = train_set.index.fingerprint()
    checkpoints = Checkpoints(args, model, optimizer, scaler, fingerprint, class_names, ema)
    if latest:
        checkpoints.resume(*latest)
        del latest  # frees its memory
    progress = checkpoints.progress

    # Open the logs; compile the model and wrap it for several ranks.
    log = open_log(args, device, progress, len(train_loader), flags.compared(args))
    ddp_model = prepare_model(model, device, args.compile, args.grad_checkpointing)

    # Train.
    started = time.time()
    while progress.epoch < args.epochs:
        try:
            stats = train_one_epoch(
                ddp_model, mixup, train_loader, optimizer, scaler, device, checkpoints, log, args
            )
        except NonFiniteError as error:
            raise checkpoints.bad_step_report(error, train_set.index) from error
        checkpoints.exit_if_stopped()  # after a signal: save and exit

        # Validate, then write log.txt and a checkpoint.
        results = validate_epoch(model, val_loader, device, checkpoints, log, args)
        record = {"epoch": progress.epoch}
        for kind, values in {"train": stats, **results}.items():
            record |= {f"{kind}_{name}": value for name, value in values.items()}
        checkpoints.finish_epoch(record, len(train_loader), metric="val_acc1")
        best = f"{progress.best('val_acc1'):.2f} % (checkpoint-{progress.best_epoch:05d}.pth)"
        best = best if args.output_dir else f"{progress.best('val_acc1'):.2f} %"
        print_validation(results["val"], f"  best top-1 {best}")
        if "val_ema" in results:
            print_validation(results["val_ema"], what="moving average")
    checkpoints.close()
    log.close()
    print0(f"training time {timedelta(seconds=int(time.time() - started))}")


if __name__ == "__main__":
    run.run(main, parse_args)
