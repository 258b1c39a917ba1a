"""Every kernel on shapes that hypothesis makes up, against float64 as tests/test_triton.py compares."""

import pytest
import torch
from test_triton import DEVICE, KERNELS, check

from kernels import OPS, triton_utils

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis, which makes the shapes up, is not installed")
st = hypothesis.strategies
pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")

SIZES = st.integers(1, 70)
SHAPES = {
    "rms_norm": st.fixed_dictionaries(dict(N=SIZES, C=SIZES)),
    "rotary": st.fixed_dictionaries(dict(B=st.integers(1, 3), T=st.integers(1, 9), K=st.integers(1, 3),
                                         G=st.integers(1, 3), D=st.integers(1, 20))),
    "cross_entropy": st.fixed_dictionaries(dict(N=SIZES, V=st.integers(2, 200))),
    "linear_cross_entropy": st.fixed_dictionaries(dict(N=SIZES, V=st.integers(2, 200), C=st.integers(1, 20))),
    "fp8_linear": st.fixed_dictionaries(dict(N=SIZES, C=SIZES, F=SIZES)),
    "linear_relu2": st.fixed_dictionaries(dict(N=SIZES, C=SIZES, F=SIZES)),
    "flash_attention": st.fixed_dictionaries(dict(B=st.integers(1, 2), T=SIZES, S=SIZES, K=st.integers(1, 2),
                                                  G=st.integers(1, 3), D=st.integers(1, 20), W=st.integers(-1, 75))),
    "flash_attention_decode": st.fixed_dictionaries(
        dict(B=st.integers(1, 3), Tq=st.integers(1, 20), K=st.integers(1, 2), S=st.integers(20, 90),
             G=st.integers(1, 3), D=st.integers(1, 20), W=st.integers(-1, 95))),
    "polar_express": st.fixed_dictionaries(dict(K=st.integers(1, 3), m=SIZES, n=SIZES)),
    "embedding": st.fixed_dictionaries(dict(N=st.integers(1, 200), V=SIZES, C=SIZES)),
    "adamw_": st.fixed_dictionaries(dict(N=st.integers(1, 3000))),
    "muon_momentum_": st.fixed_dictionaries(dict(K=st.integers(1, 3), m=SIZES, n=SIZES)),
}  # fmt: skip
SAME_SHAPES = {"mlp_relu2": "linear_relu2", "mix_rms_norm": "rms_norm", "add_rms_norm": "rms_norm", "fp8_mix_rms_norm":
"rms_norm", "fp8_add_rms_norm": "rms_norm", "fp8_mlp_relu2": "fp8_linear", "qk_norm_rotary":
"rotary",
               "newton_schulz": "polar_express", "muon_update_": "muon_momentum_"}  # fmt: skip


SLOWEST = ("polar_express", "newton_schulz", "flash_attention", "cross_entropy", "linear_cross_entropy")
# These take ten seconds and more in the interpreter; by default test_triton.py has their odd shapes.


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOWEST else name for name in KERNELS]
)
def test_any_shape(name):
    @hypothesis.settings(
        max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(SHAPES[SAME_SHAPES.get(name, name)])
    def shapes(case):
        if "G" in case:
            case = dict(case, H=case["K"] * case["G"], D=2 * case["D"])
        check(name, OPS[name].inputs(case, torch.float32, DEVICE), torch.float32)

    shapes()
