"""Plan a run: what limits it on 1 to 1,024 GPUs, and the hours and cost of every recipe.

    python -m benchmarks.scaling                      H200s (--compile, 128 clips per step)
    python -m benchmarks.scaling --gpu_clips 17       the paper's system of A100s
    python -m benchmarks.scaling --gpu_clips 400 --loader_clips 47 28 --cores 16 --price 2.5

Take the clips/s from benchmarks/step.py (ViT-L pre-training, 90 % masked; other models scale by
their FLOPs) and benchmarks/loader.py (one core; default: 256-pixel H.264 on an AMD EPYC). Ring
all-reduces of the gradients, 2 (n - 1) / n times their bytes, overlap with the backward pass, two
thirds of the computation; the rest makes steps longer. The slowest part sets the speed of the run.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from typing import NamedTuple

import torch

import main_finetune
import main_pretrain
from models_mae import MODELS as AUTOENCODERS
from models_vit import MODELS as CLASSIFIERS
from util.args import adder, positive_float, positive_int
from util.dry_run import count_flops
from util.synthetic import ROOT

RECIPES = [f"{t}_vit_{s}" for t in ("pretrain", "finetune") for s in ("base", "large", "huge")]


class Recipe(NamedTuple):  # the work in a recipe of recipes/*.args
    name: str
    effective_epochs: int  # epochs times the clips taken of each video
    clips_per_step: int  # of one GPU
    gflops: float  # multiply-adds of a clip's forward pass, 1e9
    parameters: int


class Speed(NamedTuple):  # clips/s of a whole run, if one part alone limited it
    gpu: float
    loader: float
    network: float  # GPUs that also wait for the network
    limit: str  # the part to improve first


def read_recipe(name: str) -> Recipe:
    """Read recipes/NAME.args as the scripts do; count FLOPs and parameters of its model."""
    script = main_pretrain if name.startswith("pretrain") else main_finetune
    flags = script.parse_args([f"@{ROOT / 'recipes' / name}.args", "--path_to_data_dir", "-"])
    with torch.device("meta"):  # computes nothing
        model = (AUTOENCODERS | CLASSIFIERS)[flags.model]()
    parameters = sum(p.numel() for p in model.parameters())
    clips = flags.batch_size * flags.repeat_aug
    gflops = count_flops(model, (3, 16, 224, 224))
    return Recipe(name, flags.epochs * flags.repeat_aug, clips, gflops, parameters)


def speed(recipe: Recipe, reference_gflops: float, machine: Namespace, gpus: int) -> Speed:
    """Return how fast so many GPUs go through a recipe; `machine` has the flags below."""
    gpu_clips = machine.gpu_clips * reference_gflops / recipe.gflops
    step = recipe.clips_per_step / gpu_clips  # seconds
    link = machine.node_link if gpus <= machine.node_gpus else machine.link
    sent = 2 * (gpus - 1) / gpus * recipe.parameters * machine.gradient_bytes
    exposed = max(0.0, sent / (1e9 * link) - 2 / 3 * step)
    gpu, network = gpus * gpu_clips, gpus * recipe.clips_per_step / (step + exposed)
    loader = gpus * machine.cores * machine.loader_clips[recipe.name.startswith("finetune")]
    limit = "network" if network < 0.95 * gpu else "GPU"
    return Speed(gpu, loader, network, limit="loader" if loader < network else limit)


def get_args_parser() -> ArgumentParser:
    """Build the flags."""
    parser = ArgumentParser(description="Plan a run", formatter_class=ArgumentDefaultsHelpFormatter)
    add = adder(parser)
    kinds = {"nargs": 2, "metavar": ("PRETRAIN", "FINETUNE")}
    add("--gpu_clips", 753.0, "clips/s of one GPU, ViT-L", positive_float)
    add("--loader_clips", (46.0, 28.0), "clips/s of one CPU core", positive_float, **kinds)
    add("--cores", 10, "CPU cores per GPU that load videos", positive_int)
    add("--node_gpus", 8, "GPUs of a machine", positive_int)
    add("--node_link", 200.0, "GB/s of a GPU within its machine", positive_float)
    add("--link", 12.5, "GB/s of a GPU to other machines", positive_float)
    add("--gradient_bytes", 4, "per parameter; DDP sends 4", positive_int)
    add("--videos", 240_000, "videos of the training set", positive_int)
    add("--price", None, "price of one GPU for one hour", positive_float)
    add("--max_gpus", 1024, "last row of a table", positive_int)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print a table per recipe."""
    args = get_args_parser().parse_args(argv)
    recipes = {name: read_recipe(name) for name in RECIPES}
    reference = recipes["pretrain_vit_large"].gflops  # --gpu_clips is about this recipe
    for recipe in recipes.values():
        print(
            f"{recipe.name}: {recipe.gflops:.0f} GFLOPs per clip, {recipe.parameters / 1e6:.0f} M "
            f"parameters, {args.videos} videos x {recipe.effective_epochs} effective epochs"
        )
        print("    GPUs   clips/s of: GPUs     loader    network    limit      hours  GPU hours")
        for gpus in (2**n for n in range(args.max_gpus.bit_length())):
            s = speed(recipe, reference, args, gpus)
            hours = args.videos * recipe.effective_epochs / min(s.loader, s.network) / 3600
            cost = f"  cost {gpus * hours * args.price:,.0f}" if args.price else ""
            print(
                f"  {gpus:6}  {s.gpu:15.0f} {s.loader:10.0f} {s.network:10.0f}    {s.limit:<7}"
                f"{hours:9.1f} {gpus * hours:10.0f}{cost}"
            )


if __name__ == "__main__":
    main()
