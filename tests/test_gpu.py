"""What only a CUDA device can show: precision, no hidden waits, the scripts on a GPU."""

from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import nn

import main_finetune
import main_pretrain
from engine_pretrain import train_one_epoch
from models_mae import MaskedAutoencoderViT
from tests.test_scripts import FINETUNE, PRETRAIN, call, weights
from util.checkpoint import Checkpoints, HostCopy
from util.kinetics import Kinetics, VideoIndex
from util.loader import Batch, VideoLoader
from util.meters import RunLog
from util.optim import autocast, make_optimizer, make_scaler, param_groups_weight_decay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_mae(**kwargs) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        img_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=4, decoder_embed_dim=64,
        decoder_depth=2, decoder_num_heads=2, num_frames=8, pred_t_dim=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3), ("fp16", 2e-3)]
)
def test_loss_and_gradients_agree_with_the_cpu(monkeypatch, precision, tolerance):
    torch.set_float32_matmul_precision("highest")
    model, clips, noise = small_mae(), torch.randn(4, 3, 8, 32, 32), torch.rand(4, 64)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        monkeypatch.setattr(torch, "rand", lambda *_, device: noise.to(device))
        model.zero_grad()
        model.to(device)
        with autocast(device, precision if device.type == "cuda" else "fp32"):
            loss, _, _ = model(clips.to(device), mask_ratio=0.75)
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        results.append((loss.item(), grads))
    (loss, grads), (gpu_loss, gpu_grads) = results
    assert abs(loss - gpu_loss) < tolerance * loss
    assert (grads - gpu_grads).norm() < 10 * tolerance * grads.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_between_printed_lines_do_not_wait_for_the_device(tmp_path, precision):
    """A step that reads a value back raises here; only the printed line may."""
    device = torch.device("cuda")
    model = small_mae().to(device)
    args = Namespace(
        batch_size=2, repeat_aug=2, accum_iter=1, seed=0, lr=1e-3, min_lr=0.0, warmup_epochs=1,
        epochs=2, mask_ratio=0.9, decoder_mask_ratio=0.0, precision=precision, clip_grad=0.02,
        checkpoint_minutes=0, dist_timeout=30,
    )  # fmt: skip
    batch = Batch(
        torch.randint(0, 256, (2, 2, 8, 32, 32, 3), dtype=torch.uint8),
        torch.tensor([[True, False], [False, True]]),
        torch.zeros(2, 2, 4, dtype=torch.int64),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
        [{}, {}],
    )
    pinned = batch._replace(clips=batch.clips.pin_memory(), flip=batch.flip.pin_memory())

    class Loader:
        def __len__(self):
            return 7

        def __iter__(self):
            for step in range(7):
                # the first steps allocate and compile; step 6 is followed by the printed line
                torch.cuda.set_sync_debug_mode("error" if 2 <= step < 6 else "default")
                yield pinned
            torch.cuda.set_sync_debug_mode("default")

        def set_epoch(self, epoch, start_step):
            pass

    optimizer = make_optimizer(param_groups_weight_decay(model, 0.05), (0.9, 0.95), device)
    scaler = make_scaler(device, precision)
    checkpoints = Checkpoints(args, model, optimizer, scaler, fingerprint=0)
    log = RunLog("", print_freq=7, device=device)
    try:
        stats = train_one_epoch(model, Loader(), optimizer, scaler, device, checkpoints, log, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < stats["loss"] < 10


def test_a_save_is_of_its_moment_though_the_gpu_goes_on():
    state = {"weight": torch.randn(1 << 24, device="cuda")}
    expected = state["weight"].cpu()
    copy = HostCopy()
    for _ in range(2):  # the second one into the buffers of the first
        finish = copy.begin(state, on_gpu=True)
        state["weight"].add_(1)
        assert torch.equal(finish()["weight"], expected)
        expected = expected + 1


def test_epochs_of_a_loader_reserve_no_more_memory(videos):
    """Memory of one stream is of no use to another: the copies of all epochs share theirs."""
    index = VideoIndex(str(videos / "train.csv"))
    sizes = {"input_size": 32, "num_frames": 4, "sampling_rate": 4}
    dataset = Kinetics(index, "pretrain", **sizes, repeat_aug=2)
    loader = VideoLoader(dataset, 2, 0, 1.0, torch.device("cuda"))
    reserved = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert all(batch.clips.is_cuda for batch in loader)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_scripts_run_on_the_gpu(videos, tmp_path, capsys, precision):
    common = ["--path_to_data_dir", videos, "--precision", precision, "--epochs", 2]
    pre, fine = tmp_path / "pre", tmp_path / "fine"
    call(main_pretrain, *PRETRAIN, *common, "--device", "cuda", "--num_workers", 2,
         "--output_dir", pre)  # fmt: skip
    call(main_finetune, *FINETUNE, *common, "--device", "cuda", "--num_workers", 2,
         "--output_dir", fine, "--finetune", pre / "checkpoint-00001.pth")  # fmt: skip
    out = capsys.readouterr().out
    assert f"on cuda, {precision}" in out
    assert all(t.isfinite().all() for t in weights(fine / "checkpoint-00001.pth").values())
