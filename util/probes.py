"""How much frozen features know: nearest neighbours, a linear layer, attention over tokens.

A probe is tried with several settings at once. Validation chooses one of them; of equally good ones
it takes the first, which is the smallest. The views of a video are joined before: their features
are averaged (for neighbours after each is scaled to length 1), and their tokens stand side by side.

Shapes: V videos, N of them in a batch, D width, L tokens of a view, C classes, S settings, H heads.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from util.dist import print0
from util.errors import UserError
from util.lr_sched import learning_rate

NEIGHBOURS = (1, 5, 10, 20)
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO
LINEAR_RATES = tuple(10 ** (i / 3 - 4) for i in range(13))  # 0.0001 to 1
ATTENTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
HELD_OUT = 0.2  # share of every class of train that validates if there is no other validation
EPOCHS = 20  # of the trained probes, or more for small sets
LEVEL = 0.01  # probability that guessing passes for more


@dataclass(eq=False)
class Split:
    """Features of labelled videos. Tokens may be memory-mapped: they are read by batches."""

    features: Tensor  # float32 [V, views, D]
    labels: Tensor  # int64 [V], -1: none
    tokens: np.ndarray | None = None  # float32 or float16 [., views, L, D]
    rows: np.ndarray | None = None  # int64 [V], where a video's tokens are; None: in order

    def part(self, chosen: Tensor) -> "Split":
        """Return the videos that `chosen` (bool [V]) marks."""
        rows = np.arange(len(self.labels)) if self.rows is None else self.rows
        return Split(self.features[chosen], self.labels[chosen], self.tokens, rows[chosen.numpy()])

    def read_tokens(self, numbers: Tensor) -> Tensor:
        """Read the tokens of videos by their numbers int64 [N]: float32 [N, views * L, D]."""
        assert self.tokens is not None
        rows = numbers.numpy() if self.rows is None else self.rows[numbers.numpy()]
        return torch.from_numpy(self.tokens[rows]).float().flatten(1, 2)


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


def prepare(splits: Splits, num_classes: int, seed: int = 0) -> Splits:
    """Return train, val and maybe test for probes; without a labelled val, hold out some of train.

    A video of val or test whose class train lacks stays, and counts as wrong.

    Raises:
        UserError: train has no labels or a single class, a label is too large, or features are not
            finite or do not fit together.
    """
    if "train" not in splits:
        raise UserError("there are no features of train: a probe learns from labelled videos")
    used = {}
    for name, split in splits.items():
        missing, videos = int((split.labels < 0).sum()), len(split.labels)
        if missing and (missing < videos or name == "train"):
            raise UserError(f"{missing} of {videos} videos of {name} have no label")
        if missing or not videos:
            print0(f"{name} is not used: it has no {'labels' if videos else 'videos'}")
            continue
        if (highest := int(split.labels.max())) >= num_classes:
            raise UserError(f"{name} has the label {highest}, but there are {num_classes} classes")
        check_features(name, split, splits["train"])
        used[name] = split
    if len(used["train"].labels.unique()) < 2:
        raise UserError("train has a single class: there is nothing to tell apart")
    if "val" not in used:
        used["train"], used["val"] = hold_out(used["train"], seed)
    for name in used.keys() - {"train"}:
        unknown = ~torch.isin(used[name].labels, used["train"].labels)
        if unknown.any():
            lacks = f"{int(unknown.sum())} videos of {name} are of classes that train lacks"
            print0(f"WARNING: {lacks}: they count as wrong")
    return used


def check_features(name: str, split: Split, train: Split) -> None:
    """Raise UserError unless the features of a split are finite and fit those of train."""
    widths = [x.features.shape[-1] for x in (split, train)]
    if widths[0] != widths[1]:
        raise UserError(f"features of {name} have the width {widths[0]}, of train {widths[1]}")
    odd = int((~split.features.isfinite().flatten(1).all(dim=1)).sum())
    if odd:
        raise UserError(f"features of {odd} of {len(split.labels)} {name} videos are not finite")
    if (split.tokens is None) != (train.tokens is None):
        raise UserError(f"only one of train and {name} has tokens")


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
    if not held.any():
        raise UserError("there is no validation, and no class of train has two videos to divide")
    share = f"{100 * HELD_OUT:.0f} % of every class"
    print0(f"no validation: {int(held.sum())} of {len(held)} videos of train ({share}) replace it")
    return train.part(~held), train.part(held)


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


def knn(splits: Splits, device: torch.device) -> Result:
    """Let the nearest training videos vote; for a training video, the others of train."""
    x = {name: directions(split.features.to(device)) for name, split in splits.items()}
    labels = {name: split.labels.to(device) for name, split in splits.items()}
    ks = [k for k in NEIGHBOURS if k <= len(x["train"])]
    bank = x["train"], labels["train"], ks
    return Result("knn", "k", ks, {n: neighbours_right(x[n], labels[n], *bank) for n in splits})


# --- trained probes -----------------------------------------------------------------------------


def batches(num: int, size: int, updates: int, seed: int) -> Iterator[Tensor]:
    """Yield `updates` random batches int64 [size] of the numbers below `num`, epoch by epoch."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0)
    for _ in range(updates):
        if len(order) < size:
            order = torch.randperm(num, generator=generator)
        yield order[:size]
        order = order[size:]


def sweep(
    result: Result,
    heads: list[nn.Module],
    optimizer: Optimizer,
    read: Callable[[str, Tensor], Tensor],
    splits: Splits,
    batch_size: int,
    least: int,
    seed: int,
) -> Result:
    """Train S heads on the same batches, each at its own rate, and count what they get right.

    Args:
        read: takes the name of a split and numbers of videos; returns what the heads take.
        least: updates for small sets; larger ones are seen EPOCHS times.
    """
    device = next(heads[0].parameters()).device
    labels = {name: split.labels.to(device) for name, split in splits.items()}
    num = len(labels["train"])
    batch_size = min(batch_size, num)
    updates = max(EPOCHS * num // batch_size, least)
    for update, numbers in enumerate(batches(num, batch_size, updates, seed)):
        for group, rate in zip(optimizer.param_groups, result.values, strict=True):
            group["lr"] = learning_rate(update / updates, rate, 0.0, 0.05, 1)
        x, y = read("train", numbers), labels["train"][numbers.to(device)]
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(head(x), y) for head in heads]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for name, y in labels.items():
            right = torch.zeros(len(heads), dtype=torch.int64, device=device)
            for numbers in torch.arange(len(y)).split(batch_size):
                x = read(name, numbers)
                guesses = torch.stack([head(x).argmax(dim=1) for head in heads])  # (S, N)
                right += (guesses == y[numbers.to(device)]).sum(dim=1)
            result.right[name] = right.tolist()
    return result


def linear(
    splits: Splits,
    num_classes: int,
    device: torch.device,
    seed: int = 0,
    rates: Sequence[float] = LINEAR_RATES,
) -> Result:
    """Train linear layers on normalised features by SGD with momentum.

    As in MAE, BatchNorm without affine parameters comes first; here its mean and variance are those
    of all of train, not of batches. The layers start at zero and have no weight decay.
    """
    x = {name: split.features.mean(dim=1).to(device) for name, split in splits.items()}  # (V, D)
    variance, mean = torch.var_mean(x["train"], dim=0, correction=0)
    x = {name: (features - mean) * (variance + 1e-6).rsqrt() for name, features in x.items()}
    heads: list[nn.Module] = [nn.Linear(x["train"].shape[1], num_classes) for _ in rates]
    for head in heads:
        head.to(device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    optimizer = SGD([{"params": list(head.parameters())} for head in heads], momentum=0.9)
    read = lambda name, numbers: x[name][numbers.to(device)]  # noqa: E731
    return sweep(Result("linear", "lr", rates, {}), heads, optimizer, read, splits, 256, 1000, seed)


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
    splits: Splits,
    num_classes: int,
    device: torch.device,
    seed: int = 0,
    rates: Sequence[float] = ATTENTIVE_RATES,
) -> Result:
    """Train attentive probes by AdamW on tokens, read by batches and normalised by LayerNorm."""
    D = splits["train"].features.shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = AttentiveProbe(D, num_classes).to(device)
    heads: list[nn.Module] = [copy.deepcopy(first) for _ in rates]
    optimizer = AdamW([{"params": list(head.parameters())} for head in heads], weight_decay=0.01)

    def read(name: str, numbers: Tensor) -> Tensor:
        return F.layer_norm(splits[name].read_tokens(numbers).to(device), [D])

    return sweep(
        Result("attentive", "lr", rates, {}), heads, optimizer, read, splits, 32, 300, seed
    )
