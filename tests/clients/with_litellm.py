"""litellm: chat completions, whole and streamed, and plain ones."""

import json
import os

import litellm

about = dict(api_base=os.environ["BASE_URL"], api_key="any", temperature=0, num_retries=0)
model, messages = os.environ["MODEL"], [dict(role="user", content="What is 27 + 58?")]
whole = litellm.completion(model=f"openai/{model}", messages=messages, **about)
stream = litellm.completion(model=f"openai/{model}", messages=messages, stream=True, **about)
plain = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="One two", max_tokens=4, **about)
print(
    json.dumps(
        dict(
            text=whole.choices[0].message.content,
            streamed="".join(chunk.choices[0].delta.content or "" for chunk in stream),
            plain=plain.choices[0].text,
            tokens=whole.usage.completion_tokens,
        )
    )
)
