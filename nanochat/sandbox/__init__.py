"""Runs Python that a model wrote in a child process that can do nothing but compute.

parent.py is the parent's side: `run` a program, `judge` one by another. child.py is what the child does before a line
of the program: rlimits, no capabilities, Landlock (landlock.py), an allow-list of system calls (seccomp.py). tool.py is
the chat's Python tool.
"""

from nanochat.sandbox.parent import Result, describe, judge, missing, one_line, require, run

__all__ = ["Result", "describe", "judge", "missing", "one_line", "require", "run"]
