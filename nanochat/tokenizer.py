"""Byte-level BPE: trained by rustbpe (or bpe.py, without it), run by tiktoken, stored as plain JSON.

Also the one place that turns a conversation into ids and a loss mask:

    <|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> content <|assistant_end|>)*

Text is always encoded as ordinary text: a user who types "<|bos|>" gets letters, never the special token.
The split pattern is GPT-4's, but for numbers of at most 2 digits; it and the special tokens are nanochat's, so that
checkpoints and ids carry over.
"""

import base64
import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import tiktoken
import torch

from nanochat import optional
from nanochat.errors import UserError
from nanochat.files import encodable, json_of, write_atomically

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (  # in this order after the merges
    "<|bos|>",  # before every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the tool
    "<|python_end|>",
    "<|output_start|>",  # what the tool answered
    "<|output_end|>",
)
LEAST = 256 + len(SPECIAL_TOKENS)  # tokens of a vocabulary: the bytes
FILE = "tokenizer.json"
SHORT = 2000  # characters of a text on average, below which threads take longer than they save
BLANKS = 100_000
STRETCH = re.compile(rf"(?<!\s)\s{{{BLANKS},}}")
AGAIN = "put a copy in its place, or delete it, and python -m scripts.tok_train, called as before, makes it again"

Conversation = dict[str, Any]  # {"messages": [{"role": …, "content": …}, …]}


class Tokenizer:
    """Ids from text and back. `merges[i]` is the byte string of id i; the special tokens follow."""

    def __init__(self, merges: Sequence[bytes]):
        self.merges = list(merges)
        special = {name: len(self.merges) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "nanochat",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: i for i, token in enumerate(self.merges)},
            special_tokens=special,
        )
        self.special = special
        self.vocab_size = len(self.merges) + len(special)
        self.bos = special["<|bos|>"]

    # ---- making, storing

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from texts. Raises UserError when vocab_size is too small, or more than the text allows."""
        wanted = vocab_size - len(SPECIAL_TOKENS)
        if wanted < 256:
            raise UserError(
                f"--vocab-size is {vocab_size}, wanted at least {256 + len(SPECIAL_TOKENS)} (bytes, specials)"
            )
        merges = _learn(texts, wanted)
        if len(merges) < wanted:
            most = len(merges) + len(SPECIAL_TOKENS)
            raise UserError(
                f"the text has pairs for a vocabulary of {most:,} only, not {vocab_size:,}; "
                f"give more text, or scripts.tok_train a --vocab-size of {most} or less (speedrun.sh has no such flag)"
            )
        return cls(merges)

    def save(self, folder: Path) -> None:
        """Writes folder/tokenizer.json: pattern, special tokens, merges in base64, and their fingerprint."""
        content = dict(
            pattern=SPLIT_PATTERN,
            special_tokens=SPECIAL_TOKENS,
            fingerprint=self.fingerprint,
            merges=[base64.b64encode(token).decode() for token in self.merges],
        )
        write_atomically(folder / FILE, json.dumps(content, indent=0).encode())

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads what `save` wrote. Raises UserError when it is not there or damaged."""
        path = folder / FILE
        try:
            content = json_of(path.read_bytes())
            if content["pattern"] != SPLIT_PATTERN or tuple(content["special_tokens"]) != SPECIAL_TOKENS:
                raise UserError(f"{path} was made with another split pattern or other special tokens; train it again")
            made = cls([base64.b64decode(token, validate=True) for token in content["merges"]])
            if content.get("fingerprint", made.fingerprint) != made.fingerprint:
                raise ValueError("it does not match its fingerprint")
            return made
        except FileNotFoundError:
            raise UserError(f"there is no tokenizer at {path}; train one first: python -m scripts.tok_train") from None
        except (ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(f"{path} is damaged ({error}); {AGAIN}") from None

    @property
    def fingerprint(self) -> str:
        """Changes when any id changes its meaning; checkpoints carry it."""
        return hashlib.sha256(b"\0".join(self.merges) + SPLIT_PATTERN.encode()).hexdigest()[:16]

    # ---- text and ids

    def encode(self, text: str) -> list[int]:
        first, *more = splittable(text)
        ids = self.encoding.encode_ordinary(first)
        for part in more:
            ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_documents(self, texts: list[str], threads: int = 4) -> list[list[int]]:
        """Each text's ids with <|bos|> before. Short texts are encoded here: handing one to a thread takes longer."""
        here = sum(map(len, texts)) < SHORT * len(texts) or any(len(splittable(text)) > 1 for text in texts)
        batch = lambda: self.encoding.encode_ordinary_batch(texts, num_threads=threads)
        return [[self.bos, *ids] for ids in (map(self.encode, texts) if here else batch())]

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(list(ids))

    def token_bytes(self) -> torch.Tensor:
        """(vocab_size,) int64: how many bytes of text each id stands for; 0 for special tokens."""
        return torch.tensor([len(token) for token in self.merges] + [0] * len(SPECIAL_TOKENS))

    # ---- conversations

    def render(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """(ids, mask) of a whole conversation; mask is 1 where the assistant is to learn the token.

        Trained: the assistant's text, python_start, code, python_end and assistant_end. Not trained: all else, tool
        output too. Raises ValueError when the conversation is malformed (see check_conversation).
        """
        ids, mask = [self.bos], [0]
        for message in merge_system(check_conversation(conversation)):
            tokens, trained = self.turn(message)
            ids += tokens
            mask += trained
        return ids, mask

    def turn(self, message: dict) -> tuple[list[int], list[int]]:
        """(ids, mask) of one message, the user's or the assistant's."""
        ids: list[int] = []
        mask: list[int] = []

        def add(tokens: list[int] | str, trained: int) -> None:
            tokens = [self.special[tokens]] if isinstance(tokens, str) else tokens
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        content = message["content"]
        if message["role"] == "user":
            add("<|user_start|>", 0)
            add(self.encode(content), 0)
            add("<|user_end|>", 0)
            return ids, mask
        add("<|assistant_start|>", 0)
        for part in [dict(type="text", text=content)] if isinstance(content, str) else content:
            tokens = self.encode(part["text"])
            if part["type"] == "text":
                add(tokens, 1)
            elif part["type"] == "python":
                add("<|python_start|>", 1)
                add(tokens, 1)
                add("<|python_end|>", 1)
            else:
                add("<|output_start|>", 0)
                add(tokens, 0)
                add("<|output_end|>", 0)
        add("<|assistant_end|>", 1)
        return ids, mask

    def render_for_completion(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation that ends with the user's turn, up to and with <|assistant_start|>."""
        ids, _ = self.render(dict(messages=messages))
        return [*ids, self.special["<|assistant_start|>"]]


def splittable(text: str) -> list[str]:
    """The text, in several parts where it has a stretch of BLANKS blanks: at a million the splitter's stack is full."""
    if len(text) < BLANKS:
        return [text]
    within = (range(found.start() + BLANKS, found.end() + 1, BLANKS) for found in STRETCH.finditer(text))
    cuts = [0, *chain.from_iterable(within), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:]) if start < end]


PART_TYPES = ("text", "python", "python_output")


def check_conversation(conversation: Any) -> list[dict]:
    """The messages of a well-formed conversation; raises ValueError with what is wrong otherwise.

    A conversation is a list of messages or {"messages": [...]}: an optional system message, then user and assistant in
    turn, beginning with the user. Content is a string; the assistant's may be a list of parts.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else conversation
    if not isinstance(messages, list) or not messages:
        raise ValueError('wanted a list of messages or {"messages": [...]}')
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a message is {reprlib.repr(message)}, wanted an object with role and content")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if len(turns) < len(messages) and not isinstance(messages[0]["content"], str):
        raise ValueError("the system message's content is no string")
    if len(turns) < len(messages):
        encodable(messages[0]["content"])
    if not turns:
        raise ValueError("a system message stands alone")
    for i, message in enumerate(turns):
        role, content = message["role"], message["content"]
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            said = f"message {i + 1} is from {reprlib.repr(role)} but should be from {wanted!r}"
            raise ValueError(f"{said}: turns must alternate")
        if isinstance(content, str):
            encodable(content)
            continue
        if role == "user" or not isinstance(content, list):
            raise ValueError(f"message {i + 1}: content is {type(content).__name__}, wanted a string")
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") not in PART_TYPES
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError(f"message {i + 1}: a part wants a type ({', '.join(PART_TYPES)}) and a text")
            encodable(part["text"])
    return messages


def merge_system(messages: list[dict]) -> list[dict]:
    """A leading system message joined to the first user message by a blank line."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [dict(user, content=f"{system['content']}\n\n{user['content']}"), *rest]


def _learn(texts: Iterable[str], size: int) -> list[bytes]:
    """Byte strings by id, `size` of them or as many as the text has pairs for."""
    try:
        rustbpe = optional.package("rustbpe", "Tokenizer")
    except ImportError:
        from nanochat.bpe import learn

        return learn(texts, size, SPLIT_PATTERN)
    trainer = rustbpe.Tokenizer()
    parts = (part for text in texts for part in splittable(text))
    trainer.train_from_iterator(parts, size, pattern=SPLIT_PATTERN)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
