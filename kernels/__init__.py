"""The operations of a nanochat-style transformer, each in a file of its own with its definition and its proof data.

A library by itself: it needs torch only (and Triton where there is a GPU), and can be used in any model: `from kernels
import linear_cross_entropy`. Open one op's file and you see all of it: the formula, what it costs, the PyTorch
reference, the Triton kernels, the public function, and the `Op` that tests and benchmarks read. Importing this package
fills `OPS`; `use("torch")` and NANOCHAT_KERNELS choose the implementation, `python -m kernels` says which one runs.
"""

from typing import Any

from . import before_torch, neighbour  # noqa: F401
from .attention import flash_attention, flash_attention_decode
from .cross_entropy import cross_entropy
from .dispatch import describe, read_environment, use
from .embedding import embedding
from .fp8 import Quantized, fp8_add_rms_norm, fp8_linear, fp8_mix_rms_norm, fp8_mlp_relu2
from .linear_cross_entropy import linear_cross_entropy
from .linear_relu2 import linear_relu2, mlp_relu2
from .newton_schulz import newton_schulz, polar_express
from .optim import adamw_, muon_momentum_, muon_update_
from .registry import OPS, Op
from .rms_norm import add_rms_norm, mix_rms_norm, rms_norm
from .rotary import qk_norm_rotary, rotary

__all__ = [
    "OPS",
    "Op",
    "Quantized",
    "adamw_",
    "add_rms_norm",
    "cross_entropy",
    "describe",
    "embedding",
    "flash_attention",
    "flash_attention_decode",
    "fp8_add_rms_norm",
    "fp8_linear",
    "fp8_mix_rms_norm",
    "fp8_mlp_relu2",
    "linear_cross_entropy",
    "linear_relu2",
    "mix_rms_norm",
    "mlp_relu2",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "polar_express",
    "qk_norm_rotary",
    "rms_norm",
    "rotary",
    "use",
]

read_environment()
if (_other := neighbour.folder()) is not None:
    __path__.append(str(_other))


def __getattr__(name: str) -> Any:
    return neighbour.attribute(name)
