"""The compiled step's launches and memory, as the tool for cards that are not here finds them, against a real step.

Of a CPU both can be had: the step as compiled and run on fake tensors, and as torch's profiler records it.
"""

import re
from dataclasses import asdict

import pytest

from nanochat.recipe import model_config
from profiling.compiled import lower
from profiling.compiled.case import Case
from profiling.compiled.launches import NO_LAUNCH

# Of recorded operators: views, and a number that the host reads.
VIEWS = re.compile(
    r"(view|t|transpose|permute|slice|select|expand|split|unbind|unsqueeze|squeeze|narrow|_reshape_alias"
    r"|_local_scalar_dense)$"
)


@pytest.fixture(scope="module")
def both():
    """(what the tool finds, what was recorded) of a step of two layers."""
    case = Case(asdict(model_config(2, 4096, 256, head_dim=64)), rows=8, dtype="float32", device="cpu")
    return [lower.ask(f"tests.null_device.{name}", case, "cpu") for name in ("small_step", "recorded_step")]


@pytest.mark.slow
def test_launches_of_a_recorded_step_are_found_one_to_one(both):
    found, recorded = both
    assert len(found["launches"]) > 300
    for phase in ("forward 1", "backward 1", "forward 2", "backward 2", "optimizer"):
        names = [row["name"] for row in found["launches"] if row["phase"] == phase]
        assert names == [name for of, name, _ in launches(recorded) if of == phase], phase


@pytest.mark.slow
def test_bytes_of_our_operators_are_those_recorded(both):
    found, recorded = both
    ours = [(row["name"], row["bytes"]) for row in found["launches"] if row["who"] == "ours"]
    names = {name for name, _ in ours}
    assert ours and ours == [(name, size) for _, name, size in launches(recorded) if name in names]


@pytest.mark.slow
def test_the_peak_of_a_recorded_step_is_found(both):
    found, recorded = both
    assert found["peak"] == pytest.approx(recorded["peak"], rel=0.05)


def launches(recorded):
    """Recorded operators that are a launch, named as the tool names them."""
    for phase, name, size in recorded["launches"]:
        bare = re.sub(r"^graph_\d+_|^\w+::", "", name)
        if not NO_LAUNCH.match(bare) and not VIEWS.match(bare):
            yield phase, bare, size
