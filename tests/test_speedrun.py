"""speedrun.sh itself, with the Python behind it replaced by a stand-in that shows how it was called."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PLAN = """RUN='a run'
RUN_DIR={folder}
STAGES=(tokenizer base mid sft eval report)
GPUS={gpus}
DATA=embedded
CHAT_DATA=embedded
DEVICE=cpu
TOKENIZER=(--vocab-size=300)
BASE=(--depth=2)
MID=()
SFT=(--num-iterations=3)
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

    def start(*args, gpus=1, fails="nothing at all", code=0, cwd=None):
        root = tmp_path / "root"
        (root / "scripts").mkdir(parents=True, exist_ok=True)
        (root / "speedrun.sh").write_text((ROOT / "speedrun.sh").read_text())
        (root / "plan").write_text(PLAN.format(folder=tmp_path, gpus=gpus))
        python = root / "python"
        python.write_text(STAND_IN.format(plan=root / "plan", fails=fails, code=code))
        python.chmod(0o755)
        (root / "scripts" / "venv.sh").write_text(f"PATH={root}:$PATH\n")
        return subprocess.run(
            ["bash", root / "speedrun.sh", *args], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL
        )

    return start


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


@pytest.mark.parametrize("code, more", [(2, 0), (75, 0), (1, 1), (137, 1)])
def test_a_stage_that_fails_ends_the_run_with_its_code(run, code, more):
    done = run(fails="mid_train", code=code)
    assert done.returncode == code
    assert not [call for call in calls(done) if "chat_sft" in call]
    assert done.stderr.count("\n") == more


def test_paths_are_meant_from_where_the_user_stands(run, tmp_path):
    for words in (["--data", "mine.txt"], ["--data=mine.txt"]):
        assert f"{tmp_path}/mine.txt" in calls(run(*words, cwd=tmp_path))[0]
    for words in (["--data", "hub"], ["--data=/a/b.txt"], ["--run", "mine.txt"]):
        assert " ".join(words) in calls(run(*words, cwd=tmp_path))[0]
