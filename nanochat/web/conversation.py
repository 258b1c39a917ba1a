"""What clients send as messages, as a conversation of the kind that the model was taught.

It knows the user and the assistant in turn, the user first, and a system message that is joined to the first turn. So:
system and developer messages at the beginning are one; those that come later, and results of tools, are the user's
text in their places; turns of the same side that follow each other are one, a blank line between; an assistant's turn
without content, as beside the calls of a tool, is none; and a greeting that comes first answers an empty message.
"""

from itertools import groupby

from nanochat.web.schema import ApiError, Message

Content = str | list[dict]


def conversation(messages: list[Message]) -> list[dict]:
    """As tokenizer.py has it: perhaps a system message, then user and assistant in turn, the user last.

    Raises ApiError for what cannot be meant.
    """
    system: list[str] = []
    turns: list[tuple[str, list[Content]]] = []
    for i, message in enumerate(messages):
        content = message.plain(f"messages.{i}")
        if content is None:
            continue
        if message.role in ("system", "developer") and not turns:
            system.append(str(content))
            continue
        side = "assistant" if message.role == "assistant" else "user"
        if not turns or turns[-1][0] != side:
            turns.append((side, []))
        turns[-1][1].append(content)
    if not turns and system:
        turns, system = [("user", [*system])], []
    if not turns or turns[-1][0] != "user":
        raise ApiError(400, "messages: the last one must be the user's", param="messages")
    if turns[0][0] == "assistant":
        turns.insert(0, ("user", [""]))
    found = [dict(role=side, content=joined(contents)) for side, contents in turns]
    return [*([dict(role="system", content="\n\n".join(system))] if system else []), *found]


def joined(contents: list[Content]) -> Content:
    """Contents of the same side as one, a blank line between."""
    found: list[dict] = []
    for is_text, group in groupby(contents, lambda content: isinstance(content, str)):
        for content in ["\n\n".join(map(str, group))] if is_text else group:
            between = [dict(type="text", text="\n\n")] if found else []
            found += [*between, *([dict(type="text", text=content)] if isinstance(content, str) else content)]
    return found if len(found) > 1 or not isinstance(contents[0], str) else found[0]["text"]
