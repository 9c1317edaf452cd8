"""Test what makes a step faster or smaller, and the benchmarks that measure it."""

import argparse
import collections
import itertools
import math
import subprocess
import sys
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import main_finetune
import models_mae
import models_vit
from benchmarks import attention, scaling
from benchmarks import step as step_benchmark
from tests.test_models import RULES, plain_targets, target_clips
from tests.test_scripts import FINETUNE, PRETRAIN, ROOT, call, finish, spawn
from util.dry_run import count_flops
from util.lr_sched import annealed_mask_ratio
from util.masking import MASK_TYPES
from util.report import count_confusions, topk_correct
from util.targets import TARGETS
from util.video.mixup import Mixup
from util.video.transforms import augment_on_device, channels_first

CLIP = (3, 4, 32, 32)


def autoencoder(**arguments):
    torch.manual_seed(0)
    return models_mae.mae_vit_tiny_patch8(
        **({"img_size": 32, "num_frames": 4, "pred_t_dim": 2, "norm_pix_loss": True} | arguments)
    )


def classifier(**arguments):
    torch.manual_seed(0)
    return models_vit.vit_tiny_patch8(img_size=32, num_frames=4, num_classes=5, **arguments)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clips(count=2):
    return torch.randn(count, *CLIP, generator=torch.Generator().manual_seed(3))


# --- no waiting for the device


def on_a_gpu(model):
    """Give a model parameters that claim to be on a GPU; FakeTensorMode allocates none."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(p.shape, device="cuda"), p.requires_grad)
            setattr(module, name, fake)
    return model


def test_a_step_on_a_gpu_reads_nothing_back():
    """Compute shapes and devices as on a GPU, without one; reading a value raises an error.

    The backward pass and the update belong to libraries and are left out.
    """
    maes = [autoencoder(target=target) for target in TARGETS]
    vit = classifier(drop_path_rate=0.5, dropout=0.5)
    with FakeTensorMode():
        maes, vit = [on_a_gpu(mae) for mae in maes], on_a_gpu(vit)
        gpu = torch.device("cuda", 0)
        pixels = torch.empty(4, 4, 32, 32, 3, dtype=torch.uint8, device=gpu)
        flip = torch.empty(4, dtype=torch.bool, device=gpu)
        boxes = torch.empty(4, 4, dtype=torch.int64, device=gpu)
        labels = torch.empty(4, dtype=torch.int64, device=gpu)
        cases = {*itertools.product(maes, (0.0, 0.5), MASK_TYPES[:1])}
        cases |= {*itertools.product(maes[:1], (0.0, 0.5), MASK_TYPES)}
        for mae, ratio, mask_type in cases:
            loss, pred, mask = mae(augment_on_device(pixels, flip, None), 0.5, ratio, mask_type)
            assert loss.device == pred.device == mask.device == gpu
        for draw, ratio in itertools.product(range(8), (0.0, 0.5)):
            x = augment_on_device(pixels, flip, boxes)
            x, soft = Mixup(5)(x, labels, np.random.default_rng(draw))
            logits = vit(x, ratio)
            assert F.cross_entropy(logits, soft).device == gpu
        assert topk_correct(logits, labels, 5).device == gpu
        assert count_confusions(labels, logits.argmax(dim=1), 5).device == gpu
        with pytest.raises(DataDependentOutputException):
            loss.item()  # as the docstring says


class Operators(TorchDispatchMode):
    """Count the operators that run, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[str(operator.overloadpacket)] += 1
        return operator(*args, **(kwargs or {}))


def test_a_step_copies_no_packed_gradients_and_adds_no_tokens_one_by_one():
    """Before, every block cloned the gradients of q, k and v, and scatter_add summed all tokens."""
    model = autoencoder()
    with Operators() as operators:
        model(clips(), 0.75)[0].backward()
    counts = operators.counts
    blocks = len(model.blocks) + len(model.decoder_blocks)
    assert counts["aten.stack"] == blocks + 1, "the frames that are predicted are stacked, too"
    assert counts["aten.clone"] < blocks
    assert counts["aten.scatter_add"] == 0


# --- activation checkpointing and compilation


@pytest.mark.parametrize(
    ("make", "loss_of"),
    [
        (autoencoder, lambda model: model(clips(), 0.75)[0]),
        (partial(autoencoder, target="channel"), lambda model: model(clips(), 0.75)[0]),
        (partial(classifier, pool="cls"), lambda model: model(clips(8), 0.5).square().sum()),
        (partial(classifier, drop_path_rate=0.9), lambda model: model(clips(8)).square().sum()),
    ],
    ids=["masking", "channels", "class token", "drop path"],
)
def test_grad_checkpointing_replays_random_numbers_and_changes_no_bit(make, loss_of):
    results = []
    for checkpointing in (False, True):
        model = make().train()
        model.grad_checkpointing = checkpointing
        torch.manual_seed(1)
        loss = loss_of(model)
        results.append((loss, gradients(model, loss)))
    (loss, plain), (loss_again, checkpointed) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_grad_checkpointing_saves_memory():
    """Count what autograd keeps for the backward pass."""

    def saved_bytes(checkpointing):
        model = autoencoder()
        model.grad_checkpointing = checkpointing
        sizes = []

        def pack(x):
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(clips(), 0.75)
        return sum(sizes)

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


@pytest.mark.parametrize("rule", [*RULES, "hog", "motion"])
def test_the_loss_compiles_as_a_whole_for_every_target(rule):
    model, mask = autoencoder(**RULES.get(rule, {"target": rule})), torch.ones(2, 32)
    pred = torch.randn(2, 32, model.decoder_pred.out_features)
    whole = torch.compile(model.forward_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(clips(), pred, mask), model.forward_loss(clips(), pred, mask))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_compiled_losses_of_perfect_predictions_are_zero_for_flat_patches_too(videos, rule):
    """The compiler may round another mean of equal pixels, which a scale of 4e-6 would show."""
    model, imgs = autoencoder(pred_t_dim=4, **RULES[rule]), target_clips(videos)
    truth = plain_targets(imgs, 2, 8, rule).float()
    losses = torch.compile(model.patch_losses, fullgraph=True)(channels_first(imgs), truth)
    assert losses.max() < 5e-9


@pytest.mark.slow
def test_compiled_scripts_train_alike(videos, tmp_path):
    """Compilation changes weights by rounding only; it prints the first step's time."""
    flags = [*PRETRAIN, "--epochs", 1, "--path_to_data_dir", videos, "--batch_size", 1]
    flags += ["--accum_iter", 2, "--grad_checkpointing", "--output_dir"]
    states = {}
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        out = finish(spawn("main_pretrain.py", *flags, tmp_path / name, *more, ranks=2))
        assert ("first step, with compilation: " in out) == (name == "compiled"), out
        path = tmp_path / name / "checkpoint-00000.pth"
        states[name] = torch.load(path, weights_only=True)["model"]
    assert states["eager"].keys() == states["compiled"].keys()
    for name, weight in states["eager"].items():
        torch.testing.assert_close(states["compiled"][name], weight, rtol=1e-3, atol=1e-5)


def test_blocks_that_differ_in_drop_path_alone_share_their_compiled_code(monkeypatch):
    """A rate that is compiled in costs a compilation, and a longer search in every call."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = classifier(drop_path_rate=0.5, depth=8)
    model.compile_blocks()
    shares = [block.drop_path.share.item() for block in model.blocks[1:]]
    assert shares == pytest.approx([1 - 0.5 * i / 7 for i in range(1, 8)])
    for training, versions in ((True, 2), (False, 4)):  # the first block has no drop path
        model.train(training)(clips())
        assert counters["stats"]["unique_graphs"] == versions


@pytest.mark.slow
def test_compile_without_a_compiler_ends_in_one_sentence(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = [*PRETRAIN, "--path_to_data_dir", videos, "--output_dir", tmp_path, "--compile"]
    out = finish(spawn("main_pretrain.py", *flags), 2)
    assert "main_pretrain.py: error: --compile: torch.compile does not work here" in out
    assert "Traceback" not in out


# --- attention

INTERPRETED = """
import torch
from util.attention import attention
for N, L, nh, hd in [(2, 157, 2, 32), (1, 64, 1, 32), (2, 70, 2, 64), (1, 5, 3, 32)]:
    torch.manual_seed(0)
    qkv, direction = torch.randn(N, L, 3, nh, hd), torch.randn(N, L, nh, hd)
    results = []
    for x in (qkv.double().requires_grad_(), qkv.requires_grad_()):
        if x is qkv:
            output = attention(x)
        else:
            q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
            output = torch.softmax(q @ k.mT / hd**0.5, dim=-1) @ v
            output = output.transpose(1, 2)
        results.append([output, *torch.autograd.grad(output, x, direction.to(x.dtype))])
    for exact, ours in zip(*results):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
"""


def test_our_kernels_compute_attention_and_its_gradients(monkeypatch):
    """Triton interprets them; tests/test_gpu.py runs them on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = subprocess.run([sys.executable, "-c", INTERPRETED], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


@pytest.mark.parametrize(
    ("dtype", "tokens", "channels", "changes", "expected"),
    [
        (torch.bfloat16, 1569, 32, {}, True),
        (torch.float16, 157, 64, {}, True),
        (torch.bfloat16, 1569, 64, {}, False),
        (torch.bfloat16, 157, 80, {}, False),
        (torch.float32, 157, 32, {}, False),
        (torch.float64, 157, 32, {}, False),
        (torch.bfloat16, 157, 32, {"HAS_COMPILER": False}, False),
        (torch.float16, 157, 32, {"major": 7}, False),
    ],
)
def test_our_kernels_are_for_half_precision_on_gpus(
    monkeypatch, dtype, tokens, channels, changes, expected
):
    pytest.importorskip("triton")
    from util import attention

    gpu = argparse.Namespace(major=changes.get("major", 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(attention, "HAS_COMPILER", changes.get("HAS_COMPILER", True))
    shape = (2, tokens, 3, 2, channels)
    assert not attention.fits(torch.empty(shape, dtype=dtype))
    with FakeTensorMode():
        assert attention.fits(torch.empty(shape, dtype=dtype, device="cuda")) == expected


# --- decoding a part of the removed patches


def test_decoder_mask_ratio_zero_is_the_papers_loss():
    model = autoencoder()
    results = []
    for ratios in ((0.75,), (0.75, 0.0)):
        torch.manual_seed(1)
        results.append(model(clips(), *ratios))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls_through_decoder", [False, True])
def test_decoder_mask_ratio_decodes_a_random_part(cls_through_decoder):
    model = autoencoder(cls_through_decoder=cls_through_decoder)
    imgs, L = clips(), model.patch_embed.num_patches
    torch.manual_seed(1)
    _, _, removed = model(imgs, 0.75)
    torch.manual_seed(1)
    loss, pred, mask = model(imgs, 0.75, 0.5)
    kept = models_mae.num_visible(L, 0.75)
    assert mask.sum(dim=1).tolist() == [int((L - kept) * 0.5)] * 2
    assert torch.all(removed[mask == 1] == 1), "visible patches are no targets"
    assert torch.all(pred[mask == 0] == 0)
    assert torch.all(pred[mask == 1].abs().sum(dim=-1) > 0)
    target = model.patchify(model.target_frames(imgs))
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    error = (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean(dim=-1)
    torch.testing.assert_close(loss, error[mask == 1].mean())
    assert all(g.abs().sum() > 0 for g in gradients(model, loss).values())


def test_the_decoder_sees_the_decoded_patches_alone_and_in_their_places():
    """A decoder pass over K + M tokens, assembled here in another order, predicts the same."""
    model = autoencoder().double()
    imgs = clips().double()
    latent, _, ids_restore = model.forward_encoder(imgs, 0.75)
    pred = model.forward_part_of_decoder(latent, ids_restore, 0.5)
    N, K = latent.shape[:2]
    M = int((ids_restore.shape[1] - K) * 0.5)
    for n in range(N):
        order = ids_restore[n].argsort()
        tokens = torch.cat([model.decoder_embed(latent[n]), model.mask_token[0].expand(M, -1)])
        space = model.decoder_pos_embed_spatial[0]
        time = model.decoder_pos_embed_temporal[0]
        places = order[: K + M]
        tokens = tokens + space[places % len(space)] + time[places // len(space)]
        cls = (model.decoder_cls_token + model.decoder_pos_embed_class)[0]
        x = torch.cat([cls, tokens.flip(0)]).unsqueeze(0)  # attention ignores the order
        for block in model.decoder_blocks:
            x = block(x)
        out = model.decoder_pred(model.decoder_norm(x))[0, 1:].flip(0)
        torch.testing.assert_close(pred[n, places[K:]], out[K:])


def test_decoder_mask_ratio_saves_flops():
    whole, half = (
        count_flops(autoencoder(), CLIP, mask_ratio=0.9, decoder_mask_ratio=ratio)
        for ratio in (0.0, 0.5)
    )
    assert half < 0.75 * whole


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.999])
def test_a_decoder_mask_ratio_that_decodes_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="decoder_mask_ratio"):
        autoencoder()(clips(), 0.75, ratio)


# --- masked fine-tuning


def test_masked_classification_sees_the_kept_patches_alone():
    model = classifier().eval()
    imgs = clips()
    torch.manual_seed(1)
    logits = model(imgs, 0.5)
    torch.manual_seed(1)
    order = torch.rand(2, model.patch_embed.num_patches).argsort(dim=1)
    kept = order[:, : int(model.patch_embed.num_patches * 0.5)]
    x = model.embed(imgs)
    x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 128))], dim=1)
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(logits, model.head(model.norm(x[:, 1:].mean(dim=1))))


def test_masked_classification_at_zero_is_the_classifier():
    model = classifier().eval()
    assert torch.equal(model(clips(), 0.0), model(clips()))


def test_the_mask_ratio_of_fine_tuning_ends_at_zero():
    exact = [0.8 * 0.5 * (1 + math.cos(math.pi * step / 1000)) for step in range(1001)]
    values = [annealed_mask_ratio(step / 100, 0.8, 0.0, 10) for step in range(1001)]
    assert values == pytest.approx(exact, abs=0.005 + 1e-9)
    assert values == sorted(values, reverse=True)
    assert (values[0], values[500], values[-1]) == (0.8, 0.4, 0.0)
    assert len(set(values)) == 81, "kernels are planned for every number of tokens"


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_mask_ratio_that_keeps_nothing_is_refused(videos, tmp_path, capsys, ratio):
    flags = [*FINETUNE, "--path_to_data_dir", videos, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as caught:
        call(main_finetune, *flags, "--mask_ratio", ratio)
    assert caught.value.code == 2
    assert "argument --mask_ratio: " in capsys.readouterr().err


# --- benchmarks

TINY = "--model tiny --input_size 32 --num_frames 4 --batch_size 2 --repeats 1 --device cpu".split()


@pytest.mark.slow
def test_the_step_benchmark_prints_every_row(capsys):
    step_benchmark.main([*TINY, "--mask_ratio", "0", "0.9", "--precision", "fp32"])
    out = capsys.readouterr().out
    for row in ("pretrain mask 0 x", "pretrain mask 0.9 x", "finetune x", "test x"):
        assert f"ViT-tiny {row} 2 fp32" in out
    assert out.count("  ours ") == out.count("  plain ") == 4


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("given", [[], ["fp32"], ["bf16"]])
def test_the_step_benchmark_says_of_slow_devices_alone_that_bf16_is_slow(
    monkeypatch, capsys, is_fast, given
):
    measured = []
    monkeypatch.setattr(step_benchmark, "matrix_rate", lambda *_: 1.0)
    monkeypatch.setattr(step_benchmark, "measure", lambda row, *_: measured.append(row) or {})
    monkeypatch.setattr(step_benchmark.optim, "has_fast_bf16", lambda device: is_fast)
    step_benchmark.main([*TINY, "--task", "test", *["--precision"][: len(given)], *given])
    wanted = given or ["fp32", "bf16"][: 1 + is_fast]
    assert [row.precision for row in measured] == wanted
    assert ("bf16: not measured" in capsys.readouterr().out) == (not given and not is_fast)


@pytest.mark.parametrize("task", ["pretrain", "finetune", "test"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_plain_and_ours_take_the_same_step(task, mask_ratio):
    row = step_benchmark.Row(task, "tiny", 2, mask_ratio, "fp32", clip_shape=(3, 4, 32, 32))
    steps = [
        step_benchmark.Step(row, variant, torch.device("cpu")) for variant in ("plain", "ours")
    ]
    losses = [step.loss() for step in steps]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    if task == "test":
        return
    plain, ours = (gradients(step.model, loss) for step, loss in zip(steps, losses, strict=True))
    assert plain.keys() == ours.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-6)


def test_a_model_is_built_on_its_device_and_counted_once(monkeypatch):
    row = step_benchmark.Row("pretrain", "tiny", 2, 0.75, "fp32", clip_shape=(3, 4, 32, 32))
    built = []
    make_model = step_benchmark.make_model
    monkeypatch.setattr(
        step_benchmark,
        "make_model",
        lambda row, device: built.append(device) or make_model(row, device),
    )
    step_benchmark.gflops.cache_clear()
    assert step_benchmark.gflops(row) == step_benchmark.gflops(row) > 0
    assert [device.type for device in built] == ["meta"]
    assert all(p.is_meta for p in make_model(row, torch.device("meta")).parameters())


def test_the_profile_shows_kernels_and_their_kinds(tmp_path, capsys):
    path = tmp_path / "profile.txt"
    row = step_benchmark.Row("test", "tiny", 2, 0.0, "fp32", clip_shape=(3, 4, 32, 32))
    step = step_benchmark.Step(row, "ours", torch.device("cpu"))
    step_benchmark.print_profile(step, 1.0, path)
    lines = capsys.readouterr().out.splitlines()
    assert "aten::addmm" in path.read_text()
    assert any(line.startswith("  aten::addmm ") and " calls " in line for line in lines)
    kinds = lines[-1 - len(step_benchmark.KINDS) : -1]
    assert sum(float(line.split()[-3]) for line in kinds) > 0
    assert "of the 1000.00 ms of a usual step" in lines[-1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k32_sm80", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel<T>", "attention"),
        ("void unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("triton_poi_fused__to_copy_3", "copies and casts"),
        ("triton_poi_fused__to_copy_gelu_view_3", "other"),
        ("triton_per_fused__to_copy_add_native_layer_norm_0", "reductions and norms"),
        ("void vectorized_layer_norm_kernel<float, float>", "reductions and norms"),
        ("void vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "other"),
    ],
)
def test_the_profile_knows_the_kinds_of_kernels(name, kind):
    assert step_benchmark.kind_of(name) == kind


def test_the_attention_benchmark_finds_wrong_and_slow_kernels(monkeypatch, capsys):
    monkeypatch.setattr(attention, "SHAPES", [(2, 2, 9, 8)])
    milliseconds = iter([1.0, 1.0, 3.0, 3.0])  # flash, math: forward, both
    monkeypatch.setattr(attention, "milliseconds", lambda *_: next(milliseconds))
    attention.main(["--device", "cpu"])
    out = capsys.readouterr().out
    assert "the model takes FLASH_ATTENTION" in out
    assert "CUDNN_ATTENTION      not available" in out
    assert "the choices are right and fast" in out

    milliseconds = iter([1.0, 3.0, 1.0, 1.0])
    with pytest.raises(SystemExit):
        attention.main(["--device", "cpu", "--check"])
    assert "FLASH_ATTENTION is chosen, MATH is faster" in capsys.readouterr().out

    milliseconds = iter([1.0] * 4)
    monkeypatch.setattr(attention, "MAX_ERROR", 1e-9)
    with pytest.raises(SystemExit):
        attention.main(["--device", "cpu", "--check"])
    assert "FLASH_ATTENTION is chosen and wrong" in capsys.readouterr().out


def test_nothing_is_timed_when_losses_differ(monkeypatch):
    monkeypatch.setattr(step_benchmark, "matrix_rate", lambda *_: 1.0)
    monkeypatch.setattr(step_benchmark.PlainAttention, "forward", lambda self, x: x)
    with pytest.raises(SystemExit, match="nothing timed"):
        step_benchmark.main([*TINY, "--task", "test", "--precision", "fp32"])


@pytest.mark.parametrize(
    ("size", "task", "mask_ratio", "published"),
    [
        ("base", "test", 0.0, 180.0),
        ("large", "test", 0.0, 598.0),
        ("huge", "test", 0.0, 1193.0),
        ("large", "pretrain", 0.0, 627.5),
    ],
)
def test_flops_are_the_published_ones(size, task, mask_ratio, published):
    counted = step_benchmark.gflops(step_benchmark.Row(task, size, 1, mask_ratio, "fp32"))
    assert counted == pytest.approx(published, rel=5e-3)


def test_flops_of_the_masked_step_are_below_the_papers_by_the_patches_not_embedded():
    """The paper's 81.0 G embeds all 1568 patches by a convolution, we embed the 156 visible."""
    counted = step_benchmark.gflops(step_benchmark.Row("pretrain", "large", 1, 0.9, "fp32"))
    not_embedded = (1568 - 156) * 1024 * 2 * 16 * 16 * 3 / 1e9
    assert counted + not_embedded == pytest.approx(81.0, rel=1e-2)


def test_check_names_what_was_missed():
    row = step_benchmark.Row("pretrain", "base", 2, 0.9, "fp32")
    good = step_benchmark.Result(1.0, 1.0, 3.1, 1.0, 0.5, 0.9)
    slow = step_benchmark.Result(1.0, 1.0, 2.9, 1.0, 0.7, 0.9)
    cpu = torch.device("cpu")
    assert step_benchmark.check({row: {"plain": good, "ours": good}}, cpu) == []
    missed = step_benchmark.check({row: {"plain": good, "ours": slow}}, cpu)
    assert len(missed) == 2
    assert "speed over plain 2.90, wanted at least 3.00" in missed[1]


@pytest.mark.slow
def test_scaling_reproduces_the_papers_hours(capsys):
    """128 GPUs with 17 clips/s each take 24.5 h for 800 effective epochs of 240,000 videos."""
    scaling.main(["--max_gpus", "128", "--gpu_clips", "17"])
    table = capsys.readouterr().out.split("pretrain_vit_large")[1].split("pretrain_vit_huge")[0]
    last = table.strip().splitlines()[-1].split()
    assert last[0] == "128"
    assert float(last[-2]) == pytest.approx(24.5, abs=0.1)


def test_scaling_finds_what_limits():
    recipe = scaling.Recipe("pretrain_vit_large", 800, 8, 80.0, 300_000_000)
    machine = {"gpu_clips": 400.0, "loader_clips": (50.0, 30.0), "cores": 10, "node_gpus": 8,
               "node_link": 200.0, "link": 100.0, "gradient_bytes": 4}  # fmt: skip

    def limit(gpus, **changes):
        return scaling.speed(recipe, 80.0, argparse.Namespace(**(machine | changes)), gpus).limit

    assert limit(1) == "GPU"
    assert limit(1, cores=4) == "loader"
    assert limit(16, link=1.0) == "network"
    assert limit(8, link=1.0) == "GPU", "one machine does not use the slow link"
