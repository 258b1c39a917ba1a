"""inspect_ai: a task of two sums, scored."""

import json
import os

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message

samples = [Sample(input="What is 27 + 58?", target="85"), Sample(input="What is 11 + 12?", target="23")]
task = Task(dataset=samples, solver=[system_message("Be kind."), generate()], scorer=includes())
log = eval(task, model=f"openai-api/mine/{os.environ['MODEL']}", temperature=0, max_tokens=512, display="none",
           log_dir=os.environ["LOGS"])[0]  # fmt: skip
print(json.dumps(dict(status=log.status, error=str(log.error or ""),
                      answers=[sample.output.completion for sample in log.samples or []])))  # fmt: skip
