"""How OpenMP's threads wait is set before torch reads it, and left alone where the user has set it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import ROOT

from nanochat import threads


def output_of(code, **environment):
    where = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    where = {**where, "PYTHONPATH": str(ROOT), **environment}
    ran = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


SHOW = "import scripts, os, sys; print({n: os.environ[n] for n in %r if n in os.environ}, 'torch' in sys.modules)"


def test_it_is_set_before_torch():
    assert output_of(SHOW % (threads.VARIABLES,)) == f"{threads.BRIEFLY} False\n"


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "200")]
)
def test_what_the_user_has_set_stays(name, value):
    assert output_of(SHOW % (threads.VARIABLES,), **{name: value}) == f"{ {name: value} } False\n"


def test_torchs_own_library_reads_it():
    """libgomp prints what it has read when it is loaded: here as scripts load it, without the rest of torch."""
    folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    if not found:
        pytest.skip("torch's OpenMP is not libgomp here, and does not say how long it spins")
    load = f"import ctypes; ctypes.CDLL({str(found[0])!r})"
    assert "GOMP_SPINCOUNT = '1000'" in output_of(f"import scripts; {load}", OMP_DISPLAY_ENV="verbose")
    assert "GOMP_SPINCOUNT = '1000'" not in output_of(load, OMP_DISPLAY_ENV="verbose")
