"""The system calls that a child may still make, as a BPF program for seccomp (linux/seccomp.h, linux/filter.h).

An allow-list: what is not in it gets EPERM, so a call that a later kernel brings is refused too. In it is what Python's
interpreter needs to compute, import the standard library and use files that Landlock lets it open. Not in it: processes
and threads, signals to anybody, sockets, pipes, other processes' memory, names, times and owners of files, limits.
"""

import errno
import platform
import struct

# name: number on x86-64, on aarch64 (asm/unistd_64.h, asm-generic/unistd.h); None: it has no such call
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    # files by name: Landlock says which may be opened and made; it does not hide that they exist. None is removed or
    # renamed: a file without a name, kept by a mapping, would take room that the parent does not see
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "getdents64": (217, 61), "getcwd": (79, 17), "ftruncate": (77, 46),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98),
    # handlers of its own signals, which nobody sends but the kernel
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    # time
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "restart_syscall": (219, 128), "sched_yield": (24, 124),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # who and where it is, chance, the end
    "uname": (63, 160),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

# name: (numbers, which argument, mask, its values that are allowed). open: O_RDONLY with O_TRUNC would empty a file
# that may only be read, which Landlock sees from ABI 3 on. fcntl: F_SETOWN sends signals. ioctl: TIOCSTI types into
# terminals.
OPEN_MASK = 0o20001003  # access, O_TRUNC, and O_TMPFILE, which none of the values has
OPENS = tuple(mode | truncate for mode in (0, 1, 2) for truncate in (0, 0o1000) if mode or not truncate)
FCNTLS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
IOCTLS = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
CONDITIONAL: dict[str, tuple[tuple[int, int | None], int, int, tuple[int, ...]]] = {
    "open": ((2, None), 1, OPEN_MASK, OPENS),
    "openat": ((257, 56), 2, OPEN_MASK, OPENS),
    "fcntl": ((72, 25), 1, 0xFFFFFFFF, FCNTLS),
    "ioctl": ((16, 29), 1, 0xFFFFFFFF, IOCTLS),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

LOAD, EQUALS, AND, RETURN = 0x20, 0x15, 0x54, 0x06  # of a 32-bit word of the call's data; jumps; with a constant
ALLOW, KILL_PROCESS, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def machine() -> str:
    """This machine's architecture where a filter exists for it, else ""."""
    name = platform.machine()
    return name if name in ARCHITECTURES else ""


def program(machine: str) -> bytes:
    """The filter as an array of struct sock_filter, 8 bytes each.

    A call in another convention (32-bit code) kills the process; x32's have a bit in their number that no entry has.
    """
    column, arch = ARCHITECTURES[machine]
    code = [_op(LOAD, ARCH), _op(EQUALS, arch, 1, 0), _op(RETURN, KILL_PROCESS), _op(LOAD, NUMBER)]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [_op(EQUALS, number, 0, 1), _op(RETURN, ALLOW)]
    for numbers, argument, mask, values in CONDITIONAL.values():
        if (number := numbers[column]) is not None:
            block = [_op(LOAD, FIRST_ARGUMENT + 8 * argument), _op(AND, mask)]
            for value in values:
                block += [_op(EQUALS, value, 0, 1), _op(RETURN, ALLOW)]
            block.append(_op(RETURN, REFUSE))
            code += [_op(EQUALS, number, 0, len(block)), *block]
    return b"".join([*code, _op(RETURN, REFUSE)])


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)
