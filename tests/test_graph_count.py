"""How many graphs a training step compiles on a GPU: one forward, one backward, one for each kind of update, once.

Torch compiles the step for an H100 on the null device (profiling/compiled/lower.py), whole graphs only: a break would
be an error. The second step has other learning rates, decays and momentum, and compiles nothing. What Inductor makes of
the graphs takes most of the time and cannot make more of them: by name it is tried.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from nanochat.presets import SIZES
from nanochat.recipe import model_config
from profiling.compiled import null_device
from profiling.compiled.case import Case

ROOT = Path(__file__).parent.parent
# float32 is for cards without matrix units, and for who asks for it (NANOCHAT_DTYPE).
PRECISIONS = [("bfloat16", ""), ("float16", ""), ("float32", ""), ("bfloat16", "current"), ("bfloat16", "delayed")]


def counted(cases, home, *flags):
    """What tests/null_device/count_graphs.py finds of each case."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    environment = null_device.environment("h100")
    for name in ("TRITON_INTERPRET", "NANOCHAT_KERNELS"):
        environment.pop(name, None)
    environment.update(TORCHINDUCTOR_CACHE_DIR=str(home), OMP_NUM_THREADS="1")
    words = [json.dumps(asdict(case)) for case in cases]
    command = [sys.executable, "tests/null_device/count_graphs.py", *flags, *words]
    where = {**os.environ, **environment}
    where.pop("CUDA_VISIBLE_DEVICES", None)  # tests hide cards
    made = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]
    return json.loads(made.stdout.splitlines()[-1])


def check(cases, home, *flags):
    """One forward, one backward; AdamW for at most six kinds of parameter and Muon for four shapes; nothing anew."""
    for case, found in zip(cases, made := counted(cases, home, *flags), strict=True):
        names = found["names"]
        updates = len(names) - 2
        assert names == ["forward", "backward", *["inference"] * updates] and found["anew"] == 0, (case, names)
        assert 0 < updates <= 10 if case.optimizer else updates == 0
    return made


def test_a_step_of_two_layers_in_every_precision(tmp_path):
    """Without Inductor, nor float32, which are by name, below. The updates are the same but for dtypes."""
    config = asdict(model_config(2, 4096, 512))
    precisions = [found for found in PRECISIONS if found != ("float32", "")]
    cases = [Case(config, 4, *found, optimizer=found == precisions[0]) for found in precisions]
    check(cases, tmp_path, "--count-only")


ROWS: dict[int, set[int]] = {24: {16, 8}}  # by depth, of all presets
for size in SIZES:
    for depth, rows in ((size.depth, size.rows), size.eight):
        ROWS.setdefault(depth, set()).add(rows)


@pytest.mark.slow
@pytest.mark.parametrize("depth", sorted(ROWS))
def test_a_step_of_every_preset(depth, tmp_path):
    """Every depth in every precision, with our kernels and without; every number of rows in one.

    Without Inductor, which gets the graphs when they are already apart. In fp8, updates are those of bfloat16, and its
    references, which take longest to trace, are traced in the fewest layers.
    """
    config, fewest = asdict(model_config(depth, 32768)), depth == min(ROWS)
    rows, *others = sorted(ROWS[depth], reverse=True)
    cases = [
        Case(config, rows, dtype, fp8, kernels, optimizer=not fp8 or fewest)
        for (dtype, fp8), kernels in itertools.product(PRECISIONS, ("auto", "torch"))
        if fewest or not fp8 or kernels == "auto"
    ]
    check([*cases, *(Case(config, fewer, optimizer=False) for fewer in others)], tmp_path, "--count-only")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 24])
def test_inductor_lowers_as_many_graphs_as_it_gets(depth, tmp_path):
    cases = [Case(asdict(model_config(depth, 32768)), 16)]
    if depth == 2:
        cases += [Case(cases[0].config, 16, *found, optimizer=False) for found in PRECISIONS[1:]]
    assert check(cases, tmp_path) == check(cases, tmp_path, "--count-only")
