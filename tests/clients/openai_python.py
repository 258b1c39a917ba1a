"""openai for Python: models, answers whole and streamed, the client's own stream helper, lists of prompts, echo."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="any", max_retries=0)
model = client.models.list().data[0].id
sum_ = [dict(role="user", content="What is 27 + 58?")]
whole = client.chat.completions.create(model=model, messages=sum_, temperature=0)
helped = {}
start = getattr(client.chat.completions, "stream", None) or client.beta.chat.completions.stream
with start(model=model, messages=sum_, temperature=0) as stream:
    kinds = {event.type for event in stream}
    message = stream.get_final_completion().choices[0].message
plain = client.completions.create(model=model, prompt=["One two", "The"], max_tokens=3, n=2, temperature=0)
echo = client.completions.create(model=model, prompt="One two", max_tokens=1, echo=True, logprobs=2, temperature=0)
said = echo.choices[0].logprobs
print(
    json.dumps(
        dict(
            version=openai.__version__,
            text=whole.choices[0].message.content,
            streamed=message.content,
            events=message.model_extra["events"],
            whole_events=whole.choices[0].message.model_extra["events"],
            kinds=sorted(kinds),
            indices=[choice.index for choice in plain.choices],
            echoed=echo.choices[0].text,
            first=said.token_logprobs[0],
            own=all(top[t] == p for t, p, top in list(zip(said.tokens, said.token_logprobs, said.top_logprobs))[1:]),
        )
    )
)
