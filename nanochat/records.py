"""JSON files that a run depends on: a missing one is missing, a damaged one is an error, and nothing in between.

Each carries a checksum of itself, since a flipped bit in a number is JSON all the same; one without it (an older
version's, or somebody's own) is checked for what its readers need. What to do about a damaged one is said with it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import json_of, write_atomically

CHECKSUM = "sha256"
TRAINING = dict(
    plan=dict, data=str, device=str, world=int, dtype=str, compiled=bool, parameters=dict, steps=int, tokens=int,
    flops=(int, float), training_seconds=(int, float), tok_per_s=(int, float), train_loss=(int, float),
    val_bpb=(int, float, type(None)), skipped_steps=int, peak_memory=int,
)  # fmt: skip
TOKENIZER = dict(wanted=dict, characters=int, fingerprint=str, vocab_size=int)
TEXT = dict(train_bpb=(int, float), val_bpb=(int, float))
CORE = dict(tasks=dict, core=(int, float), partial=bool, missing=list)
CHATCORE = dict(score=(int, float), low=(int, float), high=(int, float), partial=bool, missing=list)
INT8: dict[str, Any] = dict(dtype=str, bpb=list, tasks=dict)
TASK = dict(wanted=str, n=int, counts=dict, rate=(int, float), low=(int, float), high=(int, float), examples=dict)

# Keys of an evaluation's summary that hold results by stage, or by the name of a Hugging Face model.
OF_STAGES: dict[str, dict[str, Any]] = dict(chat=TASK, core=CORE, core_hf=CORE, chatcore=CHATCORE, int8=INT8)


def digest(content: dict[str, Any]) -> str:
    """Of the values, however they are laid out in the file."""
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file by `content` and its checksum, atomically."""
    write_atomically(path, json.dumps({**content, CHECKSUM: digest(content)}, indent=1).encode())


def read(path: Path, remedy: str) -> dict[str, Any] | None:
    """What `write` wrote; None where there is no file.

    Raises UserError with `remedy` for one that is damaged, OSError for one that cannot be read.
    """
    try:
        found = json_of(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, MemoryError):
        raise UserError(f"{path} is damaged: it is no JSON; {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; {remedy}")
    written = found.pop(CHECKSUM, None)
    if written is not None and written != digest(found):
        raise UserError(f"{path} is damaged: it does not match its checksum; {remedy}")
    return found


def rows(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where there is no file. Raises UserError for one that is damaged."""
    try:
        found = [json_of(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, MemoryError):
        raise UserError(f"{path} is damaged: a line of it is no JSON; {remedy}") from None
    if not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path} is damaged: a line of it is no JSON object; {remedy}")
    return found


def lacks(stage: str, summary: dict[str, Any]) -> str:
    """What a summary of a stage ("tokenizer", "base", …, "eval") has not that its readers need; "" if nothing."""
    if summary.get("stage", stage) != stage:
        return f"it is of {summary['stage']!r}"
    if stage == "tokenizer":
        return _wrong(summary, TOKENIZER) or _wrong(summary["wanted"], dict(data=str, fingerprint=str))
    if stage != "eval":
        return _wrong(summary, TRAINING) or _wrong(summary["parameters"], dict(total=int))
    for name, entry in summary.items():
        if name == "stage":
            continue
        if not isinstance(entry, dict):
            return f"{name} is no object"
        if name not in OF_STAGES:
            if why := _wrong(entry, TEXT):
                return f"{name}: {why}"
            continue
        for source, found in entry.items():
            if name != "chat":
                why = _wrong(found, OF_STAGES[name])
            elif not isinstance(found, dict):
                why = "it is no object"
            else:
                why = next((f"{task}: {why}" for task, result in found.items() if (why := _wrong(result, TASK))), "")
            if why:
                return f"{name}, {source}: {why}"
    return ""


def _wrong(found: Any, kinds: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "it is no object"
    for key, kind in kinds.items():
        if not isinstance(found.get(key, ...), kind):
            return f"{key} is missing" if key not in found else f"{key} is of another type"
    return ""
