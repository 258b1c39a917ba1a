"""Our tokenizer as transformers loads it: tokenizer.json (of the library `tokenizers`), its settings, a chat template.

Its ids are ours on every text, with two exceptions that are in the format: a stock tokenizer takes a typed "<|bos|>"
for the token (but with split_special_tokens=True), and the two noncharacters below vanish. The chat template has
messages as our `Tokenizer.render` has them: what looks like a special token stays text.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

ESCAPE, END = "\ufdd0", "\ufdd1"  # noncharacters: "<", ESCAPE, "|" is the text "<|"; END stands between two texts
NORMALIZER = dict(type="Replace", pattern=dict(String=f"{ESCAPE}|"), content="|")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
DAMAGED = "fetch or export it again"


def files(tokenizer: Tokenizer, context: int, eos: str) -> dict[str, bytes]:
    """The tokenizer's files by name. context: the model's, in tokens; eos: the special token that ends what it says."""
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|bos|>", eos_token=eos, pad_token="<|bos|>",
        additional_special_tokens=list(SPECIAL_TOKENS), clean_up_tokenization_spaces=False, model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    return {
        "tokenizer.json": json.dumps(as_json(tokenizer), ensure_ascii=False, indent=1).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
        "chat_template.jinja": TEMPLATE.read_bytes(),
    }


def as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer.json holds."""
    written = [in_letters(token) for token in tokenizer.merges]
    special = [
        dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for name, i in tokenizer.special.items()
    ]
    split = lambda pattern, behavior: dict(type="Split", pattern=pattern, behavior=behavior, invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    steps = [split(dict(String=END), "Removed"), split(dict(Regex=SPLIT_PATTERN), "Isolated"), byte_level]
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
        fuse_unk=False, byte_fallback=False, ignore_merges=True, vocab={token: i for i, token in enumerate(written)},
        merges=[[in_letters(one), in_letters(other)] for one, other in pairs(tokenizer.merges)],
    )  # fmt: skip
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=special,
        normalizer=NORMALIZER,
        pre_tokenizer=dict(type="Sequence", pretokenizers=steps), post_processor=None,
        decoder=dict(byte_level), model=model,
    )  # fmt: skip


def pairs(merges: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Every way to make each token of two others, in the order of the tokens: what tiktoken may merge, and when."""
    ids = {token: i for i, token in enumerate(merges)}
    found = []
    for token in merges:
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(one, other) for one, other in halves if one in ids and other in ids]
        found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found


def _letters() -> dict[int, str]:
    """A printable letter for each byte, as GPT-2 chose them: Latin-1's own, and 256, 257, … for those it has not."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {**{byte: chr(byte) for byte in own}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


LETTERS = _letters()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def in_letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def read(path: Path, content: Any) -> Tokenizer:
    """Our tokenizer from the content of a tokenizer.json. Raises UserError for one that splits text otherwise, or has
    other special tokens.
    """
    try:
        vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added}
        plain = {token: i for token, i in vocab.items() if token not in special}
        ordered = sorted(plain, key=lambda token: plain[token])
        if [plain[token] for token in ordered] != list(range(len(ordered))):
            raise ValueError("its ids have gaps")
        made = Tokenizer([bytes(BYTES[letter] for letter in token) for token in ordered])
        if not {bytes([i]) for i in range(256)} <= set(made.merges):
            raise ValueError("not every byte is a token")
        merged = [
            plain["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in content["model"]["merges"]
        ]
        patterns = _patterns(content.get("pre_tokenizer") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{path} is no byte-level BPE tokenizer of nanochat's ({problem!r}); {DAMAGED}") from None
    if merged != sorted(merged):
        raise UserError(f"{path} merges in another order than that of its ids, so its ids would not be ours")
    if special != made.special:
        raise UserError(f"{path} has other special tokens than nanochat's {', '.join(SPECIAL_TOKENS)}, in this order")
    if content.get("normalizer") not in (None, NORMALIZER):
        raise UserError(f"{path} changes text before it splits it (normalizer), so its ids would not be ours")
    if [pattern for pattern in patterns if pattern != END] != [SPLIT_PATTERN]:
        raise UserError(f"{path} splits text by another pattern than nanochat's, so its ids would not be ours")
    return made


def _patterns(step: dict[str, Any]) -> list[str]:
    """Of all splits of a pre-tokenizer, in order."""
    if step.get("type") == "Sequence":
        return [pattern for one in step["pretokenizers"] for pattern in _patterns(one)]
    if step.get("type") == "Split":
        return list(step["pattern"].values())
    return []
