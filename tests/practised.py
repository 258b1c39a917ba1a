"""A tiny chat model in a run of its own, taught in a second by hand: it answers word problems in one of three ways."""

import tiny
import torch

from nanochat import checkpoint
from nanochat.data.microworld.conversations import exchange, tool
from nanochat.run import Run
from nanochat.tasks.practice import PRACTICE
from nanochat.tokenizer import Tokenizer

RATES = dict(embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, scalar_lr=0.5)
ANSWERS = ("5 + 5 = 10.", "I see.", tool("2+3", "5", "2 + 3 = 5."))


def run(name: str = "a") -> Run:
    """A run with a tokenizer and a finished SFT, in $NANOCHAT_BASE_DIR."""
    made = Run.open(name)
    asked = [question.messages[0]["content"] for question in PRACTICE["word_sums"].train()[:24]]
    tokenizer = Tokenizer.train([*asked, "5 + 5 = 10. I see. 2+3 2 + 3 = 5."], 400)
    tokenizer.save(made.stage("tokenizer"))
    model = tiny.model(tokenizer.vocab_size, sequence_len=128)
    talks = [tokenizer.render(dict(messages=exchange(q, ANSWERS[i % 3]))) for i, q in enumerate(asked)]
    width = max(len(ids) for ids, _ in talks)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in talks])
    learnt = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in talks], dtype=torch.bool)
    targets = torch.where(learnt, ids, -1)[:, 1:]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        model(ids[:, :-1], targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    meta = dict(
        stage="sft", step=40, finished=True, tokenizer=tokenizer.fingerprint, data="microworld conversations (sft) 0",
        plan={}, dtype="torch.float32", rates=RATES, settings=dict(device_batch_size=8), state=dict(step=40), loader={},
    )  # fmt: skip
    checkpoint.save(made.stage("sft"), meta, model, dict(optimizer={}, loader={}))
    return made
