"""What only a CUDA device can show: precision, no hidden waits, the scripts on a GPU.

The slow tests come first, so that the workers of pytest-xdist end at about the same time.
"""

import copy
import json
import shutil
import signal
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import engine_finetune
import engine_pretrain
import main_features
import main_finetune
import main_pretrain
import main_probe
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from tests.test_kills import LAST, argv, wait_for_line
from tests.test_scripts import FINETUNE, PRETRAIN, call, finish, spawn, weights
from util.checkpoint import Checkpoints, HostCopy
from util.kinetics import Kinetics, VideoIndex
from util.loader import Batch, VideoLoader
from util.meters import RunLog
from util.optim import (
    autocast,
    grad_sync,
    make_optimizer,
    make_scaler,
    param_groups_weight_decay,
    prepare_model,
)
from util.signals import REQUEUE_STATUS
from util.video.mixup import Mixup
from util.video_vit import Attention, Encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)
BACKEND = "nccl"
TASKS = ("pretrain", "finetune")


@pytest.fixture(autouse=True)
def exact_products():
    """Undo what the scripts set: without TF32, fp32 results can be compared closely."""
    torch.set_float32_matmul_precision("highest")


def small_model(task: str, drop_path_rate: float = 0.0) -> Encoder:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "num_frames": 8}
    sizes |= {"embed_dim": 128, "depth": 3, "num_heads": 4}
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    if task == "finetune":
        return VisionTransformer(
            **sizes, num_classes=5, drop_path_rate=drop_path_rate, norm_layer=norm_layer
        )
    return MaskedAutoencoderViT(
        **sizes, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2, pred_t_dim=4,
        norm_layer=norm_layer, norm_pix_loss=True,
    )  # fmt: skip


def compute_loss(model: nn.Module, task: str, clips: Tensor) -> Tensor:
    """Return the loss of clips, masked in the same way in every call on one device."""
    torch.manual_seed(1)
    if task == "pretrain":
        return model(clips, 0.75)[0]
    labels = torch.arange(len(clips), device=clips.device) % 5
    return F.cross_entropy(model(clips, 0.5).float(), labels)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def relative_error(x: Tensor, exact: Tensor) -> float:
    error = ((x.detach().to(exact) - exact).norm() / exact.norm()).item()
    print(f"relative error {error:.1e}")  # pytest -rP shows these
    return error


# --- interruption, compilation and ranks --------------------------------------------------------


def test_sigterm_saves_a_checkpoint_and_the_same_command_continues(videos, tmp_path):
    flags = argv("main_pretrain.py", videos, tmp_path, ranks=1, workers=2)
    flags[flags.index("--checkpoint_minutes") + 1] = 0  # only the signal saves within an epoch
    flags += ["--device", DEVICE.type]
    process = spawn("main_pretrain.py", *flags)
    out = wait_for_line(process, r"Epoch \[1/4\]  \[1/6\]")
    process.send_signal(signal.SIGTERM)
    out += finish(process, REQUEUE_STATUS)
    assert "SIGTERM: stopping after this step with a checkpoint" in out
    (saved,) = tmp_path.glob("checkpoint-*-*.pth")
    _, epoch, step = saved.stem.split("-")
    out = finish(spawn("main_pretrain.py", *flags))
    assert f"on {DEVICE.type}" in out
    assert f"going on at epoch {int(epoch)}, step {int(step)}\n" in out
    assert all(t.isfinite().all() for t in weights(tmp_path / LAST).values())


def test_a_save_is_of_its_moment_though_the_gpu_goes_on():
    state = {"weight": torch.randn(1 << 24, device=DEVICE)}
    expected = state["weight"].cpu()
    host_copy = HostCopy()
    for _ in range(2):  # the second one into the buffers of the first
        finish_copy = host_copy.begin(state, on_gpu=True)
        state["weight"].add_(1)
        assert torch.equal(finish_copy()["weight"], expected)
        expected = expected + 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_compiled_blocks_compute_what_eager_ones_do(task, dynamic):
    model, clips = small_model(task).to(DEVICE), torch.randn(4, 3, 8, 32, 32, device=DEVICE)
    counters.clear()
    results = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(dynamic)
        model.zero_grad()
        with autocast(DEVICE, "bf16"):
            loss = compute_loss(model, task, clips)
        loss.backward()
        assert bool(counters["stats"]["unique_graphs"]) == compiled
        results.append((loss, gradient(model)))
    (loss, grads), (compiled_loss, compiled_grads) = results
    assert relative_error(compiled_loss, loss) < 2e-3
    assert relative_error(compiled_grads, grads) < 5e-2


@pytest.fixture
def process_group(tmp_path):
    """Join a process group of one rank."""
    dist.init_process_group(BACKEND, f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ddp_accumulates_the_gradients_of_the_model(process_group, monkeypatch, compiled):
    monkeypatch.setattr("util.optim.world_size", lambda: 2)  # DDP is for several ranks
    plain, clips = small_model("pretrain").to(DEVICE), torch.randn(2, 4, 3, 8, 32, 32).to(DEVICE)
    ddp_model = prepare_model(copy.deepcopy(plain), DEVICE, compiled, False, dynamic=False)
    assert isinstance(ddp_model, DistributedDataParallel)
    for model in (plain, ddp_model):
        for step in range(2):
            with grad_sync(model, enabled=step == 1):
                (compute_loss(model, "pretrain", clips[step]) / 2).backward()
    assert relative_error(gradient(ddp_model), gradient(plain)) < (1e-4 if compiled else 1e-5)


# --- scripts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_scripts_run_on_the_gpu(videos, tmp_path, capsys, precision):
    common = ["--path_to_data_dir", videos, "--precision", precision, "--epochs", 2]
    common += ["--device", DEVICE.type, "--num_workers", 2]
    pre, fine = tmp_path / "pre", tmp_path / "fine"
    call(main_pretrain, *PRETRAIN, *common, "--output_dir", pre)
    call(main_finetune, *FINETUNE, *common, "--output_dir", fine,
         "--finetune", pre / "checkpoint-00001.pth")  # fmt: skip
    out = capsys.readouterr().out
    assert f"on {DEVICE.type}, {precision}" in out
    assert all(t.isfinite().all() for t in weights(fine / "checkpoint-00001.pth").values())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-2)])
def test_a_resumed_run_ends_where_one_in_a_piece_does(
    videos, tmp_path, capsys, precision, tolerance
):
    """Compare the weights; the tolerance is a share of their way in the resumed epoch.

    On a CPU they are equal. Kernels of a GPU may add in another order in every run (attention of
    long sequences adds the gradients of its queries so), and where a gradient is almost 0, AdamW
    makes more of that. Forgetting the moments, or the place in the schedule, costs far more.
    """
    flags = ["--path_to_data_dir", videos, *PRETRAIN, "--epochs", 2, "--precision", precision]
    flags += ["--no_qkv_bias", "--device", DEVICE.type]  # biases of keys have no gradient but noise
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    call(main_pretrain, *flags, "--output_dir", whole)
    resumed.mkdir()
    shutil.copy(whole / "checkpoint-00000.pth", resumed)
    call(main_pretrain, *flags, "--output_dir", resumed)
    assert f"resumed from {resumed}" in capsys.readouterr().out
    start, end, again = (
        torch.cat([t.flatten() for t in weights(path).values()])
        for path in (*(whole / f"checkpoint-0000{i}.pth" for i in (0, 1)),
                     resumed / "checkpoint-00001.pth")
    )  # fmt: skip
    assert (end - start).norm() > 0
    assert relative_error(again - start, end - start) < tolerance


def test_averages_features_and_probes_run_on_the_gpu(videos, tmp_path, capsys):
    data = ["--path_to_data_dir", videos, "--num_workers", 2]
    on_gpu, pre, fine = ["--device", DEVICE.type], tmp_path / "pre", tmp_path / "fine"
    curve = ["--probe_csv", videos / "train.csv", "--vis_period", 1]
    call(main_pretrain, *PRETRAIN, *data, *on_gpu, *curve, "--epochs", 1, "--output_dir", pre)
    checkpoint = ["--finetune", pre / "checkpoint-00000.pth"]
    more = ["--freeze", 2, "--model_ema", 0.9, "--precision", "fp16", "--output_dir", fine]
    call(main_finetune, *FINETUNE, *data, *on_gpu, *checkpoint, *more)
    files = []
    for device in ("cpu", DEVICE.type):
        where = ["--device", device, "--precision", "fp32", "--output_dir", tmp_path / device]
        call(main_features, *data, *checkpoint, *where, "--tokens", "--splits", "train", "val")
        with np.load(tmp_path / device / "train.npz") as file:
            files.append(torch.from_numpy(file["features"]))
    assert relative_error(files[1], files[0]) < 1e-4
    call(main_probe, *on_gpu, "--features", tmp_path / DEVICE.type, "--output_dir", fine)
    out = capsys.readouterr().out
    assert "kNN on --probe_csv: " in out
    assert "moving average: top-1 " in out
    found = json.loads((fine / "probe.json").read_text())["probes"]
    assert [one["probe"] for one in found] == ["knn", "linear", "attentive"]


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3), ("fp16", 2e-3)]
)
def test_loss_and_gradients_agree_with_the_cpu(monkeypatch, precision, tolerance):
    model, clips, noise = small_model("pretrain"), torch.randn(4, 3, 8, 32, 32), torch.rand(4, 64)
    results = []
    for device, used in ((torch.device("cpu"), "fp32"), (DEVICE, precision)):
        monkeypatch.setattr(torch, "rand", lambda *_, device: noise.to(device))
        model.zero_grad()
        model.to(device)
        with autocast(device, used):
            loss = compute_loss(model, "pretrain", clips.to(device))
        loss.backward()
        results.append((loss.cpu(), gradient(model)))
    (loss, grads), (gpu_loss, gpu_grads) = results
    assert relative_error(gpu_loss, loss) < tolerance
    assert relative_error(gpu_grads, grads) < 10 * tolerance


@pytest.mark.parametrize(
    ("clips", "length", "dim"),
    [
        pytest.param(64, 157, 1024, id="encoder of ViT-L in pre-training"),
        pytest.param(4, 1569, 512, id="decoder"),
        pytest.param(2, 1569, 1024, id="fine-tuning"),
        pytest.param(3, 785, 1024, id="half of the patches"),
        pytest.param(3, 131, 512, id="short and odd"),
        pytest.param(3, 1013, 512, id="long and odd"),
        pytest.param(2, 7, 512, id="less than a tile"),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_agrees_with_float64(clips, length, dim, precision):
    """Whichever kernel is chosen for a shape, PyTorch's or ours, it is right in both directions."""
    torch.manual_seed(0)
    attention = Attention(dim, num_heads=16).to(DEVICE)
    for parameter in attention.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)  # as in the models
    x, direction = torch.randn(2, clips, length, dim, device=DEVICE)
    results = []
    for dtype in (torch.float64, torch.float32):
        layer, tokens = copy.deepcopy(attention).to(dtype), x.to(dtype).requires_grad_()
        is_exact = dtype == torch.float64
        with sdpa_kernel(SDPBackend.MATH) if is_exact else autocast(DEVICE, precision):
            out = layer(tokens)
        (out * direction).sum().backward()
        results.append({"output": out, "input": tokens.grad})
        # the bias of the keys has no gradient but noise
        results[-1] |= {n: p.grad for n, p in layer.named_parameters() if n != "k.bias"}
    exact, computed = results
    for name, value in exact.items():
        assert relative_error(computed[name], value.detach()) < 2e-2, name


# --- training loops -----------------------------------------------------------------------------


class Batches:
    """Replace VideoLoader: the same page-locked batch in every step.

    During the quiet steps, whatever waits for the device raises an error.
    """

    batch_size = 2

    def __init__(self, steps: int, quiet: range = range(0), repeat_aug: int = 2):
        self.steps, self.quiet = steps, quiet
        self.dataset = [None] * (steps * self.batch_size)  # evaluate counts them
        B, R = self.batch_size, repeat_aug
        torch.manual_seed(0)
        clips = torch.randint(0, 256, (B, R, 8, 32, 32, 3), dtype=torch.uint8)
        flip = torch.tensor([[True, False], [False, True]])[:, :R]
        erase = torch.tensor([[[2, 4, 20, 9], [0, 0, 0, 0]]] * B)[:, :R]
        label, row = torch.tensor([0, 1]), torch.tensor([0, 1])
        pinned = [x.contiguous().pin_memory() for x in (clips, flip, erase, label)]
        self.batch = Batch(*pinned, row, [{}, {}])

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch, start_step):
        pass

    def __iter__(self):
        for step in range(self.steps):
            torch.cuda.set_sync_debug_mode("error" if step in self.quiet else "default")
            yield self.batch
        torch.cuda.set_sync_debug_mode("default")


def train(task: str, precision: str, batches: Batches, warmup_epochs: float = 1):
    """Train for one of two epochs; return the losses of its steps and the loss scaler."""
    args = Namespace(
        batch_size=batches.batch_size, repeat_aug=2, accum_iter=1, seed=0, lr=1e-3, min_lr=0.0,
        warmup_epochs=warmup_epochs, epochs=2, mask_ratio=0.5, mask_ratio_end=None,
        mask_type="random", decoder_mask_ratio=0.0, reprob=0.25,
        smoothing=0.1, precision=precision, clip_grad=0.02, checkpoint_minutes=0, dist_timeout=30,
        compile=False,
    )  # fmt: skip
    model = small_model(task, drop_path_rate=0.2).to(DEVICE)
    optimizer = make_optimizer(param_groups_weight_decay(model, 0.05), (0.9, 0.95), DEVICE)
    scaler = make_scaler(DEVICE, precision)
    checkpoints = Checkpoints(args, model, optimizer, scaler, fingerprint=0)
    log = RunLog("", print_freq=len(batches), device=DEVICE)
    losses = []
    log.scalar = lambda name, value, x: losses.append(value) if name == "train/loss" else None
    rest = (batches, optimizer, scaler, DEVICE, checkpoints, log, args)
    try:
        if task == "pretrain":
            engine_pretrain.train_one_epoch(model, *rest)
        else:
            engine_finetune.train_one_epoch(model, Mixup(num_classes=5), *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        checkpoints.close()
    assert len(losses) == len(batches)
    return losses, scaler


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_steps_between_printed_lines_do_not_wait_for_the_device(task, precision):
    """A step that reads a value back raises here; only the printed line may.

    That holds for fp16 too: fused AdamW itself skips an update whose gradient overflowed. Without
    waiting, Mixup mixes the clips of some of these steps and cuts boxes in those of others.
    """
    # the first two steps allocate; the last one is followed by the printed line
    losses, _ = train(task, precision, Batches(9, quiet=range(2, 8)))
    assert 0 < max(losses) < 10


def test_validation_waits_for_the_device_at_its_end_alone():
    batches, log = Batches(7, quiet=range(2, 7), repeat_aug=1), RunLog("", 1, DEVICE)
    model = small_model("finetune").to(DEVICE)
    try:
        stats, counts = engine_finetune.evaluate(model, batches, DEVICE, "bf16", 5, log)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts.sum() == len(batches.dataset)
    assert 0 < stats["loss"] < 10


def test_fp16_trains_with_a_scaled_loss():
    losses, scaler = train("pretrain", "fp16", Batches(20), warmup_epochs=0)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses
    assert scaler.get_scale() > 1


# --- loader -------------------------------------------------------------------------------------


def open_loader(videos, num_workers: int) -> VideoLoader:
    index = VideoIndex(str(videos / "train.csv"))
    sizes = {"input_size": 32, "num_frames": 4, "sampling_rate": 4}
    dataset = Kinetics(index, "pretrain", **sizes, repeat_aug=2)
    return VideoLoader(dataset, 2, num_workers, 1.0, DEVICE)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_leased_batches_lie_in_page_locked_memory(videos, monkeypatch, num_workers):
    loader, locked = open_loader(videos, num_workers), []
    memory, lease = loader.memory, loader.memory.lease

    def lease_and_look(slot):
        clips = lease(slot)
        locked.append(clips.is_pinned())
        return clips

    monkeypatch.setattr(memory, "lease", lease_and_look)
    for epoch in range(3):
        loader.set_epoch(epoch)
        steps = sum(1 for _ in loader)
    assert len(locked) == 3 * steps > 0
    all_slots = [memory.lease(memory.take()) for _ in range(memory.capacity)]
    assert len(all_slots) == memory.capacity
    assert all(locked), locked


def test_epochs_of_a_loader_reserve_no_more_memory(videos):
    """Memory of one stream is of no use to another: the copies of all epochs share theirs."""
    loader = open_loader(videos, num_workers=0)
    reserved = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert all(batch.clips.device == DEVICE for batch in loader)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]
