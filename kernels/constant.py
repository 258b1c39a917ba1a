"""What torch.compile asks once, while it traces, and takes for constant."""

from collections.abc import Callable
from typing import TypeVar

Asked = TypeVar("Asked", bound=Callable)


def constant(function: Asked) -> Asked:
    """The mark of `torch.compiler.assume_constant_result`, which imports Dynamo to set it: two of the five seconds that
    every command would take to start, whether it compiles or not. (tests/test_startup.py compares the two.)
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
