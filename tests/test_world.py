"""A launcher's variables that fit nothing are one sentence, before anybody waits for ranks that never come."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist

from kernels import dispatch, rms_norm, use
from nanochat import world
from nanochat.errors import UserError
from nanochat.processes import LAUNCHER

ROOT = Path(__file__).parent.parent
HERE = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")

WRONG = ("abc", "", "-1", "0.0", "1e3", "٣", "9" * 30)


@pytest.fixture
def variables(monkeypatch):
    def given(**values):
        for name in (*world.DEFAULTS, *HERE):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return given


@pytest.mark.parametrize(
    "values, words",
    [
        *(({name: value}, f"{name} is {value!r}, wanted a whole number") for name in world.DEFAULTS for value in WRONG),
        (dict(RANK="3"), "RANK is 3 and WORLD_SIZE 1, wanted a rank below"),
        (dict(RANK="1", LOCAL_RANK="7", WORLD_SIZE="2"), "LOCAL_RANK is 7 and WORLD_SIZE 2"),
        (dict(WORLD_SIZE="0"), "RANK is 0 and WORLD_SIZE 0"),
        (dict(WORLD_SIZE="2", **HERE), "WORLD_SIZE is 2, but RANK is not set"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_PORT="29500"), "but MASTER_ADDR is not set"),
        (dict(HERE, WORLD_SIZE="2", RANK="0", MASTER_PORT=""), "but MASTER_PORT is not set"),
        (dict(HERE, WORLD_SIZE="2", RANK="0", MASTER_PORT="x"), "MASTER_PORT is 'x', wanted a whole number"),
        (dict(HERE, WORLD_SIZE="2", RANK="0", MASTER_PORT="65536"), "MASTER_PORT is 65536, wanted at most 65535"),
    ],
)  # fmt: skip
def test_variables_that_no_launcher_sets_are_refused(variables, values, words):
    variables(**values)
    with pytest.raises(UserError, match="unset RANK LOCAL_RANK WORLD_SIZE") as excinfo:
        world.place()
    assert words in str(excinfo.value)


def test_without_a_launcher_and_with_one(variables):
    variables()
    assert world.place() == (0, 0, 1)
    variables(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", **HERE)
    assert world.place() == (5, 1, 8)


def test_who_waits_says_for_whom_and_an_address_of_nobody_is_one_sentence(variables, monkeypatch, capsys):
    variables(**HERE)

    def fail(*_, **__):
        time.sleep(0.2)
        raise dist.DistNetworkError("no such host\nand a stack")

    monkeypatch.setattr(world, "TO_BE_SAID", 0.05)
    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(UserError, match=r"rank 1 of 2 cannot meet .* 29500: no such host; a launcher"):
        world.meet("gloo", None, 1, 2)
    assert capsys.readouterr().out.startswith("note: rank 1 waits for the others of WORLD_SIZE 2 at MASTER_ADDR 127.0")


def test_where_nccl_does_not_start_its_last_line_is_told(variables, monkeypatch):
    variables(**HERE)
    wrong = (
        "NCCL error in: NCCLUtils.cpp:77, unhandled system error, NCCL version 2.28.9\nncclSystemError: System call\n"
        "Last error:\nError while creating shared memory segment /dev/shm/nccl-x (size 9637888)\n"
    )

    def fail(*_, **__):
        raise dist.DistBackendError(wrong)

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(UserError) as told:
        world.meet("nccl", torch.device("cuda:1"), 1, 2)
    assert str(told.value) == (
        "rank 1 of 2: NCCL could not start: Error while creating shared memory segment /dev/shm/nccl-x (size 9637888); "
        "NCCL_DEBUG=INFO says more; in docker: --ipc=host (or --shm-size)"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("value", ["abc", "1"])
def test_a_launcher_that_is_not_there_is_one_sentence(value):
    command = [sys.executable, "-c", "from nanochat.flags import run_script; run_script(print)"]
    ran = subprocess.run(command, cwd=ROOT, env=dict(os.environ, **{LAUNCHER: value}), capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"error: the launcher of this rank, process {value}, is gone; call it again, or unset {LAUNCHER}\n"
    )


def test_kernels_that_are_asked_for_and_cannot_run_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)

    def main():
        with use("triton"):
            rms_norm(torch.zeros(2, 4))

    assert tiny.called(main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rms_norm: Triton is asked for (NANOCHAT_KERNELS") and error.count("\n") == 1
