"""Plan a run: what limits 1 to 1,024 GPUs, and the hours and cost of every recipe.

    python -m benchmarks.scaling                      the paper's system: 17 clips/s per A100
    python -m benchmarks.scaling --gpu_clips 400 --loader_clips 47 28 --cores 16 --price 2.5

Nothing is measured here. It extrapolates from what benchmarks/step.py and benchmarks/loader.py
print on your machines: clips/s of one GPU (ViT-L pre-training; other models by their FLOPs) and of
one CPU core. Per update, a GPU sends and receives its gradients by a ring all-reduce, 2 (n - 1) / n
times their bytes; what does not fit beside the backward pass, two thirds of the computation, adds
to the step. A run goes as fast as its slowest part.
"""

import argparse
from dataclasses import dataclass

import torch

import main_finetune
import main_pretrain
from models_mae import MODELS as AUTOENCODERS
from models_vit import MODELS as CLASSIFIERS
from util.args import positive_float, positive_int
from util.flops import count_flops
from util.synthetic import ROOT

CLIP = (3, 16, 224, 224)


@dataclass(frozen=True)
class Recipe:
    """A recipe of recipes/*.args and the work in it."""

    name: str
    model: str
    effective_epochs: int  # passes over the videos times clips taken of each
    clips_per_step: int  # of one GPU

    @property
    def is_pretraining(self) -> bool:
        """Tell whether the model is an autoencoder."""
        return self.model in AUTOENCODERS


def read_recipe(name: str) -> Recipe:
    """Read the flags of recipes/NAME.args as the scripts do."""
    script = main_pretrain if name.startswith("pretrain") else main_finetune
    flags = script.parse_args([f"@{ROOT / 'recipes' / name}.args", "--path_to_data_dir", "-"])
    clips = flags.batch_size * flags.repeat_aug
    return Recipe(name, flags.model, flags.epochs * flags.repeat_aug, clips)


TASKS, SIZES = ("pretrain", "finetune"), ("base", "large", "huge")
REFERENCE = "pretrain_vit_large"  # the recipe that --gpu_clips is measured on


@dataclass(frozen=True)
class Work:
    """What a recipe's model costs."""

    gflops: float  # multiply-adds of a clip's forward pass, 1e9
    parameters: int


@dataclass(frozen=True)
class Machine:
    """Measured speeds and prices."""

    gpu_clips: float  # clips/s of a GPU, reference recipe
    pretrain_clips: float  # clips/s of a core that loads
    finetune_clips: float
    cores: int  # per GPU
    node_gpus: int
    node_link: float  # bytes/s of a GPU to others of its node
    link: float  # bytes/s of a GPU to those of other nodes
    gradient_bytes: int  # per parameter


@dataclass(frozen=True)
class Speed:
    """Clips/s of a whole run, by what would limit it alone."""

    gpu: float
    loader: float
    network: float  # GPU and what of the network does not fit beside the backward pass

    @property
    def clips(self) -> float:
        """Clips/s that come out."""
        return min(self.loader, self.network)

    @property
    def limit(self) -> str:
        """What to improve first."""
        if self.loader < self.network:
            return "loader"
        return "network" if self.network < 0.95 * self.gpu else "GPU"


def work(recipe: Recipe) -> Work:
    """Count a recipe's FLOPs and parameters; nothing is computed."""
    with torch.device("meta"):
        model = (AUTOENCODERS | CLASSIFIERS)[recipe.model]()
    parameters = sum(p.numel() for p in model.parameters())
    return Work(count_flops(model, CLIP), parameters)


def speed(recipe: Recipe, own: Work, reference: Work, machine: Machine, gpus: int) -> Speed:
    """Return how fast a number of GPUs goes through a recipe."""
    gpu_clips = machine.gpu_clips * reference.gflops / own.gflops
    step = recipe.clips_per_step / gpu_clips  # seconds
    link = machine.node_link if gpus <= machine.node_gpus else machine.link
    exchange = 2 * (gpus - 1) / gpus * own.parameters * machine.gradient_bytes / link
    exposed = max(0.0, exchange - 2 / 3 * step)
    per_core = machine.pretrain_clips if recipe.is_pretraining else machine.finetune_clips
    return Speed(
        gpus * gpu_clips,
        gpus * machine.cores * per_core,
        gpus * recipe.clips_per_step / (step + exposed),
    )


def main(argv: list[str] | None = None) -> None:
    """Print a table per recipe."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--gpu_clips", type=positive_float, default=17.0,
        help="clips/s of one GPU, ViT-L pre-training at mask 0.9 (benchmarks.step); "
        "the default is the paper's A100",
    )  # fmt: skip
    add(
        "--loader_clips", type=positive_float, nargs=2, default=(46.0, 28.0),
        metavar=("PRETRAIN", "FINETUNE"),
        help="clips/s of one core (benchmarks.loader); the default is 256-pixel H.264 on one core "
        "of an AMD EPYC",
    )  # fmt: skip
    add("--cores", type=positive_int, default=10, help="CPU cores per GPU that load videos")
    add("--node_gpus", type=positive_int, default=8, help="GPUs of a machine")
    add("--node_link", type=positive_float, default=200.0, help="GB/s of a GPU within its machine")
    add("--link", type=positive_float, default=12.5, help="GB/s of a GPU to other machines")
    add("--gradient_bytes", type=positive_int, default=4, help="per parameter: 4, as DDP sends")
    add("--videos", type=positive_int, default=240_000, help="of the training set")
    add("--price", type=positive_float, default=None, help="of a GPU for an hour")
    add("--max_gpus", type=positive_int, default=1024)
    args = parser.parse_args(argv)
    pretrain_clips, finetune_clips = args.loader_clips
    machine = Machine(
        gpu_clips=args.gpu_clips,
        pretrain_clips=pretrain_clips,
        finetune_clips=finetune_clips,
        cores=args.cores,
        node_gpus=args.node_gpus,
        node_link=1e9 * args.node_link,
        link=1e9 * args.link,
        gradient_bytes=args.gradient_bytes,
    )

    recipes = [read_recipe(f"{task}_vit_{size}") for task in TASKS for size in SIZES]
    works = {recipe.name: work(recipe) for recipe in recipes}
    reference = works[REFERENCE]
    for recipe in recipes:
        own = works[recipe.name]
        clips = args.videos * recipe.effective_epochs
        print(
            f"{recipe.name}: {own.gflops:.0f} GFLOPs per clip, {own.parameters / 1e6:.0f} M "
            f"parameters, {args.videos} videos x {recipe.effective_epochs} effective epochs"
        )
        print("    GPUs   clips/s of: GPUs     loader    network    limit      hours  GPU hours")
        gpus = 1
        while gpus <= args.max_gpus:
            s = speed(recipe, own, reference, machine, gpus)
            hours = clips / s.clips / 3600
            cost = f"  cost {gpus * hours * args.price:,.0f}" if args.price else ""
            print(
                f"  {gpus:6}  {s.gpu:15.0f} {s.loader:10.0f} {s.network:10.0f}    {s.limit:<7}"
                f"{hours:9.1f} {gpus * hours:10.0f}{cost}"
            )
            gpus *= 2


if __name__ == "__main__":
    main()
