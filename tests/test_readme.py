"""README's commands: each names a script and flags that are there; what a CPU can run is run (by name: minutes)."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
from test_training import ROOT

from profiling.__main__ import COMMANDS as COMMANDS_OF_THE_LAB

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line.split("  #")[0].replace(" …", "").strip() for block in BLOCKS for line in block.splitlines()]
# What is not run here: installing and training whole (tests/test_speedrun.py), and servers (test_web.py, test_load.py).
ELSEWHERE = (
    "bash speedrun.sh",
    "bash tests/run.sh",
    "source ",
    "NANOCHAT_KERNELS=torch bash",
    ".venv/bin/python -m scripts.chat",
)
# Commands that have to be refused on a CPU, or as they stand in the README; with what they then say.
REFUSED = {
    "python -m kernels tune": "CUDA",
    "python -m profiling calibrate": "no CUDA device",
    "python -m profiling trace before.json.gz": "cannot be read",
    "python -m profiling diff": "cannot be read",
    "python -m benchmarks compare": "cannot be read",
    "python -m benchmarks.vs_upstream": "there is no nanochat/gpt.py in it",
    "python -m benchmarks.core_eval": "there is no nanochat/core_eval.py in it",
    "TRITON_INTERPRET=1": "no tokenizer",
    "python -m scripts.base_train --profile": "no tokenizer",
    "python -m scripts.chat_eval --profile": "nothing is finished",
    "python -m scripts.export --run mine": "nothing is finished",  # and is done after the run's block
    "python -m scripts.export --to parquet": "--data PATH does not exist",
    "python -m scripts.import_model PATH": "PATH is no folder",
}
HAND = COMMANDS.index("source .venv/bin/activate") + 1
BY_HAND = COMMANDS[HAND : HAND + 8]


def module(command):
    """What `python -m` runs; of the lab's commands, the module that a command is in."""
    name, word = re.search(r"python -m ([\w.]+)(?: (\w+))?", command).groups()
    return COMMANDS_OF_THE_LAB[word] if name == "profiling" else name


def run(command, home, **environment):
    where = {**os.environ, "NANOCHAT_BASE_DIR": str(home), "CUDA_VISIBLE_DEVICES": "", **environment}
    where.pop("TRITON_INTERPRET", None)
    command = command.replace(".venv/bin/python", "python").replace("python", shlex.quote(sys.executable), 1)
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=where, capture_output=True, text=True)


def test_every_command_names_what_is_there():
    assert len(COMMANDS) > 25 and len(BY_HAND) == 8 and module(BY_HAND[-1]) == "scripts.report"
    for command in COMMANDS:
        if "python -m" in command:
            assert importlib.util.find_spec(module(command)), command
            text = (ROOT / (module(command).replace(".", "/") + ".py")).resolve()
            source = (text if text.exists() else text.with_suffix("") / "__main__.py").read_text("utf-8")
            for flag in re.findall(r"--([a-z][\w-]+)", command.split("speedrun.sh")[0]):
                there = (
                    flag in source
                    or flag.replace("-", "_") in source
                    or module(command).endswith(("mid_train", "chat_sft", "chat_rl"))
                )
                assert there, (command, flag)


REFUSALS = [command for command in COMMANDS if command.startswith(tuple(REFUSED))]


def test_all_that_is_to_be_refused_is_in_the_readme():
    assert len(REFUSALS) >= len(REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("command", REFUSALS)
def test_what_cannot_be_done_here_is_refused_in_one_sentence(command, tmp_path):
    wanted = next(said for start, said in REFUSED.items() if command.startswith(start))
    ended = run(command, tmp_path)
    assert ended.returncode == 2 and wanted in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("error: ") == 1


OTHERS = [
    command
    for command in COMMANDS
    if "python -m" in command and not command.startswith((*REFUSED, *ELSEWHERE)) and command not in BY_HAND
]


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_what_can_be_done_here_is_done(command, tmp_path):
    """Each a minute or less, but for static pages and a compiled step's memory (no more than some minutes)."""
    ended = run(command, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_by_hand(tmp_path, shared):
    """The whole block, as it stands, and what its run goes out and in with: about 20 minutes on 2 cores."""
    plain, upstream = (command for command in COMMANDS if command.startswith("python -m scripts.export --run mine"))
    exports = [f"{plain} --out {tmp_path}/hf", upstream.replace("DIR", f"{tmp_path}/out")]
    theirs = f"python -m scripts.import_model {tmp_path}/hf --run theirs"
    for command in [*BY_HAND, *exports, theirs]:
        ended = run(command, tmp_path, NANOCHAT_HUB_ROOT=str(shared / "data" / "hub"))
        assert ended.returncode == 0, (command, ended.stdout[-1000:], ended.stderr[-2000:])
        assert ended.stdout, command
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
