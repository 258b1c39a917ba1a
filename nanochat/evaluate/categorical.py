"""Multiple choice without writing: the answer is the letter that the model gives the largest logit where its answer
would begin, right after <|assistant_start|>. Nothing else of the vocabulary is computed.

Questions of like length go through the model together, padded at the end, which a causal model does not see; the head
is multiplied for the last position and the letters only. Memory is that of TOKENS tokens' activations, whatever the
task. The letters' products are in float32 also where the model computes in bfloat16, whose ties would favour the first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.chat import prompt_within
from nanochat.evaluate.letters import shifted
from nanochat.gpt import GPT
from nanochat.tasks import Question, Task
from nanochat.tokenizer import Tokenizer

TOKENS = 8192  # of a batch, padding included; one question may have more

Numbered = tuple[int, Question]  # a question and its place in the task


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    """Each letter's token. Raises ValueError for one that is several."""
    found = [tokenizer.encode(letter) for letter in letters]
    for letter, ids in zip(letters, found):
        if len(ids) != 1:
            raise ValueError(f"the letter {letter!r} is {len(ids)} tokens, wanted one")
    return [ids[0] for ids in found]


def batches(lengths: Sequence[int], tokens: int = TOKENS) -> list[list[int]]:
    """Indices, longest first, in groups of at most so many tokens with their padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.inference_mode()
def letter_logits(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[list[Tensor], list[bool]]:
    """(raw logits (letters,) float32 on the CPU of each question, whether its prompt had to be cropped).

    The softcap is left out: it keeps the order. tick: called with the number of questions done, after each batch.
    """
    context, device = model.config.sequence_len, model.lm_head.weight.device
    whole = [tokenizer.render_for_completion(question.messages) for question in questions]
    prompts = [prompt_within(tokenizer, question.messages, 1, context) for question in questions]
    found: list[Tensor] = [torch.empty(0)] * len(questions)
    for group in batches([len(prompt) for prompt in prompts]):
        last = torch.tensor([len(prompts[i]) - 1 for i in group], device=device)
        width = len(prompts[group[0]])
        idx = torch.tensor([prompts[i] + [0] * (width - len(prompts[i])) for i in group], device=device)  # (B, T)
        x = model.hidden(idx)[torch.arange(len(group), device=device), last].float()  # (B, C)
        for row, i in enumerate(group):
            rows = model.lm_head.weight[letter_ids(tokenizer, questions[i].letters)].float()  # (letters, C)
            found[i] = (rows @ x[row]).cpu()
        tick(len(group))
    return found, [prompt != ids for prompt, ids in zip(prompts, whole)]


def answered(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Numbered],
    permute: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """A row for each question: index, expected, answer (a letter), outcome, letters and their probabilities among
    themselves, whether the prompt was cropped.

    permute: asks each with every cyclic shift of its options, and adds "shifts", the answer under each.
    Raises ValueError for a question without options (letters.py), where they are to be permuted.
    """
    counts = [len(question.letters) if permute else 1 for _, question in questions]
    asked = [shifted(q, by) if by else q for (_, q), count in zip(questions, counts) for by in range(count)]
    logits, cropped = letter_logits(model, tokenizer, asked, tick)
    rows, at = [], 0
    for (index, question), count in zip(questions, counts):
        letters = list(question.letters)
        chosen = [letters[int(found.argmax())] for found in logits[at : at + count]]
        softcap = model.config.softcap
        p = torch.softmax(softcap * torch.tanh(logits[at] / softcap), 0).tolist()
        row = dict(
            index=index,
            question=question.messages[-1]["content"],
            expected=question.expected,
            answer=chosen[0],
            python=[],
            outcome=task.grade(question, chosen[0]),
            letters=letters,
            probabilities=[round(value, 4) for value in p],
            cropped=cropped[at],
        )
        rows.append({**row, "shifts": chosen} if permute else row)
        at += count
    return rows
