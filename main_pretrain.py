"""Pre-train a masked autoencoder on videos.

    python main_pretrain.py --path_to_data_dir /data/k400
    torchrun --nproc_per_node 8 main_pretrain.py --path_to_data_dir /data/k400

The same command resumes from the newest checkpoint of --output_dir. See PRETRAIN.md.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch

import models_mae
from engine_pretrain import train_one_epoch
from util import args as flags
from util import run
from util.checkpoint import Checkpoints, load_latest
from util.dist import print0, seed_step
from util.dry_run import print_step
from util.errors import UserError
from util.formats import DECODER_ARGUMENTS, Weights, is_decoder
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader
from util.lr_sched import effective_lr
from util.masking import MASK_TYPES, num_kept, num_visible, unit_size
from util.meters import last_x, open_log
from util.optim import (
    NonFiniteError,
    make_optimizer,
    make_scaler,
    param_groups_weight_decay,
    prepare_model,
)
from util.probes import ProbeCurve
from util.synthetic import data_dir, synthetic_recipe
from util.targets import NORMALISED, TARGETS
from util.time_loader import time_loader
from util.visualize import FixedClips
from util.weights import apply_weights, read_weights


def get_args_parser() -> flags.Parser:
    """Build the flags; their defaults are the recipe for ViT-L on Kinetics-400."""
    parser = flags.Parser("Masked-autoencoder pre-training on videos")
    flags.add_data_args(parser, jitter_scales=(0.5, 1.0))
    flags.add_model_args(parser, list(models_mae.MODELS), "mae_vit_large_patch16")
    add = flags.adder(parser, "augmentation")
    text = "cut clips at random (--jitter_*), or the square in the middle"
    add("--crop", "random", text, choices=("random", "center"))
    text = "change brightness, contrast and saturation of a clip by factors from 1 - S to 1 + S"
    add("--color_jitter", 0.0, text, flags.share, metavar="S")
    add = flags.adder(parser, "masked autoencoder")
    add("--mask_ratio", 0.9, "share of patches that are removed", flags.share_below_1)
    text = "share at the end of the run, reached along half a cosine; not given: the share stays"
    add("--mask_ratio_end", None, text, flags.share_below_1)
    text = "what to remove: random patches, the same places at all times (tube), time steps, or "
    add("--mask_type", "random", text + "cuboids (block)", choices=MASK_TYPES)
    text = "share of the removed patches that the decoder skips too: faster, but not in the paper"
    add("--decoder_mask_ratio", 0.0, text, flags.share_below_1)
    add("--decoder_embed_dim", 512, "decoder width", flags.small_int)
    add("--decoder_depth", 4, "decoder blocks", flags.up_to_1000)
    add("--decoder_num_heads", 16, "attention heads of a decoder block", flags.small_int)
    add("--norm_pix_loss", True, "predict normalised patches, not pixels; --target replaces it")
    text = "what is predicted: normalised patches, normalised channels (VideoMAE), pixels, "
    text += "histograms of gradients, or the difference to the frame before"
    add("--target", None, text + "; not given: as --norm_pix_loss says", choices=TARGETS)
    add("--pred_t_dim", 8, "frames to predict per clip", flags.small_int)
    add("--trunc_init", False, "draw initial weights from a truncated normal, not Xavier's uniform")
    flags.add_optim_args(parser)
    add = flags.adder(parser)
    add("--bias_wd", False, "apply weight decay to norm weights too")
    flags.add_checkpoint_args(parser)
    text = "checkpoint to continue pre-training from, also from other projects: path, address or "
    add("--finetune", "", text + "released name (k400/vit_large); empty: start from fresh weights")
    add("--use_ema", False, "load the weights' moving average in --finetune")
    flags.add_run_args(parser, output_dir="./output/pretrain")
    text = "epochs between reconstructions of fixed clips in TensorBoard; 0: none"
    add("--vis_period", 10, text, flags.natural_int)
    text = "csv of labelled videos, classified by their neighbours every vis_period epochs"
    add("--probe_csv", "", text + "; empty: none")
    parser.set_defaults(repeat_aug=4, epochs=200, warmup_epochs=30)
    parser.set_defaults(blr=1.6e-3, beta=(0.9, 0.95), clip_grad=0.02)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    add_args: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Parse flags; without --path_to_data_dir, the embedded videos' recipe sets the defaults.

    Args:
        add_args: adds a launcher's own flags.
    """
    parser = get_args_parser()
    add_args(parser)
    default_flags = synthetic_recipe("synthetic_pretrain.args")
    args = flags.parse(parser, argv, default_flags)
    args.target = args.target or ("patch" if args.norm_pix_loss else "pixels")
    if not args.norm_pix_loss and args.target in NORMALISED:
        raise UserError(f"--no-norm_pix_loss and --target {args.target} exclude each other")
    args.norm_pix_loss = args.target in NORMALISED
    for name in ("jitter_scales_relative", "jitter_aspect_relative"):
        if args.crop == "center" and tuple(getattr(args, name)) != parser.get_default(name):
            raise UserError(f"--{name} has no effect with --crop center")
    if args.use_ema and not args.finetune:
        raise UserError("--use_ema needs --finetune")
    if args.probe_csv and not args.vis_period:
        raise UserError("--probe_csv needs a --vis_period above 0")
    return args


def build_model(args: argparse.Namespace) -> models_mae.MaskedAutoencoderViT:
    """Build the autoencoder that the flags describe, with fresh weights drawn from --seed."""
    seed_step(args.seed)
    with run.usage_errors():
        model = models_mae.MODELS[args.model](
            img_size=args.input_size,
            num_frames=args.num_frames,
            t_patch_size=args.t_patch_size,
            decoder_embed_dim=args.decoder_embed_dim,
            decoder_depth=args.decoder_depth,
            decoder_num_heads=args.decoder_num_heads,
            norm_pix_loss=args.norm_pix_loss,
            target=args.target,
            no_qkv_bias=args.no_qkv_bias,
            sep_pos_embed=args.sep_pos_embed,
            trunc_init=args.trunc_init,
            cls_embed=args.cls_embed,
            pred_t_dim=args.pred_t_dim,
            sincos_pos_embed=args.sincos_pos_embed,
        )
        check_masks(model, args)
    return model


def check_masks(model: models_mae.MaskedAutoencoderViT, args: argparse.Namespace) -> None:
    """Raise ValueError for bad mask ratios; say if tubes or time steps keep fewer tokens."""
    grid, L = model.patch_embed.input_size, model.patch_embed.num_patches
    unit = unit_size(grid, args.mask_type)
    units = f"{L // unit} {'places' if args.mask_type == 'tube' else 'time steps'}"
    for flag in ("mask_ratio", "mask_ratio_end"):
        ratio = getattr(args, flag)
        if ratio is None:
            continue
        try:
            models_mae.check_mask_ratio(grid, ratio, args.decoder_mask_ratio, args.mask_type)
        except ValueError as error:
            raise ValueError(f"--{flag} {ratio:g}: {error}") from None
        kept, asked = num_kept(grid, ratio, args.mask_type), num_visible(L, ratio)
        if kept != asked:
            print0(
                f"--mask_type {args.mask_type} keeps {kept // unit} of {units}: "
                f"{kept} of {L} tokens (--{flag} {ratio:g} asks for {asked})"
            )


def decoder_problem(weights: Weights, model: models_mae.MaskedAutoencoderViT) -> str:
    """Return why the decoder of a file cannot go on as that of the model, or an empty string."""
    if not weights.has_decoder:
        return "the file has no decoder"
    skipped = {"decoder_sep_pos_embed", "pred_t_dim"}  # converted; seen in the shapes
    skipped |= {"decoder_num_heads"} - weights.stated  # else only a guess from the width
    names = [k for k in DECODER_ARGUMENTS if k not in skipped]
    pairs = [(k, weights.arguments[k], model.arguments[k]) for k in names]
    for name, tensor in model.state_dict().items():
        if is_decoder(name) and "pos_embed" not in name:  # positions are resized
            theirs = weights.state.get(name)
            shape = "missing" if theirs is None else list(theirs.shape)
            pairs.append((name, shape, list(tensor.shape)))
    return next((f"{k} is {a} in the file and {b} here" for k, a, b in pairs if a != b), "")


def load_pretrained(model: models_mae.MaskedAutoencoderViT, args: argparse.Namespace) -> None:
    """Load the weights of --finetune; a decoder that does not fit the flags stays as drawn."""
    weights = read_weights(args.finetune, args.use_ema)
    problem = decoder_problem(weights, model)
    apply_weights(model, weights, keep_head=False, keep_decoder=not problem)
    if problem:
        print0(f"the decoder starts afresh: {problem}")


def main(args: argparse.Namespace) -> None:
    """Build data, model and optimiser in this order, then train."""
    device = run.start(args)

    # Data: the videos of train.csv, repeat_aug random clips of each.
    index = VideoIndex(os.path.join(data_dir(args, "pretrain"), "train.csv"), args.path_prefix)
    options = flags.clip_options(args, training=True)
    options |= {"crop": args.crop, "color_jitter": args.color_jitter}
    dataset = Kinetics(index, "pretrain", **options)
    if args.time_loader:
        return time_loader(dataset, args)
    loader = VideoLoader(dataset, args.batch_size, args.num_workers, args.max_bad_share, device)
    probe_curve = ProbeCurve(args, device)
    print0(f"{len(index)} videos in {index.csv_path}")

    # Model. --finetune is not read if a checkpoint of this run will replace the weights anyway.
    with torch.device("meta" if args.dry_run and not args.finetune else "cpu"):
        model = build_model(args)  # a dry run needs no weights of its own
    latest = None if args.dry_run else load_latest(args)
    if args.finetune and not latest:
        load_pretrained(model, args)
    print0(f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # Learning rate: the published recipes count videos as the batch, not their repeated clips.
    args.lr = effective_lr(args, "videos", len(index))
    if args.dry_run:
        index.refuse_missing()
        options = {k: getattr(args, k) for k in ("mask_ratio", "decoder_mask_ratio", "mask_type")}
        return print_step(model, args, torch.uint8, **options)

    # Optimiser.
    model.to(device)
    groups = param_groups_weight_decay(model, args.weight_decay, args.bias_wd)
    optimizer = make_optimizer(groups, args.beta, device)
    scaler = make_scaler(device, args.precision)

    # Resume from the newest checkpoint, if there is one.
    checkpoints = Checkpoints(args, model, optimizer, scaler, index.fingerprint())
    if latest:
        checkpoints.resume(*latest)
        del latest  # frees its memory
    progress = checkpoints.progress

    # Open the logs; compile the model and wrap it for several ranks.
    log = open_log(args, device, progress, len(loader), flags.compared(args))
    fixed_clips = FixedClips(Kinetics(index, "test", **flags.clip_options(args)), args, device)
    dynamic = False if args.mask_ratio_end is None else None  # the number of tokens varies
    ddp_model = prepare_model(model, device, args.compile, args.grad_checkpointing, dynamic)

    # Train.
    started = time.time()
    while progress.epoch < args.epochs:
        try:
            stats = train_one_epoch(
                ddp_model, loader, optimizer, scaler, device, checkpoints, log, args
            )
        except NonFiniteError as error:
            raise checkpoints.bad_step_report(error, index) from error
        checkpoints.exit_if_stopped()  # after a signal: save and exit
        stop = checkpoints.interruption.after_step  # a signal also ends the probe
        probed = probe_curve.measure(model, progress.epoch, log, stop)
        checkpoints.exit_if_stopped()

        # Log the epoch and show what the model reconstructs.
        if "loss" in stats:  # with --skip_nonfinite, every step may have been skipped
            log.scalar("epoch/loss", stats["loss"], last_x(progress.epoch, args.repeat_aug))
        fixed_clips.show(model, progress.epoch, log)
        log.flush()

        # Write log.txt and a checkpoint.
        record = {"epoch": progress.epoch} | {f"train_{k}": v for k, v in stats.items()}
        record |= probed
        checkpoints.finish_epoch(record, len(loader))
    checkpoints.close()
    log.close()
    print0(f"training time {timedelta(seconds=int(time.time() - started))}")


if __name__ == "__main__":
    run.run(main, parse_args)
