"""Every op under pytest-benchmark: `python -m pytest benchmarks/test_ops.py --benchmark-json=FILE`; -k picks some.

pytest-benchmark times one thing after another, launches included. The comparison is in `extra_info`: all contenders of
a case in turns, with cold caches (benchmarks/ops.py), with the rates, the share of the roofline and the gate's errors.
A contender that fails the gate fails its test and has no speed. On a GPU it takes the cases of `quick`, on a CPU those
of `smoke` (benchmarks/profiles.py).
"""

import functools
from typing import Any

import pytest
import torch

from benchmarks import ops, profiles
from benchmarks.contenders import CONTENDERS
from kernels import OPS
from kernels.probing import copied

PROFILE = profiles.PROFILES["quick" if torch.cuda.is_available() else "smoke"]
BENCHES = profiles.benches(list(OPS), PROFILE)
SECONDS = 2.0  # for the turns of one op at one case
machine = functools.cache(profiles.machine)


@functools.cache
def rows(index: int) -> list[dict[str, Any]]:
    bench = BENCHES[index]
    return ops.measure(bench, CONTENDERS[bench.op.name], machine(), lambda: SECONDS, PROFILE.most)


def calls() -> list[Any]:
    """Bench by bench, so that the rows of one are all used before the next is measured."""
    found = []
    for index, bench in enumerate(BENCHES):
        contenders = CONTENDERS[bench.op.name]
        for way in ops.ways(bench.op, contenders["eager"].early):
            for name in contenders:
                parts = (bench.op.name, bench.setting.replace(" ", "_"), bench.case, way, name.replace(" ", "_"))
                found.append(pytest.param(index, way, name, id="-".join(part for part in parts if part)))
    return found


@pytest.mark.parametrize("index, way, name", calls())
def test_op(benchmark: Any, index: int, way: str, name: str) -> None:
    row = next(row for row in rows(index) if (row["way"], row["contender"]) == (way, name))
    if row["status"] == "skipped":
        pytest.skip(row["why"])
    assert row["status"] == "timed", row["why"]
    bench = BENCHES[index]
    inputs = copied(bench.inputs(bench.op.cases[bench.case], machine()), bench.op.differentiable)
    prepare = ops.prepared(bench.op, CONTENDERS[bench.op.name][name], inputs, way)

    def run(call: Any) -> None:
        call()
        if machine().device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "-".join(filter(None, (bench.op.name, bench.setting, bench.case, way)))
    benchmark.pedantic(run, setup=lambda: ((prepare(),), {}), rounds=PROFILE.most)
    benchmark.extra_info.update(row)
