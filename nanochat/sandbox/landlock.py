"""What Landlock takes from a child, as numbers: file system, TCP, abstract sockets and signals (linux/landlock.h).

A right is denied everywhere once it is handled, except beneath the folders for which a rule allows it. The kernel
says with its ABI which rights it knows; what an older one lacks, the system-call filter refuses (seccomp.py).
"""

import ctypes
import os
import sys

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << i for i in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << i for i in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
LIBRARY = READ_FILE | READ_DIR
OWN_FOLDER = LIBRARY | WRITE_FILE | MAKE_REG | TRUNCATE  # flat: no folders, links, pipes or devices; nothing removed

CREATE_RULESET = 444  # on every machine; add_rule and restrict_self follow
VERSION = 1  # the flag that asks for the ABI


def abi() -> int:
    """The kernel's Landlock ABI; 0: it has none, or it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None)
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION))


def handled(abi: int) -> tuple[int, int, int]:
    """All rights that an ABI knows: (file system, TCP bind and connect, scopes of abstract sockets and signals)."""
    files = (1 << 13) - 1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        files |= right if abi >= since else 0
    return files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0


def config(abi: int, folder: str) -> tuple[bytes, int, int, str, int]:
    """For the child: the ruleset's attributes, its rights to the library and to its own folder, which that is, flags.

    From ABI 7 on the kernel logs what it refuses; the flag says not to: a program may try as often as it likes.
    """
    files, tcp, scopes = handled(abi)
    attributes = b"".join(n.to_bytes(8, sys.byteorder) for n in (files, tcp, scopes))
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    return attributes[:size], LIBRARY & files, OWN_FOLDER & files, os.path.realpath(folder), int(abi >= 7)
