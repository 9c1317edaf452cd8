"""Devices and process groups as the environment describes them."""

import os
import subprocess
import sys

import pytest
import torch

from util import dist

STEP = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07,09-10]",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Set variables of a job step, in an environment without any."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= STEP


def test_srun_step_becomes_a_process_group(environment):
    dist.adopt_slurm_step()
    expected = {"RANK": "4", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    assert {name: os.environ[name] for name in expected} == expected
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


@pytest.mark.parametrize("variables", [{"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}])
def test_single_task_and_torchrun_inside_a_step_are_left_alone(environment, variables):
    os.environ |= variables
    dist.adopt_slurm_step()
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize(
    ("restarts", "shared", "warned"),
    [("2", "True", True), ("2", "False", False), ("0", "True", False)],
)
def test_restarts_need_a_store_of_their_own(environment, capsys, restarts, shared, warned):
    os.environ |= {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
    dist.warn_of_stale_store()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("name", ["tpu", "cuda" if not torch.cuda.is_available() else "cuda:99"])
def test_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=name.removeprefix("cuda:")):
        dist.get_device(name)


def test_rank_that_never_comes_ends_the_others():
    """The second rank is missing: the first gives up after the timeout instead of hanging."""
    code = "from util.dist import init_distributed; init_distributed('cpu', 3 / 60)"
    rank = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | rank, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "imeout" in done.stderr or "imed out" in done.stderr
