"""Closed streams, readers that go away, bytes of another encoding, terminals without letters or without a cursor."""

import io
import os
import pty
import select
import subprocess
import sys
import types

import pytest
from test_training import ROOT

from nanochat import progress, streams
from nanochat.errors import UserError

FRAME = """
import sys
from nanochat.flags import run_script
def main():
{body}
run_script(main{options})
"""
LATIN = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="iso-8859-1:strict")
PLAIN = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="ascii:strict")


def ascii_only(text):
    return text.encode("ascii", "backslashreplace").decode()


def script(body, shell="", options="", given=b"", unbuffered=False, **environment):
    """A script with this main, started by a shell."""
    text = FRAME.format(body="\n".join(f"    {line}" for line in body.split("\n")), options=options)
    words = f'"$PYTHON" {"-u" if unbuffered else ""} -c "$TEXT"'
    where = {
        **os.environ,
        "PYTHON": sys.executable,
        "TEXT": ascii_only(text),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "",
        **environment,
    }
    command = ["bash", "-c", f"set -o pipefail; {words} {shell}"]
    return subprocess.run(command, cwd=ROOT, env=where, input=given, capture_output=True)


FOREVER = "for i in range(20000): print('line', i)"
BODIES = [FOREVER, f"{FOREVER}\nsys.exit(1)", "print('a' * 10**6)", "print('the last', end='')"]


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_whoever_stops_reading_ends_it_quietly(body, unbuffered):
    ended = script(body, "| head -c 3", unbuffered=unbuffered)
    assert len(ended.stdout) == 3 and not ended.stderr
    ended = script(body, "| true", unbuffered=unbuffered)
    assert ended.returncode in (0, 1) and not ended.stderr


def test_it_ends_at_once_and_does_what_is_to_be_done_at_the_end(tmp_path):
    body = f"try:\n  {FOREVER}\n  open('{tmp_path}/on', 'w')\nfinally:\n  open('{tmp_path}/end', 'w')"
    assert script(body, "| head -c 3").returncode == 0
    assert os.listdir(tmp_path) == ["end"]


@pytest.mark.parametrize(
    "shell", ["| head -c 3", "2> >(head -c 3 >&2)", "2>&1 | head -c 3", "> /dev/full", "&> /dev/full"]
)
def test_a_training_goes_on_without_its_reader(tmp_path, shell):
    body = f"{FOREVER}\nfor i in range(20000): print(i, file=sys.stderr)\nopen('{tmp_path}/on', 'w')"
    ended = script(body, shell, options=", goes_on=True")
    assert ended.returncode == 0 and os.listdir(tmp_path) == ["on"]
    assert b"Traceback" not in ended.stderr and b"ignored" not in ended.stderr


def test_a_full_disk_under_what_is_printed_is_named():
    ended = script(FOREVER, "> /dev/full")
    assert ended.returncode == 2 and ended.stderr.startswith(b"error: no space is left on the disk of standard output;")


SOURCES = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "profiling").glob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_writes_files_goes_on_without_its_reader(path):
    text = path.read_text("utf-8")
    writes = any(word in text for word in ("write_", "run_stage", "_stage(", ".save(", ".store(", "Pool(", "launch("))
    if "run_script(main" in text and writes:
        assert "goes_on=True)" in text


def test_another_broken_pipe_is_no_end(tmp_path):
    body = (
        "import os\nr, w = os.pipe()\nos.close(r)\ntry:\n  os.write(w, b'x')\nexcept BrokenPipeError:\n  print('mine')"
    )
    assert script(body).stdout == b"mine\n"
    assert b"BrokenPipeError" in script("raise BrokenPipeError(32, 'of a socket')").stderr


@pytest.mark.parametrize(
    "shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "0> /dev/null", "1< /dev/null", "2< /dev/null", "0> here 1< here"]
)
def test_closed_streams_are_empty_ones(tmp_path, shell):
    body = (
        "print('out'); print('err', file=sys.stderr, flush=True); sys.stdin.isatty()\n"
        f"assert sys.stdin.read() == ''\nopen('{tmp_path}/done', 'w').write('whole')"
    )
    ended = script(body, shell.replace("here", str(tmp_path / "file")))
    assert ended.returncode == 0 and (tmp_path / "done").read_text() == "whole", ended.stderr
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("how", [{}, LATIN, PLAIN])
def test_stdin_of_any_encoding(how):
    body = "print([line.rstrip('\\n') for line in [input(), *sys.stdin]])"
    given = b"\xef\xbb\xbf/help\ncaf\xe9\n" + "caf\u00e9 春\n".encode() + b"cut \xe6\x98"
    said = script(body, given=given, **{**how, "PYTHONIOENCODING": "utf-8"} if not how else how).stdout
    if not how:
        assert said.decode() == "['/help', 'caf\u00e9', 'caf\u00e9 春', 'cut \u00e6\\x98']\n"
    else:
        assert said.startswith(b"['/help', 'caf") and b"\\u6625" in said


@pytest.mark.parametrize("how, wanted", [
    (LATIN, b"- ... -> x \xb1 \xe9 \\u6625 \\U0001f642 \\udc80\n"),
    (PLAIN, b"- ... -> x +- \\xe9 \\u6625 \\U0001f642 \\udc80\n"),
])  # fmt: skip
def test_what_a_terminal_has_no_letters_for_is_written_otherwise(how, wanted):
    body = "for f in (sys.stdout, sys.stderr): print('– … → × ± é 春 🙂 \\udc80'.replace('×', 'x'), file=f)"
    ended = script(body, **how)
    assert ended.stdout == ended.stderr == wanted and ended.returncode == 0


def test_a_word_of_the_command_line_in_latin1():
    assert streams.decoded(os.fsdecode(b"caf\xe9")) == streams.decoded("caf\u00e9") == "caf\u00e9"


@pytest.mark.parametrize("term, bar", [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_dumb_terminal_gets_lines(term, bar, monkeypatch):
    monkeypatch.setenv("TERM", term)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert streams.live() == bar
        shown = progress.Progress("base", 40, 0, True)
        try:
            assert bool(shown.bar) == bar
            for step in range(1, 5):
                shown.update(step, 1.0, 100.0, None)
        finally:
            shown.close()
        terminal.flush()
        seen = b""
        while select.select([ours], [], [], 0.3)[0]:
            seen += os.read(ours, 1 << 16)
        assert (b"base  2/40" in seen) != bar
    os.close(ours)


def test_a_pipe_that_does_not_wait_loses_nothing():
    body = "import os\nos.set_blocking(1, False)\nprint('a' * 10**6)"
    assert len(script(body, "| (sleep 0.3; cat)").stdout) == 10**6 + 1


def test_nothing_is_done_to_streams_that_are_others(monkeypatch):
    stand_in = types.SimpleNamespace(flush=lambda: None)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, stand_in)
    streams.prepare()
    streams.finish()
    assert sys.stdout is stand_in


SCRIPTS = ("scripts.chat_cli", "scripts.chat_eval", "scripts.compare", "scripts.report", "scripts.plan --dry-run",
           "profiling simulate", "profiling points", "profiling ledger", "kernels", "benchmarks")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", SCRIPTS)
def test_every_script_bears_it(tmp_path, words):
    where = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ways = [("| head -c 3", {}), ("<&- | true", LATIN), (">&- 2>&-", {}), ("< <(printf '\\xe9\\n')", PLAIN)]
    for shell, locale in ways:
        command = ["bash", "-c", f"{sys.executable} -m {words} {shell}"]
        ended = subprocess.run(command, cwd=ROOT, env={**where, **locale}, capture_output=True)
        assert b"Traceback" not in ended.stderr and b"ignored" not in ended.stderr, (shell, locale, ended.stderr)


def test_a_line_is_read_without_what_is_no_text_of_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff/clear\n  Hello!\t\n\nH\0i\0\n"))
    assert [streams.read_line("") for _ in range(3)] == ["/clear", "Hello!", ""]
    with pytest.raises(UserError, match="stdin has NUL bytes, as UTF-16"):
        streams.read_line("")
    with pytest.raises(EOFError):
        streams.read_line("")
