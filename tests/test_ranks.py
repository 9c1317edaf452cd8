"""Tests of what two processes of one group do together, as under torchrun.

It stands apart from the other tests of these modules because each process imports this file.
"""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models_mae import mae_vit_tiny_patch8
from models_vit import vit_tiny_patch8
from tests import golden
from util.lr_sched import set_learning_rate
from util.meters import Meters
from util.optim import (
    NonFiniteError,
    WeightAverage,
    grad_sync,
    layer_id,
    make_optimizer,
    make_scaler,
    optim_step,
    param_groups_lrd,
)

CPU = torch.device("cpu")


def linear_and_data():
    """Return a layer and inputs [2 ranks, 2 micro-steps, 4, 3], the same in every process."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 3, generator=generator))
    return model, torch.randn(2, 2, 4, 3, generator=generator)


def accumulate(rank):
    """Take two micro-steps and an update; return the gradients after each, and the result."""
    model, data = linear_and_data()
    ddp_model = DistributedDataParallel(model)
    gradients = []
    for step in range(2):
        with grad_sync(ddp_model, enabled=step == 1):
            (ddp_model(data[rank, step]).square().mean() / 2).backward()
        gradients.append(model.weight.grad.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = make_scaler(CPU, "fp32")
    norm = optim_step(optimizer, scaler, list(model.parameters()), clip_grad=0.5)
    return {"gradients": gradients, "norm": norm, "weight": model.weight.detach()}


def flush_meters(rank):
    """Note two good steps and one that only rank 1 spoils; return what each flush gave."""
    meters = Meters(CPU)
    for step in range(2):
        meters.update(step, torch.tensor([rank]), loss=torch.tensor(float(rank + step)), lr=0.5)
    flushed = meters.flush()
    loss = torch.tensor(math.nan if rank == 1 else 1.0)
    meters.update(2, torch.tensor([10 + rank]), loss=loss, lr=0.5)
    try:
        meters.flush()
    except NonFiniteError as error:
        return {"flushed": flushed, "step": error.step, "samples": error.samples}
    return {"flushed": flushed, "step": None}


def autoencoder_gradients(rank, world_size):
    """Return the gradients of a rank's share of four clips; masks are rows of one noise."""
    torch.manual_seed(0)
    model = mae_vit_tiny_patch8(img_size=32, num_frames=4, pred_t_dim=2, norm_pix_loss=True)
    clips = torch.randn(4, 3, 4, 32, 32)
    noise = torch.rand(4, model.patch_embed.num_patches)
    own = slice(4 * rank // world_size, 4 * (rank + 1) // world_size)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    with golden.masking_noise(noise[own]):
        wrapped(clips[own], 0.75)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def average_frozen(rank):
    """Train half of a classifier on a rank's own clips; return its weights and their average."""
    torch.manual_seed(0)
    model = vit_tiny_patch8(img_size=32, num_frames=4, num_classes=3)
    model.freeze(2)
    groups = param_groups_lrd(model, 4, 0.05, 0.75)
    optimizer = make_optimizer(groups, (0.9, 0.999), CPU)
    set_learning_rate(optimizer, 1e-3)
    average = WeightAverage(model, 0.9, optimizer)
    wrapped, scaler = DistributedDataParallel(model), make_scaler(CPU, "fp32")
    torch.manual_seed(rank)
    for _ in range(2):
        wrapped(torch.randn(2, 3, 4, 32, 32)).square().mean().backward()
        optim_step(optimizer, scaler, list(model.parameters()), clip_grad=1.0)
    return {"model": model.state_dict(), "average": average.module.state_dict()}


def work(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    try:
        results = {
            "accumulate": accumulate(rank),
            "flush_meters": flush_meters(rank),
            "autoencoder": autoencoder_gradients(rank, 2),
            "average_frozen": average_frozen(rank),
        }
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Run both functions in two processes; return each one's results in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])  # one import for both processes
    torch.multiprocessing.start_processes(work, (str(folder),), 2, start_method="forkserver")
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [result[name] for result in results] for name in results[0]}


def test_gradients_are_averaged_on_the_last_micro_step_alone(ranks):
    model, data = linear_and_data()
    for rank, result in enumerate(ranks["accumulate"]):
        model.zero_grad()
        (model(data[rank, 0]).square().mean() / 2).backward()
        torch.testing.assert_close(result["gradients"][0], model.weight.grad)
    model.zero_grad()
    model(data.flatten(0, 2)).square().mean().backward()  # all sixteen rows at once
    joint = model.weight.grad
    for result in ranks["accumulate"]:
        torch.testing.assert_close(result["gradients"][1], joint)
        torch.testing.assert_close(result["norm"], joint.norm())
        step = 0.1 * joint * min(1.0, 0.5 / joint.norm().item())
        torch.testing.assert_close(result["weight"], model.weight.detach() - step)


def test_two_ranks_give_the_autoencoders_gradients_of_the_joint_batch(ranks):
    joint = autoencoder_gradients(0, 1)
    total = torch.nn.utils.get_total_norm(list(joint.values()))
    for result in ranks["autoencoder"]:
        for name, gradient in joint.items():
            torch.testing.assert_close(result[name], gradient, rtol=1e-5, atol=1e-6)
            assert (result[name] - gradient).norm() < 1e-6 * total, name


def test_all_ranks_have_the_same_moving_average(ranks):
    first, second = ranks["average_frozen"]
    for kind in ("model", "average"):
        assert all(torch.equal(tensor, second[kind][k]) for k, tensor in first[kind].items())
    for name, tensor in first["average"].items():
        frozen = layer_id(name, 4) <= 2
        assert torch.equal(tensor, first["model"][name]) == frozen, name


def test_meters_average_over_ranks_and_fail_on_all_of_them(ranks):
    for rank, result in enumerate(ranks["flush_meters"]):
        assert result["flushed"] == [(0, {"loss": 0.5, "lr": 0.5}), (1, {"loss": 1.5, "lr": 0.5})]
        assert result["step"] == 2
        if rank == 1:
            assert result["samples"].tolist() == [11]
        else:
            assert result["samples"] is None
