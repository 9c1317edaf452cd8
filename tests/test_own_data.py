"""All commands of OWN_DATA.md run, in their order, from a folder of videos to predictions."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models_mae
from tests.test_docs import check_tensorboard
from util.synthetic import write_dataset

ROOT = Path(__file__).parent.parent
SIZES = "--model {} --input_size 64 --num_frames 16 --t_patch_size 2"
# what the page does on 8 GPUs with ViT-L, here on 2 ranks with the tiny model
SMALLER = {
    "continued_pretrain.args": f"{SIZES.format('mae_vit_tiny_patch8')} --repeat_aug 1",
    "finetune_ucf101.args": f"{SIZES.format('vit_tiny_patch8')} --repeat_aug 1",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "OWN_DATA.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines()]


def write_world(folder: Path) -> None:
    """Write what the page begins with: class folders of videos, and a released checkpoint."""
    for path in ROOT.iterdir():
        if path.name in ("util", "demo", "benchmarks", "recipes") or path.suffix == ".py":
            (folder / path.name).symlink_to(path)
    videos = write_dataset(
        folder / "synthetic", num_videos=40, num_val=1, num_test=1, num_classes=2
    )
    names = sorted((videos / "videos").iterdir())
    for name, source in zip(("point", "wave"), names, strict=True):
        shutil.copytree(source, folder / "VIDEOS" / name)
    first = min((folder / "VIDEOS/wave").iterdir())
    shutil.copy(first, folder / "new.mp4")
    first.rename(first.with_name("a.mp4"))
    (folder / "k400").mkdir()
    model = models_mae.mae_vit_tiny_patch8(img_size=64, pred_t_dim=8, decoder_embed_dim=64)
    checkpoint = {"model": model.state_dict(), "arguments": model.arguments}
    torch.save(checkpoint, folder / "k400/vit_large")


def shortened(command: str) -> list[str]:
    """Return a command with two epochs and, instead of 8 GPUs, two ranks."""
    command = command.replace("-00199.pth", "-00001.pth").replace("-00059.pth", "-00001.pth")
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 2")
    command = command.replace("--time_loader 20", "--time_loader 2")
    if "recipes/" in command:
        command += " --epochs 2 --warmup_epochs 0 --batch_size 4 --device cpu --num_workers 1"
    for recipe, flags in SMALLER.items():
        command += f" {flags}" if recipe in command else ""
    words = shlex.split(command)
    launcher = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    return [sys.executable, *launcher, *words[1:]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page(tmp_path):
    write_world(tmp_path)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    outputs = []
    for command in commands():
        if command.startswith("tensorboard"):
            check_tensorboard(shlex.split(command))
            continue
        done = subprocess.run(
            shortened(command), cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)

    # what the page promises of the commands on the way
    everything = "\n".join(outputs)
    assert "updates" in everything
    log = (tmp_path / "output/mine/log.txt").read_text().splitlines()
    assert "probe_knn_acc1" in json.loads(log[-1])
    with open(tmp_path / "output/mine_prediction/predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)  # of the last test, of new.mp4
    assert {row["name"]} <= {"wave", "point"}
    assert list(tmp_path.glob("output/mine_features/*.npz"))
