"""No kernel of a step compiled for a card that is not here spills, computes in float64 or touches memory narrowly where
it streams; what is accepted has its reason in profiling/compiled/lint.py.
"""

from dataclasses import asdict

import pytest

from nanochat.recipe import model_config
from profiling.compiled import lint, null_device, report
from profiling.compiled.case import Case
from profiling.predicted.cards import card

STEPS = [(depth, "auto") for depth in (4, 6, 8, 12, 16, 20, 24, 32)] + [(depth, "torch") for depth in (4, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["", "current"])
@pytest.mark.parametrize("name", ["H100", "A100", "RTX 4090", "B200"])
@pytest.mark.parametrize("depth, kernels", STEPS)
def test_no_kernel_of_the_step_does_what_it_should_not(name, depth, fp8, kernels):
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    chip = card(name)
    if fp8 and not chip.fp8:
        pytest.skip(f"the {name} has no fp8 units")
    found = report.measured(Case(asdict(model_config(depth, 32768)), rows=16, fp8=fp8, kernels=kernels), chip)
    assert len({row["name"] for row in found["launches"] if row["kernel"]}) > 40
    assert not [row["error"] for row in found["kernels"].values() if row["error"]]
    violations = lint.violations(found).items()
    assert [at for at, (most, _) in violations if not lint.exempt(*at, most, kernels == "torch")] == []
