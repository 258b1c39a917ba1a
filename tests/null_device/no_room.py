"""Run on the null device that does not compute, so that Triton does not interpret: the test named, on a full card."""

import sys

import pytest
import torch

assert torch.cuda.is_available()
torch.cuda.mem_get_info = lambda *_: (0, 0)  # type: ignore[assignment]
sys.exit(pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider"]))
