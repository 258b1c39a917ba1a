"""What a child does first: it gives up everything that it can, then runs the program. Its text is `python -c`'s.

It comes without the project and imports what it needs before the doors close. On standard input: what to give up and
the program, from the parent (parent.py), in Python's marshal format. On descriptor `report`: "ready", or why it could
not isolate itself and so runs nothing; then "finished" and what the program's last expression gave.
"""

import os
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself takes milliseconds
    from typing import Any


def isolate(landlock: tuple, seccomp: bytes, parent: int) -> None:
    """No capabilities, Landlock, the filter. Raises OSError with the name of the step that the kernel refused."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_ulong

    def call(name: str, result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return result

    def prctl(name: str, option: int, *values: int) -> None:
        call(name, libc.prctl(option, *map(word, (*values, 0, 0, 0, 0)[:4])))

    prctl("PR_SET_PDEATHSIG", 1, 9)
    if os.getppid() != parent:
        raise OSError("the parent has ended")
    prctl("PR_SET_DUMPABLE", 4, 0)
    prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", libc.capset(header, (ctypes.c_uint32 * 6)()))

    attributes, library, own, folder, flags = landlock
    rules = call("Landlock", libc.syscall(444, attributes, word(len(attributes)), 0))
    for path, rights in [*((path, library) for path in sys.path), (folder, own)]:
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= ~8 if not os.path.isdir(path) else ~0  # READ_DIR is no right to a file (a zipped library)
            beneath = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            call("Landlock's rule", libc.syscall(445, rules, 1, beneath, 0))
            os.close(opened)
    call("Landlock", libc.syscall(446, rules, flags))
    os.close(rules)

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    filter = Filter(len(seccomp) // 8, seccomp)
    prctl("seccomp", 22, 2, ctypes.addressof(filter))


def limit(limits: list) -> None:
    """The rlimits, by name, of those that the system has; macOS refuses to lower some."""
    import resource

    for name, value in limits:
        if (which := getattr(resource, name, None)) is not None:
            most = resource.getrlimit(which)[1]
            lowered = value if most == resource.RLIM_INFINITY else min(value, most)
            try:
                resource.setrlimit(which, (lowered, lowered))
            except (ValueError, OSError):
                if sys.platform == "linux":
                    raise


def execute(source: str, names: dict):
    """Runs a program as `__main__`; returns the value of its last line where that is an expression."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    vars(module).update(names, __builtins__=__builtins__)
    tree: Any = compile(source, "<program>", "exec", 0x400)  # PyCF_ONLY_AST
    last = tree.body.pop().value if tree.body and type(tree.body[-1]).__name__ == "Expr" else None
    exec(compile(tree, "<program>", "exec"), vars(module))
    if last is not None:
        import _ast

        return eval(compile(_ast.Expression(last), "<program>", "eval"), vars(module))


def main() -> None:
    import marshal

    asked = marshal.loads(sys.stdin.buffer.read())
    report = asked["report"]
    try:
        os.close(0)
        os.open(os.devnull, os.O_RDONLY)  # takes the lowest number, 0
        limit(asked["limits"])
        with suppress(ImportError):
            import zlib  # noqa: F401 (the one much used module whose library lies outside of Python's own folder)
        if asked["isolation"]:
            isolate(*asked["isolation"])
    except BaseException as problem:
        os.write(report, f"refused\n{problem}".encode())
        os._exit(1)
    os.write(report, b"ready\n")
    try:
        value = execute(asked["source"], asked["names"])
        said = b"" if value is None else repr(value)[: asked["longest"]].encode("utf-8", "replace")
        sys.stdout.flush()
    except BaseException as problem:
        trace = problem.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == "<string>":  # ours
            trace = trace.tb_next
        try:
            sys.stdout.flush()
        finally:
            sys.__excepthook__(type(problem), problem.with_traceback(trace), trace)
            sys.stderr.flush()
            os._exit(1)
    os.write(report, b"finished\n" + said)
    os._exit(0)


main()
