"""How much frozen features know: nearest neighbours, a linear layer, attention over tokens.

A probe is tried with several settings at once. Validation chooses one of them; of equally good ones
it takes the first, which is the smallest. The views of a video are joined before: their features
are averaged (for neighbours after each is scaled to length 1), and their tokens stand side by side.

Shapes: V videos, N of them in a batch, D width, L tokens of a view, C classes, S settings, H heads.
"""

import copy
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
from util.lr_sched import learning_rate
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

    probe: str
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


def prepare(splits: Splits, num_classes: int, device: torch.device, seed: int = 0) -> Splits:
    """Return train, val and maybe test on a device; without a labelled val, divide train.

    A video of val or test whose class train lacks stays, and counts as wrong.

    Raises:
        UserError: train has less than two classes, some labels are missing or too large, or
            features are not finite or do not fit those of train.
    """
    refuse("train" not in splits, "there are no features of train, from which a probe learns")
    used, train = {}, splits["train"]
    for name, split in splits.items():
        videos, unlabelled = len(split.labels), int((split.labels < 0).sum())
        if name != "train" and videos == unlabelled:
            print0(f"{name} is not used: it has no {'labels' if videos else 'videos'}")
            continue
        refuse(unlabelled > 0, f"{unlabelled} of {videos} videos of {name} have no label")
        high = split.labels[split.labels >= num_classes].tolist()
        refuse(bool(high), f"{name} has the labels {high[:5]} of {num_classes} classes")
        D, expected = (x.features.shape[-1] for x in (split, train))
        refuse(expected != D, f"features of {name} have the width {D}, those of train {expected}")
        odd = int((~split.features.isfinite().flatten(1).all(dim=1)).sum())
        refuse(odd > 0, f"features of {odd} of {videos} videos of {name} are not finite")
        used[name] = split
    refuse(len(train.labels.unique()) < 2, "train has less than two classes to tell apart")
    if "val" not in used:
        used["train"], used["val"] = hold_out(train, seed)
    for name, split in used.items():
        unknown = int((~torch.isin(split.labels, used["train"].labels)).sum())
        if unknown:
            lacks = f"train lacks the classes of {unknown} videos of {name}"
            print0(f"WARNING: {lacks}, which count as wrong")
        features, labels = split.features.to(device), split.labels.to(device)
        used[name] = Split(features, labels, split.tokens, split.rows)
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


def verdict(right: int, labels: Tensor, tries: int = 1) -> str:
    """Return the share of right answers, and whether guessing gives as much (see is_chance)."""
    share, chance = (f"{100 * x:.1f} %" for x in (right / len(labels), guessing(labels)))
    is_guess = is_chance(right, labels, tries)
    return f"{share} is what guessing gives ({chance})" if is_guess else f"{share}"


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
    return Result("knn", "k", ks, right)


# --- trained probes -----------------------------------------------------------------------------


def sweep(
    splits: Splits, heads: nn.ModuleList, optimizer: Optimizer, rates: Sequence[float],
    read: Callable[[str, Tensor], Tensor], batch_size: int, least: int, seed: int,
) -> dict[str, list[int]]:  # fmt: skip
    """Train S heads on the same batches, each at its own rate; count what they get right.

    Args:
        read: takes the name of a split and numbers of videos; returns what the heads take.
        least: updates for small sets; larger ones are seen EPOCHS times.
    """
    num, device = len(splits["train"].labels), splits["train"].labels.device
    batch_size = min(batch_size, num)
    updates = max(EPOCHS * num // batch_size, least)
    generator, epochs = torch.Generator().manual_seed(seed), -(-updates * batch_size // num)
    order = torch.cat([torch.randperm(num, generator=generator) for _ in range(epochs)])
    for update, numbers in enumerate(order.split(batch_size)[:updates]):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate(update / updates, rate, 0.0, WARMUP, 1)
        x, y = read("train", numbers), splits["train"].labels[numbers.to(device)]
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(head(x), y) for head in heads]).sum().backward()
        optimizer.step()
    right = {}
    for name, split in splits.items():
        guesses = []
        for numbers in torch.arange(len(split.labels)).split(batch_size):
            x = read(name, numbers)
            with torch.no_grad():
                guesses.append(torch.stack([head(x).argmax(dim=1) for head in heads]))  # (S, N)
        right[name] = (torch.cat(guesses, dim=1) == split.labels).sum(dim=1).tolist()
    return right


def linear(
    splits: Splits, num_classes: int, seed: int = 0, rates: Sequence[float] = LINEAR_RATES
) -> Result:
    """Train linear layers on normalised features by SGD with momentum.

    As in MAE, BatchNorm without affine parameters comes first; here its mean and variance are those
    of all of train, not of batches. The layers start at zero and have no weight decay.
    """
    x = {name: split.features.mean(dim=1) for name, split in splits.items()}  # (V, D)
    variance, mean = torch.var_mean(x["train"], dim=0, correction=0)
    x = {name: (features - mean) * (variance + 1e-6).rsqrt() for name, features in x.items()}
    heads = nn.ModuleList(nn.Linear(len(mean), num_classes) for _ in rates).to(mean.device)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    optimizer = SGD([{"params": list(head.parameters())} for head in heads], momentum=0.9)

    def read(name: str, numbers: Tensor) -> Tensor:
        return x[name][numbers.to(mean.device)]

    right = sweep(splits, heads, optimizer, rates, read, batch_size=256, least=1000, seed=seed)
    return Result("linear", "lr", rates, right)


class AttentiveProbe(nn.Module):
    """A learnt query reads the tokens of a video; a residual MLP and a linear layer follow."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        heads = next(h for h in range(max(dim // 64, 1), 0, -1) if dim % h == 0)
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        mlp = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(*mlp)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def attend(self, tokens: Tensor) -> Tensor:
        """Return what self.attn would for the query and all tokens: [N, L, D] -> [N, D].

        With a single query, no keys and values are computed: the key weights are applied to the
        query, and the value weights to the weighted sum of the tokens. The keys' bias adds the same
        to all scores, so it has no effect.
        """
        H, D = self.attn.num_heads, len(self.query)
        w_q, w_k, w_v = self.attn.in_proj_weight.view(3, H, D // H, D)
        b_q, _, b_v = self.attn.in_proj_bias.view(3, H, D // H)
        query = (w_q @ self.query + b_q) * (D // H) ** -0.5  # (H, D / H)
        query = torch.einsum("hd,hdi->ih", query, w_k)  # (D, H)
        shares = (tokens @ query).softmax(dim=1)  # (N, L, H)
        pooled = shares.mT @ tokens  # (N, H, D)
        values = torch.einsum("nhi,hdi->nhd", pooled, w_v) + b_v
        return self.attn.out_proj(values.flatten(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [N, C] of normalised tokens [N, L, D]."""
        x = self.query + self.attend(tokens)
        return self.head(x + self.mlp(x))


def attentive(
    splits: Splits, num_classes: int, seed: int = 0, rates: Sequence[float] = ATTENTIVE_RATES
) -> Result:
    """Train attentive probes by AdamW on tokens, read by batches and normalised by LayerNorm."""
    features = splits["train"].features
    D, device = features.shape[-1], features.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = AttentiveProbe(D, num_classes)
    heads = nn.ModuleList(copy.deepcopy(first) for _ in rates).to(device)
    optimizer = AdamW([{"params": list(head.parameters())} for head in heads], weight_decay=0.01)

    def read(name: str, numbers: Tensor) -> Tensor:
        return F.layer_norm(splits[name].read_tokens(numbers).to(device), [D])

    right = sweep(splits, heads, optimizer, rates, read, batch_size=32, least=300, seed=seed)
    return Result("attentive", "lr", rates, right)


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
        self.args, self.device, self.loader = args, device, None
        if not args.probe_csv:
            return
        index = VideoIndex(args.probe_csv, args.path_prefix)
        counts, flag = (
            np.unique(index.labels, return_counts=True)[1],
            f"--probe_csv {args.probe_csv}",
        )
        refuse(not index.has_labels, f"{flag}: every video needs a label")
        refuse(
            len(counts) < 2 or max(counts) < 2, f"{flag} needs two classes, and two videos of one"
        )
        if alone := int((counts == 1).sum()):
            print0(f"{flag}: {alone} videos are alone in their class, so they count as wrong")
        dataset = Kinetics(index, "test", **clip_options(args))
        batch_size = args.batch_size * args.repeat_aug
        self.loader = VideoLoader(dataset, batch_size, args.num_workers, 1.0, device)

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
        if self.loader is None or not is_vis_epoch(epoch, self.args):
            return {}
        dataset, training, own = self.loader.dataset, model.training, []
        common_steps = len(dataset) // world_size() // self.loader.batch_size
        model.eval()
        # Loaders draw a random number. Compiled blocks would be compiled again for these clips.
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            for step, batch in enumerate(self.loader):
                if step < common_steps and stop():
                    return {}
                clips = channels_first(batch.clips.to(self.device).flatten(0, 1))
                with autocast(self.device, self.args.precision):
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
            finite = f"{len(rows)} of {len(dataset)} videos have finite features"
            print0(f"WARNING: kNN on --probe_csv is not measured: {finite}")
            return {}
        x = directions(torch.stack([found[row] for row in rows]).unsqueeze(1).to(self.device))
        y = torch.from_numpy(dataset.index.labels[rows]).to(self.device)
        right = neighbours_right(x, y, x, y, [CURVE_K])[0]
        print0(f"kNN on --probe_csv: {verdict(right, y)}")
        accuracy = 100 * right / len(y)
        log.scalar("probe/knn_acc1", accuracy, last_x(epoch, self.args.repeat_aug))
        return {"probe_knn_acc1": accuracy}
