"""Devices and process groups as the environment describes them."""

import os
import re

import pytest
import torch

from tests.test_scripts import free_port
from util import dist, run
from util.errors import UserError

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


def test_the_main_address_is_of_the_steps_own_nodes(environment):
    """A step may run on some of the job's nodes."""
    os.environ["SLURM_STEP_NODELIST"] = "gpu[09-10]"
    dist.adopt_slurm_step()
    assert os.environ["MASTER_ADDR"] == "gpu09"


@pytest.mark.parametrize("value", [None, "", "x", "-1", "1e3", "99999999999"])
@pytest.mark.parametrize(
    "name",
    ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "SLURM_PROCID", "SLURM_LOCALID"],
)
def test_a_wrong_variable_of_slurm_is_named(environment, name, value):
    del os.environ[name]
    os.environ |= {} if value is None else {name: value}
    with pytest.raises(UserError, match=f"{name} is .*; start all ranks with torchrun") as caught:
        dist.adopt_slurm_step()
    assert caught.value.status == 1


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"RANK": None}, "RANK is missing"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": None}, "MASTER_PORT is missing"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is missing"),
        ({"RANK": "2"}, "RANK is '2', not a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0', not a whole number from 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE is 'all'"),
    ],
)
def test_a_wrong_variable_of_torchrun_is_named(environment, variables, wrong):
    """Before, RANK 2 of 2 waited for half an hour, and the others ended in tracebacks."""
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29"}
    for name, value in variables.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    with pytest.raises(UserError, match=wrong) as caught:
        dist.init_distributed("cpu", 0.05)
    assert caught.value.status == 1


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


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "0"}, {"RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "1"}, {"SLURM_PTY_PORT": "5"}],
)
def test_a_rank_that_waits_in_vain_says_so(environment, capfd, variables):
    """The first rank of a node tells at once what it waits for; all give up after --dist_timeout.

    In a shell of `srun --pty`, the other tasks of the step never start anything.
    """
    port = free_port()
    if "RANK" in variables:
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    else:
        os.environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        os.environ |= {"SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), **variables}
    dist.adopt_slurm_step()
    with pytest.raises(SystemExit) as end:
        run.run(lambda _: dist.init_distributed("cpu", 1 / 60), lambda argv: None)
    out, err = capfd.readouterr()
    assert end.value.code == 1, err
    first = "rank 1: " if variables.get("RANK") == "1" else ""
    waiting = f"^{first}waiting for 2 ranks at \\w+[.\\w]*:{port}"
    found = re.findall(waiting, out, re.MULTILINE)
    assert len(found) == ("LOCAL_RANK" not in variables), out
    assert ("`srun --pty`" in out) == ("SLURM_PTY_PORT" in variables)
    (sentence,) = [line for line in err.splitlines() if "error: " in line]
    assert "error: 2 ranks did not meet at" in sentence and "--dist_timeout" in sentence
    assert "start all ranks with torchrun or `srun python ...`" in sentence
    assert "Traceback" not in err and "frame #" not in err
