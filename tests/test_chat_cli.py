"""`scripts.chat_cli` as a process, with a model that was really trained: pipes, and what a terminal must not see."""

import os
import subprocess
import sys

import pytest
import talker
from test_training import ROOT

from nanochat.chat import printable


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    environment = dict(os.environ, NANOCHAT_DTYPE="float32")
    environment["NANOCHAT_BASE_DIR"] = str(talker.trained(tmp_path_factory))

    def run(typed, *flags, shell=""):
        words = [sys.executable, "-m", "scripts.chat_cli", f"--run={talker.RUN}", *flags]
        command = ["bash", "-c", f"set -o pipefail; {' '.join(words)} {shell}"] if shell else words
        return subprocess.run(command, cwd=ROOT, env=environment, input=typed, capture_output=True, text=True)

    return run


def test_a_conversation_through_a_pipe(chat):
    ended = chat("/temperature 0\nWhat is 27 + 58?\n\nWho are you?\n/nonsense\n/clear\nHello!\n")
    assert ended.returncode == 0 and not ended.stderr
    for said in ("[python: 27 + 58 = 85] 27 + 58 is 85.", talker.ANSWERS["Who are you?"], talker.ANSWERS["Hello!"],
                 "There is no command /nonsense", "one message a line"):  # fmt: skip
        assert said in ended.stdout


def test_a_conversation_with_the_python_tool(chat):
    ended = chat("/temperature 0\nWhat is 27 + 58?\nWho are you?\n", "--python-tool", "--allow-unsandboxed")
    assert ended.returncode == 0 and not ended.stderr and "Python runs with: " in ended.stdout
    for said in ("[python: 27 + 58 = 85] 27 + 58 is 85.", talker.ANSWERS["Who are you?"]):
        assert said in ended.stdout


def test_whoever_stops_reading_gets_no_traceback(chat):
    ended = chat("Count.\n" * 50, shell="| head -c 10")
    assert ended.returncode == 0 and ended.stdout.startswith("Talking to") and not ended.stderr


def test_a_terminal_is_never_commanded():
    kept = (
        "10\u00a0km\u202f%\u3000春\u2009x 👩\u200d👩\u200d👧 می\u200cخواهم क्\u200dष \u200fשלום\u200e soft\u00adhyphen "
        "\ufeff\u2060 🏴\U000e0067\U000e007f ❤\ufe0f \ue000"
    )
    assert printable(kept) == kept
    assert printable("\u2028\u2029\U0001fae8\U0001faea") == "\u2028\u2029\U0001fae8\U0001faea"  # new emoji, old Python
    assert printable("a\ud800b\x7f\x85\u2066c\u202a") == "ab c"
    assert printable("10\x0bkm\x0cand\x1cmore\rto come") == "10 km and more to come"
    assert printable("a\x1b]0;title\x07b\tc\nd\x9b31m\u202e é 春 🙂") == "a]0;titleb\tc\nd31m é 春 🙂"
