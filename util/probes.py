"""How much frozen features know: nearest neighbours, a linear layer, attention over tokens.

A probe is tried with several settings at once. Validation chooses one of them; of equally good ones
it takes the first, which is the smallest. The views of a video are joined before: their features
are averaged (for neighbours after each is scaled to length 1), and their tokens stand side by side.

Shapes: V videos, N of them in a batch, D width, L tokens of a view, C classes, S settings, H heads.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from util.args import clip_options
from util.dist import gather_objects, is_main, print0, world_size
from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader
from util.lr_sched import learning_rate, set_learning_rate
from util.meters import is_vis_epoch, last_x
from util.optim import autocast
from util.video.transforms import channels_first

if TYPE_CHECKING:
    from util.meters import RunLog

NEIGHBOURS = (1, 5, 10, 20)
CURVE_K = 5  # neighbours that vote during pre-training
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO
LINEAR_RATES = tuple(10 ** (i / 3 - 4) for i in range(13))  # 0.0001 to 1
ATTENTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
HELD_OUT = 0.2  # share of every class of train that validates if there is no other validation
EPOCHS, WARMUP = 20, 0.05  # of the trained probes; the warm-up is a share of all updates
LEVEL = 0.01  # probability that guessing passes for more
NO_BETTER = ", no better than guessing"  # what is said of a number that is_chance


@dataclass(eq=False)
class Split:
    """Features of labelled videos. Tokens may be memory-mapped: they are read by batches."""

    features: Tensor  # float32 [V, views, D]
    labels: Tensor  # int64 [V], -1: none
    tokens: np.ndarray | None = None  # float32 or float16 [., views, L, D]
    rows: Tensor | None = None  # int64 [V], where a video's tokens are; None: in order

    def read_tokens(self, numbers: Tensor) -> Tensor:
        """Read the tokens of videos by their numbers int64 [N]: float32 [N, views * L, D]."""
        assert self.tokens is not None
        rows = numbers if self.rows is None else self.rows[numbers]
        return torch.from_numpy(self.tokens[rows.numpy()]).float().flatten(1, 2)


Splits = dict[str, Split]  # "train", "val" and, maybe, "test"


class Result(NamedTuple):
    """How many videos a probe gets right with every setting."""

    setting: str  # what varies: k or lr
    values: Sequence[float]  # [S]
    right: dict[str, list[int]]  # of each split, [S]

    @property
    def best(self) -> int:
        """The setting that gets most of val right; of equals, the first."""
        return int(np.argmax(self.right["val"]))


# --- splits -------------------------------------------------------------------------------------


def refuse(is_wrong: bool, problem: str) -> None:
    """Raise UserError if something is wrong."""
    if is_wrong:
        raise UserError(problem)


def prepare(splits: Splits, device: torch.device, seed: int = 0) -> Splits:
    """Return train, val and maybe test on a device, with the labels 0, 1, ... of their classes.

    Without a labelled val, a part of train validates (see hold_out).
    A video of val or test whose class train lacks stays, and counts as wrong.

    Raises:
        UserError: labels are missing, features not finite, or train has less than two classes.
    """
    used = {}
    for name, split in splits.items():
        videos, unlabelled = len(split.labels), int((split.labels < 0).sum())
        if name != "train" and videos == unlabelled:
            print0(f"{name} is not used: it has no labels")
            continue
        refuse(unlabelled > 0, f"{unlabelled} of {videos} videos of {name} have no label")
        odd = int((~split.features.isfinite().flatten(1).all(dim=1)).sum())
        refuse(odd > 0, f"features of {odd} of {videos} videos of {name} are not finite")
        used[name] = split
    refuse(len(used["train"].labels.unique()) < 2, "train has less than two classes to tell apart")
    if "val" not in used:
        used["train"], used["val"] = hold_out(used["train"], seed)
    classes = torch.cat([split.labels for split in used.values()]).unique()
    for name, split in used.items():
        if unknown := int((~torch.isin(split.labels, used["train"].labels)).sum()):
            lacks = f"train lacks the classes of {unknown} videos of {name}"
            print0(f"WARNING: {lacks}, which count as wrong")
        features, labels = split.features, torch.searchsorted(classes, split.labels)
        used[name] = Split(features.to(device), labels.to(device), split.tokens, split.rows)
    return used


def hold_out(train: Split, seed: int) -> tuple[Split, Split]:
    """Divide train into a part to learn from and a share of every class to validate.

    Raises:
        UserError: no class has two videos.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for label in train.labels.unique():
        videos = (train.labels == label).nonzero().flatten()
        videos = videos[torch.randperm(len(videos), generator=generator)]
        held[videos[: max(1, round(HELD_OUT * len(videos)))] if len(videos) > 1 else []] = True
    refuse(not held.any(), "there is no val, and no class of train has two videos to divide")
    count = f"{int(held.sum())} of {len(held)} videos of train"
    print0(f"without a val, {count} ({100 * HELD_OUT:.0f} % of every class) validate in its place")
    parts = (part.nonzero().flatten() for part in (~held, held))
    learn, val = (Split(train.features[x], train.labels[x], train.tokens, x) for x in parts)
    return learn, val


def guessing(labels: Tensor) -> float:
    """Return the share of the commonest class, which guessing reaches; it is at least 1 / C."""
    return labels.bincount().max().item() / len(labels)


def is_chance(right: int, labels: Tensor, tries: int = 1) -> bool:
    """Return whether guessing gets as many right in over 1 % of cases (one-sided, binomial).

    Args:
        tries: settings that were tried on these videos, of which this is the best.
    """
    p = torch.tensor(guessing(labels), dtype=torch.float64)
    as_good = torch.arange(right, len(labels) + 1, dtype=torch.float64)
    chances = torch.distributions.Binomial(len(labels), p).log_prob(as_good).exp()
    return tries * chances.sum().item() > LEVEL


# --- nearest neighbours -------------------------------------------------------------------------


def directions(features: Tensor) -> Tensor:
    """Average the directions of the views: [V, views, D] -> unit vectors [V, D]."""
    return F.normalize(F.normalize(features, dim=-1).mean(dim=1), dim=-1)


def neighbours_right(
    queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, ks: Sequence[int]
) -> list[int]:
    """Count the queries [V, D] that their k nearest of the bank [., D] classify, for every k.

    A neighbour's vote weighs exp(cosine / TEMPERATURE). If `queries` is `bank`, no video votes for
    itself (leave-one-out).
    """
    right = torch.zeros(len(ks), dtype=torch.int64)
    num_classes = int(bank_labels.max()) + 1
    for numbers in torch.arange(len(queries), device=queries.device).split(1024):
        cosines = queries[numbers] @ bank.T  # (N, V)
        if queries is bank:
            cosines[numbers - numbers[0], numbers] = -torch.inf
        nearest, found = cosines.topk(min(max(ks), len(bank)), dim=1)
        weights = (nearest / TEMPERATURE).exp()
        for i, k in enumerate(ks):
            votes = weights.new_zeros(len(numbers), num_classes)
            votes.scatter_add_(1, bank_labels[found[:, :k]], weights[:, :k])
            right[i] += (votes.argmax(dim=1) == labels[numbers]).sum().cpu()
    return right.tolist()


def knn(splits: Splits) -> Result:
    """Let the nearest training videos vote; for a training video, the others of train."""
    x = {name: directions(split.features) for name, split in splits.items()}
    ks = [k for k in NEIGHBOURS if k <= len(x["train"])]
    bank = x["train"], splits["train"].labels, ks
    right = {name: neighbours_right(x[name], splits[name].labels, *bank) for name in splits}
    return Result("k", ks, right)


# --- trained probes -----------------------------------------------------------------------------


def sweep(
    splits: Splits, heads: Callable[[Tensor], Tensor], optimizer: Optimizer, weights: Tensor,
    read: Callable[[str, Tensor], Tensor], batch_size: int, least: int, seed: int,
) -> dict[str, list[int]]:  # fmt: skip
    """Train S heads on the same batches; count what they get right.

    Args:
        heads: takes what `read` returns; returns logits [N, S, C].
        optimizer: of parameter groups with a peak rate each, `lr_scale`; without: 1.
        weights: of the heads' losses in their sum, float32 [S].
        read: takes the name of a split and numbers of videos.
        least: updates for small sets; larger ones are seen EPOCHS times.
    """
    labels, generator = splits["train"].labels, torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(labels))
    updates = max(EPOCHS * len(labels) // batch_size, least)
    epochs = -(-updates * batch_size // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(epochs)])
    for update, numbers in enumerate(order.split(batch_size)[:updates]):
        set_learning_rate(optimizer, learning_rate(update / updates, 1.0, 0.0, WARMUP, 1))
        logits, y = heads(read("train", numbers)), labels[numbers.to(labels.device)]
        y = y.unsqueeze(1).expand(logits.shape[:2])  # (N, S)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        optimizer.zero_grad()
        (losses.mean(dim=0) @ weights).backward()
        optimizer.step()
    right = {}
    with torch.no_grad():
        for name, split in splits.items():
            batches = torch.arange(len(split.labels)).split(batch_size)
            guesses = torch.cat([heads(read(name, numbers)).argmax(dim=2) for numbers in batches])
            right[name] = (guesses == split.labels.unsqueeze(1)).sum(dim=0).tolist()
    return right


def count_classes(splits: Splits) -> int:
    """Return the number of classes of prepared splits."""
    return 1 + max(int(split.labels.max()) for split in splits.values())


def linear(splits: Splits, seed: int = 0, rates: Sequence[float] = LINEAR_RATES) -> Result:
    """Train linear layers on normalised features by SGD with momentum.

    As in MAE, BatchNorm without affine parameters comes first; here its mean and variance are those
    of all of train, not of batches. The layers start at zero and have no weight decay.
    """
    x = {name: split.features.mean(dim=1) for name, split in splits.items()}  # (V, D)
    variance, mean = torch.var_mean(x["train"], dim=0, correction=0)
    x = {name: (features - mean) * (variance + 1e-6).rsqrt() for name, features in x.items()}
    # One layer holds all: with SGD, a weight of a loss acts as a rate.
    shape = len(rates), count_classes(splits)
    layer = nn.Linear(len(mean), math.prod(shape), device=mean.device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer, weights = SGD(layer.parameters(), momentum=0.9), mean.new_tensor(rates)

    def heads(x: Tensor) -> Tensor:
        return layer(x).unflatten(1, shape)

    def read(name: str, numbers: Tensor) -> Tensor:
        return x[name][numbers.to(mean.device)]

    right = sweep(splits, heads, optimizer, weights, read, batch_size=256, least=500, seed=seed)
    return Result("lr", rates, right)


class AttentiveProbe(nn.Module):
    """Multi-head attention over the tokens of a video; a residual MLP and a linear layer follow.

    Each head has one query, of width D: a projection of the tokens to keys would only turn it. The
    values are projected after the weighted sum, of a vector in place of all tokens.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        H = next(h for h in range(max(dim // 64, 1), 0, -1) if dim % h == 0)
        self.queries = nn.Parameter(0.02 * torch.randn(dim, H))
        self.values = nn.Parameter(torch.randn(H, dim, dim // H) * dim**-0.5)
        mlp = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.proj, self.mlp = nn.Linear(dim, dim), nn.Sequential(*mlp)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [N, C] of normalised tokens [N, L, D]."""
        pooled = (tokens @ self.queries).softmax(dim=1).mT @ tokens  # (N, H, D)
        x = self.proj(torch.einsum("nhd,hdi->nhi", pooled, self.values).flatten(1))
        return self.head(x + self.mlp(x))


def attentive(splits: Splits, seed: int = 0, rates: Sequence[float] = ATTENTIVE_RATES) -> Result:
    """Train attentive probes by AdamW on tokens, read by batches and normalised by LayerNorm."""
    features = splits["train"].features
    D, device = features.shape[-1], features.device
    models = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        for _ in rates:  # all start alike
            torch.manual_seed(seed)
            models.append(AttentiveProbe(D, count_classes(splits)))
    groups = [{"params": model.to(device).parameters(), "lr_scale": rate}
              for model, rate in zip(models, rates, strict=True)]  # fmt: skip
    optimizer, weights = AdamW(groups, weight_decay=0.01), torch.ones(len(rates), device=device)

    def heads(tokens: Tensor) -> Tensor:
        return torch.stack([model(tokens) for model in models], dim=1)

    def read(name: str, numbers: Tensor) -> Tensor:
        return F.layer_norm(splits[name].read_tokens(numbers).to(device), [D])

    right = sweep(splits, heads, optimizer, weights, read, batch_size=32, least=300, seed=seed)
    return Result("lr", rates, right)


# --- during pre-training ------------------------------------------------------------------------


class ProbeCurve:
    """Classify the videos of --probe_csv by their neighbours, epoch after epoch.

    Each video in turn is classified by its CURVE_K nearest among all others. The ranks share the
    videos, one central view of each. Training is not affected: the random state and the model's
    mode stay as they are, and its loader is not used.

    Raises:
        UserError: a video has no label, all are of one class, or no class has two.
    """

    def __init__(self, args: Namespace, device: torch.device):
        self.args, self.device, self.bad = args, device, {}
        if not args.probe_csv:
            return
        index, flag = VideoIndex(args.probe_csv, args.path_prefix), f"--probe_csv {args.probe_csv}"
        refuse(not index.has_labels, f"{flag}: every video needs a label")
        counts = np.unique(index.labels, return_counts=True)[1]
        few = len(counts) < 2 or max(counts) < 2
        refuse(few, f"{flag} needs two classes, and two videos of one")
        if alone := int((counts == 1).sum()):
            print0(f"{flag}: {alone} videos are alone in their class, so they count as wrong")
        self.dataset = Kinetics(index, "test", **clip_options(args))

    @torch.no_grad()
    def measure(
        self, model: Any, epoch: int, log: "RunLog", stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Log the top-1 of the unwrapped model every vis_period epochs and after the last one.

        Return it, or {} in other epochs, on other ranks and if it cannot be measured.

        Args:
            stop: called before every step that all ranks take. When it returns True, on all ranks
                at once, this ends without a result.
        """
        args, device = self.args, self.device
        if not args.probe_csv or not is_vis_epoch(epoch, args):
            return {}
        # This loader's workers and memory last only until the end of this function.
        start, own, videos = time.perf_counter(), [], len(self.dataset)
        loader = VideoLoader(self.dataset, args.batch_size, args.num_workers, 1.0, device)
        loader.bad = self.bad  # report a video only once
        common_steps, training = videos // world_size() // args.batch_size, model.training
        model.eval()
        # Loaders draw a random number. Compiled blocks would be compiled again for these clips.
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            for step, batch in enumerate(loader):
                if step < common_steps and stop():
                    return {}
                clips = channels_first(batch.clips.to(device).flatten(0, 1))
                with autocast(device, args.precision):
                    features, _ = model.encode_features(clips)  # (N, D)
                read = zip(batch.row.tolist(), features.float().cpu(), batch.errors, strict=True)
                own += [(row, feature) for row, feature, errors in read if not errors]
        model.train(training)

        # Every video votes for all others.
        found = dict(item for part in gather_objects(own) for item in part)
        rows = sorted(row for row in found if found[row].isfinite().all())
        if not is_main():
            return {}
        if len(rows) < max(len(found), 2):
            finite = f"{len(rows)} of {videos} videos give finite features"
            print0(f"WARNING: kNN on --probe_csv is not measured: {finite}")
            return {}
        x = directions(torch.stack([found[row] for row in rows]).unsqueeze(1).to(device))
        y = torch.from_numpy(self.dataset.index.labels[rows]).to(device)
        right = neighbours_right(x, y, x, y, [CURVE_K])[0]
        accuracy, seconds = 100 * right / len(y), time.perf_counter() - start
        word = f", chance: {100 * guessing(y):.1f} %{NO_BETTER * is_chance(right, y)}"
        print0(f"kNN on --probe_csv: {accuracy:.1f} %{word} ({seconds:.1f} s)")
        log.scalar("probe/knn_acc1", accuracy, last_x(epoch, args.repeat_aug))
        return {"probe_knn_acc1": accuracy}
