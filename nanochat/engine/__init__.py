"""Inference: token ids in, token ids out. It never sees a string; `nanochat/chat.py` turns text into ids and back."""

from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.engine.scheduler import Request

__all__ = ["Engine", "Request", "Sampling"]
