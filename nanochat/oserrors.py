"""What the system refuses, a file, memory or a thread, in one sentence: why, and what to do. Scripts end with it."""

import errno
import os

FULL = "no space is left on the disk of {where}; free some, then give the same command again"
NOT_OF_FILES = (ConnectionError, TimeoutError, ChildProcessError, InterruptedError, BlockingIOError)
# By code, with {where} for the path: those that may come without one (of a write, say), and those of a path.
OF_WRITES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: "{where} is on a file system that is read-only; mount it writable, or put NANOCHAT_BASE_DIR elsewhere",
    errno.EFBIG: "{where} would be larger than is allowed here; raise the limit (ulimit -f), or take another disk",
    errno.EMFILE: "{where} cannot be opened: this process has too many files open; raise the limit (ulimit -n)",
    errno.ENFILE: "{where} cannot be opened: this machine has too many files open; close some programs",
    errno.EIO: "the disk of {where} reports an error; look at its health, and take another one",
    errno.ENODEV: "the device of {where} is gone; mount it again",
    errno.ESTALE: "{where} is on a network file system that has lost it; mount it again",
}
OF_PATHS = {
    errno.EACCES: "{where} may not be used by this user; change its owner or its permissions",
    errno.EPERM: "{where} may not be changed by this user; change its owner, its permissions or its attributes",
    errno.ENOTDIR: "{where} cannot be: a part of that path is a file, wanted a folder; move the file away",
    errno.EISDIR: "{where} is a folder, wanted a file; move it away",
    errno.EEXIST: "{where} is in the way, perhaps a file where a folder is wanted; move it away",
    errno.ENAMETOOLONG: "the path {where} is longer than this file system allows; take a shorter one",
    errno.ENOENT: "{where} is not there, or not any more; put it back, or look at the path",
}

NO_MORE = (
    "no more threads or processes can be started here; raise the limit (ulimit -u; of a container --pids-limit), or "
    "end other programs"
)
NO_THREAD = "can't start new thread"  # as Python has it
NO_TEMPORARY = "No usable temporary directory"  # as tempfile begins
SHORT = ("can't allocate memory", "not enough memory")  # as torch has it, of the CPU


def memory(error: Exception) -> str:
    """About the machine's own memory that ran out (a card's: flags.run_script); "" for other errors."""
    said = next((line for line in str(error).splitlines() if any(word in line for word in SHORT)), "")
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and said):
        return ""
    more = f" ({said[:200]})" if said else ""
    return f"memory is short{more}; take fewer rows or tokens at a time, or a smaller model, or end other programs"


def no_more(error: Exception) -> bool:
    """Whether a thread or a process could not be started, by Python or by torch."""
    again = os.strerror(errno.EAGAIN)
    if isinstance(error, BlockingIOError):
        return error.strerror == again and error.filename is None
    return isinstance(error, RuntimeError) and str(error) in (NO_THREAD, again)


def sentence(error: Exception) -> str:
    """About what the system refused; "" for errors of another kind: of connections, of libraries."""
    if no_more(error):
        return NO_MORE
    if not isinstance(error, OSError):
        return memory(error)
    if type(error).__module__ != "builtins" or isinstance(error, NOT_OF_FILES):
        return ""
    if str(error.strerror).startswith(NO_TEMPORARY):
        return (
            "no folder for temporary files can be written to; free space on the disk of /tmp, or set TMPDIR to another"
        )
    path = error.filename2 or error.filename
    if isinstance(path, int) or (path is None and error.errno not in OF_WRITES):  # a descriptor; a socket, say
        return ""
    where = "the run's folder" if path is None else os.fsdecode(path)
    said = {**OF_WRITES, **OF_PATHS}.get(error.errno or 0, f"{{where}} cannot be used: {error.strerror}")
    return said.replace("{where}", where)
