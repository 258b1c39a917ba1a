"""llm, Simon Willison's command line: a model of its own list, a prompt, and a conversation that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

home = Path(os.environ["LLM_USER_PATH"])
home.mkdir(exist_ok=True)
entry = dict(model_id="mine", model_name=os.environ["MODEL"], api_base=os.environ["BASE_URL"])
(home / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML


def llm(*words):
    return subprocess.run(
        [Path(sys.executable).parent / "llm", *words], check=True, capture_output=True, text=True
    ).stdout


ask = ("-m", "mine", "-o", "temperature", "0", "What is 27 + 58?")
print(
    json.dumps(
        dict(text=llm(*ask, "--no-stream"), streamed=llm(*ask), more=llm("-c", "-o", "temperature", "0", "Hello!"))
    )
)
