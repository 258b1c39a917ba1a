"""From the --data flag to a source: "embedded" (the microworld), "hub", or a path to your own files."""

from pathlib import Path

from nanochat.data import hub
from nanochat.data.conversations import ConversationFiles
from nanochat.data.documents import Documents
from nanochat.data.microworld import Conversations
from nanochat.data.microworld import Documents as WorldDocuments
from nanochat.data.source import Source
from nanochat.errors import UserError
from nanochat.tasks.stage_mixtures import mixture


def documents(data: str, tokens: int, seed: int = 42) -> Source:
    """Text for the tokenizer and for pretraining; of the hub, as many shards as `tokens` tokens need.

    `seed` draws other text from the microworld; files are read in their order.
    """
    if data == "embedded":
        return WorldDocuments(draw=seed)
    if data == "hub":
        return hub.base_documents(hub.shards_for(tokens))
    return Documents(Path(data))


def conversations(
    data: str, stage: str, seed: int = 42, after: str = "mid", word_problems: int = 0
) -> tuple[Source, list[str]]:
    """(conversations for stage "mid" or "sft" that follows stage `after`, sentences about what had to be left out).

    word_problems: percent of them, of the embedded ones. Raises UserError.
    """
    if word_problems and data != "embedded":
        raise UserError(f"--word-problems {word_problems}: only --data embedded has them")
    if data == "embedded":
        return Conversations(stage, draw=seed, word_problems=word_problems), []
    if data == "hub":
        return mixture(stage, after)
    return ConversationFiles(Path(data)), []
