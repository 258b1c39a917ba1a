"""Prints, as JSON, for how many forms of its arguments each kernel of a serving engine is compiled: the forms that
`Engine.warm` meets, and those of every prompt length and number of rows that are not among them. Needs a process that
does not interpret.
"""

import json

import tiny
import torch

from kernels import targets, use
from kernels.triton_utils import capture
from nanochat.engine.cache import Slots
from nanochat.engine.engine import PREFILLS
from nanochat.engine.graphs import Graphs

SLOTS = 6
model = tiny.model(sequence_len=1100, n_layer=5, n_head=4, n_kv_head=2, n_embd=256, window_pattern="SL")
model.set_dtype(torch.bfloat16)
model = model.to("meta", torch.bfloat16)
context = model.config.sequence_len


def prefill(start, fresh):
    slots = Slots(model.config, SLOTS, torch.device("meta"), torch.bfloat16)
    slots.lengths = [start] * SLOTS
    model.hidden(torch.zeros(1, fresh, dtype=torch.int64, device="meta"), slots.view(3, 4, fresh))


def decode(rows):
    slots = Slots(model.config, SLOTS, torch.device("meta"), torch.bfloat16)
    Graphs(model, slots)([0] * rows)


def forms(call, *arguments):
    with capture() as launches, use("triton"), torch.inference_mode():
        call(*arguments)
    return {(launch.kernel.fn.__name__, repr(targets.source(launch))) for launch in launches}


met = set()
for fresh in (*PREFILLS, context - 2):
    met |= forms(prefill, 0, fresh)
for rows in (1, 2, 4, SLOTS):
    met |= forms(decode, rows)
later = set()
for fresh in (*range(1, 140), *range(140, context - 1, 37)):
    for start in {0, 53 * fresh % (context - 1 - fresh)}:
        later |= forms(prefill, start, fresh)
for rows in range(1, SLOTS + 1):
    later |= forms(decode, rows)
count = lambda found: {name: sum(name == other for other, _ in found) for name, _ in sorted(found)}
print(json.dumps(dict(met=count(met), new=count(later - met))))
