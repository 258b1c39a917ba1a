"""What the operating system refuses is one sentence with the path, and nothing else is swallowed."""

import errno
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_training import home, train, writing  # noqa: F401 (home is a fixture)

from nanochat import files, oserrors
from nanochat.data.loader import Prefetch
from nanochat.run import Run

ROOT = Path(__file__).parent.parent
CODES = (
    "EROFS EACCES EPERM EFBIG EDQUOT ENOSPC ENOTDIR EISDIR EMFILE ENFILE EIO ENAMETOOLONG ENODEV ESTALE ENOENT EEXIST "
    "ELOOP ENOTEMPTY EBUSY"
).split()


@pytest.mark.parametrize("name", CODES)
def test_one_sentence_with_the_path_and_exit_code_2(capsys, name):
    code = getattr(errno, name)

    def main():
        raise OSError(code, os.strerror(code), "/some/where")

    assert tiny.called(main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "/some/where" in error


def no_thread():
    raise RuntimeError("can't start new thread")


def no_process():
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.mark.parametrize(
    "where, start", [("threading.Thread.start", no_thread), ("subprocess.Popen.__init__", no_process)]
)
def test_a_limit_on_threads_and_processes_is_one_sentence(capsys, monkeypatch, where, start):
    monkeypatch.setattr(where, lambda self, *words, **more: start())
    main = (lambda: Prefetch(iter([]))) if start is no_thread else (lambda: subprocess.run(["true"]))
    assert tiny.called(main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no more threads or processes can be started here; raise the limit (ulimit -u")
    assert error.count("\n") == 1


def no_memory_for(allocate):
    return lambda: allocate(1 << 50)


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray])
def test_memory_that_runs_out_is_one_sentence_too(capsys, allocate):
    assert tiny.called(no_memory_for(allocate)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: memory is short") and error.count("\n") == 1


FULL = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free"


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError(f"CUDA out of memory. {FULL}. Process 7 has 77.9 GiB memory in use."), FULL),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "of memory; take less"),
    ],
)
def test_a_full_gpu_is_one_sentence_and_exit_code_2(capsys, error, said):
    def main():
        raise error

    assert tiny.called(main) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: CUDA ") and found.count("\n") == 1 and said in found, found
    assert "--device-batch-size" in found and "--slots" in found and "Process" not in found


def test_no_folder_for_temporary_files_is_one_sentence(tmp_path):
    """As on a full disk: no file may have a byte. Before torch is imported, and within a script."""
    within = "import tempfile; from nanochat.flags import run_script\nrun_script(lambda: tempfile.gettempdir())"
    started = [["-m", module] for module in ("scripts.report", "benchmarks", "kernels", "profiling")]
    for words in (*started, ["-c", within]):
        made = subprocess.run(
            ["bash", "-c", 'ulimit -f 0; exec "$@"', "x", sys.executable, *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 2 and made.stderr.startswith("error: no folder for temporary files"), made.stderr
        assert made.stderr.count("\n") == 1


def test_a_working_folder_that_is_gone_is_one_sentence(tmp_path):
    made = subprocess.run(
        ["bash", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m scripts.report', sys.executable],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 2 and made.stderr.startswith("error: the folder that this was started in is not there")
    assert made.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "module, name, value",
    [("scripts.report", "TORCH_LOGS", "nonsense"), ("kernels", "TORCH_LOGS_OUT", "/nonexistent/folder/file"),
     ("benchmarks", "TORCHINDUCTOR_COMPILE_THREADS", "many"), ("profiling", "TORCH_LOGS", "nonsense")],
)  # fmt: skip
def test_a_variable_that_torch_cannot_use_is_one_sentence(module, name, value):
    words = [sys.executable, "-m", module]
    made = subprocess.run(words, env={**os.environ, name: value}, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and made.stderr.startswith("error: torch cannot use what the environment"), made.stderr
    assert name in made.stderr and value in made.stderr and made.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["scripts.report", "benchmarks", "kernels"])
@pytest.mark.parametrize("cache, said", [("file", "file"), ("file/x", "file/x")])
def test_a_compilers_cache_that_cannot_be_is_one_sentence(tmp_path, cache, said, module):
    """torch makes it while it is imported."""
    (tmp_path / "file").write_text("")
    where = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
    words = [sys.executable, "-m", module]
    made = subprocess.run(words, env=where, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 2 and made.stderr.startswith(f"error: {tmp_path}/{said}"), made.stderr
    assert made.stderr.count("\n") == 1


class Library(OSError):
    """As those of HTTP clients."""


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        socket.gaierror(-2, "Name or service not known"),
        ssl.SSLError(1, "certificate verify failed"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused", "a.sock"),
        OSError("said by a library"),
        Library(errno.EACCES, "forbidden", "https://example.org"),
        PermissionError(errno.EACCES, "Permission denied"),  # of a socket: no path
        ValueError("a mistake in the code"),
        RuntimeError("a mistake in the code, not of memory"),
    ],
)
def test_other_errors_keep_their_meaning(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        from nanochat.flags import run_script

        run_script(main)


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "x"), OSError(errno.EIO, "x"), OSError(errno.EMFILE, "x")])
def test_a_write_may_fail_without_a_path(error):
    assert "the run's folder" in oserrors.sentence(error)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_half_file_is_left_and_the_path_is_named(tmp_path, monkeypatch, code, call):
    path = tmp_path / "x.json"
    path.write_text("old")

    def failing(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError) as caught:
        files.write_atomically(path, b"new")
    assert caught.value.filename == str(path) and caught.value.errno == code
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", ["EROFS", "EACCES", "EFBIG", "EIO"])
def test_a_checkpoint_that_cannot_be_written_is_one_sentence(home, monkeypatch, capsys, name):  # noqa: F811
    def fail(meta):
        if meta["step"] == 6:
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "a disk")

    with writing(monkeypatch, fail):
        assert train(home, "a") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "a disk" in error


def test_a_file_where_a_folder_should_be(home, capsys):  # noqa: F811
    """Of the run, of a stage, of the results."""
    run = Run.open("a")
    run.stage("base").write_text("x")
    assert train(home, "a") == 2
    run.stage("base").unlink()
    assert train(home, "a") == 0
    run.stage("eval").write_text("x")
    capsys.readouterr()
    assert tiny.call("base_eval", "--run=a", f"--data={home / 'text.jsonl'}", "--eval=bpb", "--split-tokens=256") == 2
    assert tiny.call("report", "--run=a") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("eval" in error for error in errors), errors
    run.stage("eval").unlink()
    (run.stage("eval") / ".lock").mkdir(parents=True)  # results could not be kept: an error before the work
    more = [f"--data={home / 'text.jsonl'}", "--eval=bpb", "--split-tokens=256"]
    assert tiny.call("base_eval", "--run=a", *more) == 2
    assert tiny.call("chat_eval", "--run=a", "--source=base", "-x", "1", "-m", "2", "-a", "add_tool") == 2
    done = capsys.readouterr()
    assert not done.out and done.err.count("eval/.lock is a folder, wanted a file") == 2
    (run.stage("eval") / ".lock").rmdir()
    (run.folder / "report.md").mkdir()
    assert tiny.call("report", "--run=a") == 2
    assert "report.md is a folder, wanted a file" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_the_kernels_tables_are_whole_or_as_before(tmp_path, monkeypatch, capsys, code):
    from kernels import __main__, measured

    path = tmp_path / "sm_90.json"
    path.write_text("old")

    def failing(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(__main__, "describe", lambda: measured.replace(path, "new"))
    monkeypatch.setattr("sys.argv", ["kernels"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and str(path) in error and error.count("\n") == 1
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["sm_90.json"]


def test_every_script_runs_in_the_frame():
    """Or what the operating system refuses would be a traceback there; kernels has a frame of its own."""
    root = Path(__file__).parent.parent
    children = {
        "compiled/ablate.py",
        "compiled/count.py",
        "compiled/lower.py",
        "compiled/memory.py",
        "compiled/fixes.py",
        "compiled/null_device.py",
        "compiled/report.py",
        "benchmarks/core_worker.py",
        "benchmarks/decode_worker.py",
        "benchmarks/server_worker.py",
        "benchmarks/train_worker.py",
        "benchmarks/test_attention.py",
    }
    for room in ("scripts", "profiling", "benchmarks"):
        for path in (root / room).rglob("*.py"):
            text = path.read_text()
            if '\nif __name__ == "__main__":\n' in text and f"{path.parent.name}/{path.name}" not in children:
                assert "run_script" in text.rstrip().splitlines()[-1], path


@pytest.mark.parametrize("where", ["~nobody-of-this-name/x", b"/tmp/\xff"])
def test_a_base_folder_that_cannot_be(home, monkeypatch, capsys, where):  # noqa: F811
    monkeypatch.setenv("NANOCHAT_BASE_DIR", os.fsdecode(where))
    assert tiny.call("tok_train", "--run=a", f"--data={home / 'text.jsonl'}", "--vocab-size=300") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: NANOCHAT_BASE_DIR is ") and error.count("\n") == 1


STREAMS = """
import os, sys
from nanochat.flags import run_script
def main():
    print("\u2192 \u00e4")
    with open(sys.argv[1], "wb") as f:
        assert f.fileno() > 2  # or it would get what a library prints
        os.system("echo something; echo something >&2")
    sys.stdin.read()
    sys.stdout.isatty(), sys.stderr.flush()
    raise KeyboardInterrupt
run_script(main)
"""


@pytest.mark.parametrize("closed", ["", "<&- >&- 2>&-", ">&-", "2>&-"])
def test_streams_that_are_closed_or_have_no_letters_for_it(tmp_path, closed):
    command = f'"$0" -c "$1" "$2" --fresh {closed or "</dev/null"}'
    words = ["sh", "-c", command, sys.executable, STREAMS, str(tmp_path / "file")]
    made = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert made.returncode == 75 and (tmp_path / "file").read_bytes() == b""
    assert b"Traceback" not in made.stderr
    if not closed:
        assert made.stdout.startswith(rb"-> \xe4")
        assert b"Stopped. The same command without --fresh goes on" in made.stderr
