"""LangChain: ChatOpenAI (whole, streamed, with a history) and OpenAI (plain completions, which it sends as lists)."""

import json
import os

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

about = dict(base_url=os.environ["BASE_URL"], api_key="any", model=os.environ["MODEL"], temperature=0, max_retries=0)
chat = ChatOpenAI(**about)
history = [SystemMessage("Be kind."), AIMessage("Hello!"), HumanMessage("Hello!"), HumanMessage("What is 27 + 58?")]
plain = OpenAI(**about, max_tokens=4)
print(
    json.dumps(
        dict(
            text=chat.invoke("What is 27 + 58?").content,
            streamed="".join(chunk.content for chunk in chat.stream("What is 27 + 58?")),
            history=chat.invoke(history).content,
            plain=plain.invoke("One two"),
            batch=plain.batch(["One two", "The"]),
            chunks="".join(plain.stream("One two")),
        )
    )
)
