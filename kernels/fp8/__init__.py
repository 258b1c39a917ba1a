"""8-bit floating point for training: rounding to it (quantize.py), norms that hand out rounded copies (norm.py), a
linear layer (linear.py), the MLP (mlp.py).
"""

from .linear import fp8_linear
from .mlp import fp8_mlp_relu2
from .norm import fp8_add_rms_norm, fp8_mix_rms_norm
from .quantize import Quantized, new_history, plain

__all__ = ["Quantized", "fp8_add_rms_norm", "fp8_linear", "fp8_mix_rms_norm", "fp8_mlp_relu2", "new_history", "plain"]
