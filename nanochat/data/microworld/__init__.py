"""The microworld: an invented world in simple English, small enough to measure what a model knows and what it makes up.

Start with `world.py` (who exists and what is true), then `documents.py` (what pretraining reads) and
`conversations.py`.
"""

from nanochat.data.microworld.conversations import Conversations
from nanochat.data.microworld.documents import Documents
from nanochat.data.microworld.world import World

__all__ = ["Conversations", "Documents", "World"]
