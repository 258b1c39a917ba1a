"""What clients send as messages, as a conversation of the kind that the model was taught.

It knows the user and the assistant in turn, the user first, and a system message that is joined to the first turn. So:
system and developer messages at the beginning are one; those that come later, and results of tools, are the user's
text in their places; turns of the same side that follow each other are one, a blank line between; an assistant's turn
without content, as beside the calls of a tool, is none; and a greeting that comes first answers an empty message.
"""

from nanochat.web.schema import ApiError, Message

Content = str | list[dict]


def conversation(messages: list[Message]) -> list[dict]:
    """As tokenizer.py has it: perhaps a system message, then user and assistant in turn, the user last.

    Raises ApiError for what cannot be meant.
    """
    system: list[str] = []
    turns: list[dict] = []
    for i, message in enumerate(messages):
        content = message.plain(f"messages.{i}")
        if content is None:
            continue
        if message.role in ("system", "developer") and not turns:
            system.append(str(content))
            continue
        side = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == side:
            turns[-1]["content"] = joined(turns[-1]["content"], content)
        else:
            turns.append(dict(role=side, content=content))
    if not turns and system:
        turns, system = [dict(role="user", content="\n\n".join(system))], []
    if not turns or turns[-1]["role"] != "user":
        raise ApiError(400, "messages: the last one must be the user's", param="messages")
    if turns[0]["role"] == "assistant":
        turns.insert(0, dict(role="user", content=""))
    return [*([dict(role="system", content="\n\n".join(system))] if system else []), *turns]


def joined(first: Content, second: Content) -> Content:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    parts = lambda content: [dict(type="text", text=content)] if isinstance(content, str) else content
    return [*parts(first), dict(type="text", text="\n\n"), *parts(second)]
