"""speedrun.sh itself, with the Python behind it replaced by a stand-in that shows how it was called."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import SLOW, told_thrice
from test_training import SIZES, home  # noqa: F401 (home is a fixture)

from nanochat import checkpoint
from nanochat.log import read_log
from nanochat.run import Run

ROOT = Path(__file__).parent.parent

PLAN = """RUN='a run'
RUN_DIR={folder}
STAGES=(tokenizer base mid sft eval report)
GPUS={gpus}
DATA=embedded
DEVICE=cpu
TOKENIZER=(--vocab-size=300)
BASE=(--depth=2)
MID=()
SFT=(--num-iterations=3)
CORE=()
CHAT=(--max-problems=7)
"""

STAND_IN = """#!/usr/bin/env bash
echo "called: $*"
case "$*" in
    *scripts.plan*) while [ $# -gt 1 ]; do shift; done; cat {plan} > "$1" ;;
    *"{fails}"*) exit {code} ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """speedrun.sh in a copy of its own, with a stand-in for Python and one for the installation."""

    def start(*args, gpus=1, fails="nothing at all", code=0, cwd=None, **variables):
        root = tmp_path / "root"
        (root / "scripts").mkdir(parents=True, exist_ok=True)
        (root / "speedrun.sh").write_text((ROOT / "speedrun.sh").read_text())
        (root / "plan").write_text(PLAN.format(folder=tmp_path, gpus=gpus))
        python = root / "python"
        python.write_text(STAND_IN.format(plan=root / "plan", fails=fails, code=code))
        python.chmod(0o755)
        (root / "scripts" / "venv.sh").write_text(f"PATH={root}:$PATH\n")
        return subprocess.run(
            ["bash", root / "speedrun.sh", *args], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL,
            env=dict(os.environ, **variables),
        )  # fmt: skip

    return start


REAL = """#!/usr/bin/env bash
case "$*" in
    *scripts.plan*) while [ $# -gt 1 ]; do shift; done; cat {plan} > "$1" ;;
    *) exec {python} "$@" ;;
esac
"""
SIGNALS = dict(INT=signal.SIGINT, TERM=signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("gpus", [1, 2])
def test_told_to_stop_by_real_signals_it_has_saved_every_step(home, tmp_path, name, whole_group, gpus):  # noqa: F811
    """Thrice within a second: to the process group, as by a terminal, or to the shell alone, as by docker stop."""
    (tmp_path / "slow.py").write_text(SLOW)
    root = tmp_path / "root"
    (root / "scripts").mkdir(parents=True)
    more = ["--num-iterations=100000", "--eval-every=-1", "--device-type=cpu"]
    flags = shlex.join([f"--data={home / 'text.jsonl'}", *SIZES, *more])
    made = PLAN.format(folder=tmp_path, gpus=gpus).replace("a run", "b").replace("--depth=2", flags)
    (root / "plan").write_text(made.replace("(tokenizer base mid sft eval report)", "(base mid)"))
    shell = (ROOT / "speedrun.sh").read_text().replace("scripts.base_train", "slow")
    (root / "speedrun.sh").write_text(shell)
    (root / "python").write_text(REAL.format(plan=root / "plan", python=sys.executable))
    (root / "python").chmod(0o755)
    (root / "scripts" / "venv.sh").write_text(f"PATH={root}:$PATH\nexport PYTHONPATH={tmp_path}:{ROOT}\ncd {ROOT}\n")
    process = subprocess.Popen(
        ["bash", root / "speedrun.sh"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env=dict(os.environ, OMP_NUM_THREADS="1"),
    )  # fmt: skip
    folder = Run.open("b").stage("base")
    said, error = told_thrice(process, folder, os.killpg if whole_group else os.kill, SIGNALS[name])
    assert process.returncode == 75, error
    assert "Traceback" not in error and "error:" not in error and "mid_train" not in said
    saved = checkpoint.latest(folder).step
    assert saved == read_log(folder / "log.jsonl")[-1]["step"] >= 5  # none was lost


def calls(done):
    return [line.removeprefix("called: ") for line in done.stdout.splitlines() if line.startswith("called: ")]


def test_the_stages_in_their_order(run, tmp_path):
    for stage in ("base", "mid", "sft"):
        (tmp_path / stage).mkdir()
    done = run()
    assert done.returncode == 0, done.stderr
    names = [call.split("scripts.")[1].split()[0] for call in calls(done)]
    train = ["plan", "tok_train", "tok_eval", "base_train", "mid_train", "chat_sft"]
    assert names == [*train, "base_eval", "chat_eval", "chat_eval", "chat_eval", "report"]
    assert "-m scripts.base_train --run=a run --depth=2" in calls(done)
    assert "chat_cli" in done.stdout


def test_several_gpus_go_through_the_launcher(run):
    base = [call for call in calls(run(gpus=8)) if "base_train" in call]
    assert base == ["-m scripts.launch --gpus 8 scripts.base_train -- --run=a run --depth=2"]


SLURM = dict(SLURM_STEP_NUM_NODES="2", SLURM_STEP_NUM_TASKS="2", MASTER_ADDR="first", MASTER_PORT="4000")
OTHER = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="first", MASTER_PORT="4000")


@pytest.mark.parametrize("variables, which", [(SLURM, "SLURM_NODEID"), (OTHER, "RANK")])
def test_on_several_machines_torchrun_trains_and_the_first_does_the_rest(run, tmp_path, variables, which):
    (tmp_path / "base").mkdir()
    first, second = (run(gpus=8, **variables, **{which: str(node)}) for node in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    training = []
    for node, done in enumerate((first, second)):
        assert f"scripts.plan --nodes=2 --node={node} --head=first:4001 --write" in calls(done)[0]
        training.append([call for call in calls(done) if "torch.distributed.run" in call])
        assert training[node][0] == (
            f"-m torch.distributed.run --nnodes=2 --node-rank={node} --nproc-per-node=8 --master-addr=first "
            "--master-port=4002 --rdzv-conf=timeout=7200 --shutdown-timeout=600 -m scripts.base_train -- "
            "--run=a run --depth=2"
        )
        ports = [call.split("--master-port=")[1].split()[0] for call in training[node]]
        assert ports == ["4002", "4003", "4004"] and "chat_sft" in training[node][2]
    assert calls(second)[1:] == training[1] and "chat_cli" not in second.stdout
    alone = [call.split("scripts.")[1].split()[0] for call in calls(first)[1:] if call not in training[0]]
    assert alone == ["tok_train", "tok_eval", "base_eval", "chat_eval", "report"] and "chat_cli" in first.stdout


@pytest.mark.parametrize(
    "change, words",
    [(dict(MASTER_ADDR=""), "MASTER_ADDR"), (dict(SLURM_STEP_NUM_TASKS="16"), "once on each machine")],
)
def test_machines_that_are_told_too_little_are_an_error(run, change, words):
    done = run(**{**SLURM, **change})
    assert done.returncode == 2 and words in done.stderr and not calls(done)


NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES",
           "SLURM_STEP_NUM_TASKS", "SLURM_NODEID")  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nonsense", "-1", "08", "1.5", "x[$(echo called >&2)]", "99999999999999999999"])
def test_what_no_launcher_sets_is_one_sentence(run, name, value):
    done = run(**{name: value})
    assert done.returncode == 2 and done.stderr.startswith(f"error: {name} is '{value}', wanted a whole number")
    assert done.stderr.count("\n") == 1 and not calls(done)


TOO_MANY = [
    dict(WORLD_SIZE="0"),
    dict(OTHER, RANK="2"),
    dict(SLURM, SLURM_NODEID="7"),
    dict(OTHER, MASTER_PORT="65536"),
]


@pytest.mark.parametrize("variables", TOO_MANY)
def test_numbers_that_do_not_fit_are_one_sentence(run, variables):
    done = run(**variables)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not calls(done)


def test_a_folder_for_temporary_files_that_is_none(run):
    assert run(TMPDIR="/nonexistent/folder").returncode == 0


def test_the_folder_may_be_called_anything(run, tmp_path):
    """A dash, blanks, quotes and other letters in its name, another folder of that name where CDPATH leads."""
    assert run().returncode == 0
    odd = tmp_path / "-a 'b\" é春\n$x"
    (tmp_path / "root").rename(odd)
    (odd / "python").write_text(STAND_IN.format(plan=shlex.quote(str(odd / "plan")), fails="nothing", code=0))
    (odd / "scripts" / "venv.sh").write_text(f"PATH={shlex.quote(str(odd))}:$PATH\npwd\n")
    other = tmp_path / "other"
    (other / odd.name).mkdir(parents=True)
    done = subprocess.run(
        ["bash", "--", f"{odd.name}/speedrun.sh"], cwd=tmp_path, env=dict(os.environ, CDPATH=str(other)),
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith(f"{odd}\ncalled: -m scripts.plan --write")


def test_one_machine_of_a_scheduler_is_like_any_other(run):
    done = run(gpus=8, SLURM_STEP_NUM_NODES="1", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="1")
    assert any("scripts.launch --gpus 8" in call for call in calls(done)) and "--nodes" not in calls(done)[0]
    assert not done.stderr


def test_a_job_of_several_machines_without_srun_says_that_one_trains(run):
    done = run(SLURM_JOB_NUM_NODES="4")
    assert done.returncode == 0 and "4 machines, and only this one trains" in done.stderr and calls(done)


@pytest.mark.parametrize("code, more", [(2, 0), (75, 0), (1, 1), (137, 1)])
def test_a_stage_that_fails_ends_the_run_with_its_code(run, code, more):
    done = run(fails="mid_train", code=code)
    assert done.returncode == code
    assert not [call for call in calls(done) if "chat_sft" in call]
    assert done.stderr.count("\n") == more


def test_an_evaluation_that_fails_leaves_the_others_and_the_report(run, tmp_path):
    for stage in ("base", "mid", "sft"):
        (tmp_path / stage).mkdir()
    done = run(fails="chat_eval --run=a run --source=base", code=1)
    assert done.returncode == 1
    names = [call.split("scripts.")[1].split()[0] for call in calls(done)]
    assert names[-5:] == ["base_eval", "chat_eval", "chat_eval", "chat_eval", "report"]
    stopped = run(fails="base_eval", code=75)
    assert stopped.returncode == 75 and "base_eval" in calls(stopped)[-1]


def test_what_is_evaluated_is_as_planned(run, tmp_path, monkeypatch):
    (tmp_path / "sft").mkdir()
    assert [call for call in calls(run()) if "_eval" in call][-1].endswith("--device-type=cpu --max-problems=7")
    assert not [call for call in calls(run()) if "--eval=core" in call]
    monkeypatch.setitem(globals(), "PLAN", PLAN.replace("CORE=()", "CORE=(--eval=core --max-per-task=3)"))
    core = [call for call in calls(run()) if "--eval=core" in call]
    assert core == ["-m scripts.base_eval --run=a run --source=base --device-type=cpu --eval=core --max-per-task=3"]
    monkeypatch.setitem(globals(), "PLAN", PLAN.replace("CHAT=(--max-problems=7)", "CHAT=()"))
    assert not [call for call in calls(run()) if "chat_eval" in call]


def test_paths_are_meant_from_where_the_user_stands(run, tmp_path):
    for words in (["--data", "mine.txt"], ["--data=mine.txt"]):
        assert f"{tmp_path}/mine.txt" in calls(run(*words, cwd=tmp_path))[0]
    for words in (["--data", "hub"], ["--data=/a/b.txt"], ["--run", "mine.txt"]):
        assert " ".join(words) in calls(run(*words, cwd=tmp_path))[0]


@pytest.mark.parametrize("words", [["--data", ""], ["--data="], ["--depth", "2", "--data", ""]])
def test_data_of_a_variable_that_is_not_set_is_an_error(run, tmp_path, words):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --data is empty") and done.stderr.count("\n") == 1
    assert not calls(done)


def test_paths_in_the_environment_are_meant_from_where_the_user_stands(run, tmp_path, monkeypatch):
    show = 'echo "called: $NANOCHAT_BASE_DIR,$NANOCHAT_HUB_ROOT,$NANOCHAT_PYTHON,$TMPDIR"\n'
    monkeypatch.setitem(globals(), "STAND_IN", STAND_IN + show)
    names = ("NANOCHAT_BASE_DIR", "NANOCHAT_HUB_ROOT", "NANOCHAT_PYTHON", "TMPDIR")
    run()  # makes the folder
    given = dict(zip(names, ("runs", "../hub", "root/python", "./tmp")))
    stay = dict(zip(names, ("~/runs", "/hub", "python", "")))
    wanted = ",".join(f"{tmp_path}/{path}" for path in given.values())
    assert wanted in calls(run(cwd=tmp_path, **given))
    assert "~/runs,/hub,python," in calls(run(cwd=tmp_path, **stay))
    (tmp_path / "root" / "tests").mkdir()
    script = shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "root" / "tests")
    (tmp_path / "root" / "scripts" / "venv.sh").write_text(f"{show}exit\n")
    given["NANOCHAT_BASE_DIR"] = f"{tmp_path}/runs"  # of which the tests make their own
    done = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, **given))
    assert calls(done) == [wanted]


def test_rl_comes_after_sft_where_the_plan_has_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PLAN", PLAN.replace("sft eval", "sft rl eval") + "RL=(--questions=8)\n")
    for stage in ("sft", "rl"):
        (tmp_path / stage).mkdir()
    said = calls(run())
    names = [call.split("scripts.")[1].split()[0] for call in said]
    assert names[5:] == ["chat_sft", "chat_rl", "base_eval", "chat_eval", "chat_eval", "report"]
    assert "-m scripts.chat_rl --run=a run --questions=8" in said and "--source=rl" in said[-2]
