"""How little a command imports before it knows what it is to do."""

import subprocess
import sys
from pathlib import Path

import torch

from kernels.constant import constant

ROOT = Path(__file__).parent.parent
COMPILERS = "torch._dynamo", "torch._inductor", "sympy"  # seconds to import, for whoever compiles


def test_no_command_imports_a_compiler_to_start():
    scripts = [f"scripts.{file.stem}" for file in sorted((ROOT / "scripts").glob("*.py")) if file.stem != "__init__"]
    program = (
        "import importlib, sys\n"
        f"for name in {scripts + ['kernels.__main__', 'benchmarks.training_step']}:\n"
        "    importlib.import_module(name)\n"
        f"    there = [other for other in {COMPILERS} if other in sys.modules]\n"
        "    assert not there, (name, there)"
    )
    made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0 and len(scripts) > 10, made.stderr


def test_the_mark_is_torchs():
    ours, torchs = constant(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(torchs) and vars(ours)
