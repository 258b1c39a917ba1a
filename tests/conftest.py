"""What all tests share: --full, the offline data beside the repository, poisoned memory, Triton's interpreter."""

import os
import sys
from pathlib import Path

# Before torch starts, as scripts/ does: beside other programs tests otherwise take minutes, since each of two threads
# keeps from the other the core that it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.pop("NANOCHAT_PYTHON", None)  # this is it; where speedrun.sh is tried, another stands in

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

if not torch.cuda.is_available():  # kernels run interpreted; tests of compiling have processes of their own
    os.environ["TRITON_INTERPRET"] = "1"
    # Cards that torch cannot use are hidden: scripts would rather stop than pass over them (nanochat/drivers.py).
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import quick_interpreter  # noqa: E402

quick_interpreter.install()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too")


# The files that take longest, which come first: the last one running leaves the other process idle.
LONG = ("triton", "page", "training", "null_device", "dynamic", "scripts", "talker", "kills", "bad_steps", "record",
        "graph_count", "lab", "attention", "machine_code", "page_cases", "fp8", "rl", "load", "records", "chat_cli",
        "launch", "oserrors", "infer_bench", "fresh", "sandbox")  # fmt: skip


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    if not config.getoption("--full"):
        slow = pytest.mark.skip(reason="slow; bash tests/run.sh --full runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)


@pytest.fixture
def shared() -> Path:
    """The folder of reference numbers and data that may stand beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"{path.name}/ with reference data does not stand beside the repository")
    return path


@pytest.fixture(autouse=True)
def own_modes():
    """What a script sets for its process (nanochat/hardware.py) ends with the test, for there may be a GPU.

    After `repeat_bitwise` its products would be refused, and TF32 is not what kernels are compared in.
    """
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty gives NaN, so that reading what was never written shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            usual = tensor.is_floating_point() and tensor.itemsize >= 2 and not tensor.is_meta
            return tensor.fill_(float("nan")) if usual and not torch.compiler.is_compiling() else tensor

        return poisoned

    _device_constructors()  # `with torch.device("meta")` knows them by identity: let it see them first
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
