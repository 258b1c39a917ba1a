"""LlamaIndex: OpenAILike as a chat model, streamed, and as a completion model."""

import json
import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

about = dict(model=os.environ["MODEL"], api_base=os.environ["BASE_URL"], api_key="any", temperature=0, max_retries=0)
chat = OpenAILike(**about, is_chat_model=True, context_window=256)
plain = OpenAILike(**about, is_chat_model=False, context_window=256, max_tokens=4)
asked = [ChatMessage(role="user", content="What is 27 + 58?")]
print(
    json.dumps(
        dict(
            text=chat.chat(asked).message.content,
            streamed=[chunk.message.content for chunk in chat.stream_chat(asked)][-1],
            plain=plain.complete("One two").text,
            chunks=[chunk.text for chunk in plain.stream_complete("One two")][-1],
        )
    )
)
