"""What is recorded, as record.py sees it: something that takes steps, and what a trace does not know of them.

`training` looks at a training stage, `decoding` at an engine. Neither changes what they compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.cost import decode_cost, linear_params, training_flops
from nanochat.engine import Engine
from nanochat.hardware import Hardware
from nanochat.trainer import Stage


@dataclass
class Watched:
    """Something that takes steps. What `about` gives are fields of trace.py's Run."""

    name: str
    folder: Path  # in its profile/ trace and page are written
    hardware: Hardware
    more: str  # what to do where there are too few steps
    about: Callable[[int], dict[str, Any]]  # of the last so many steps
    left: int | None = None  # steps to come; None: nobody knows
    due: Callable[[], list[str]] = list  # what is done after this step and before the next, and belongs to neither
    note: Callable[[], None] = lambda: None  # called after each step
    at_once: bool = True  # the page is made after the last recorded step, and not when the work ends
    usual: Callable[[], bool] = lambda: True  # whether the last step did what most do: only such are compared


def training(stage: Stage) -> Watched:
    """A step is an optimizer step. Of a stage with steps of its own (RL's, of which most is decoding) the tokens are
    counted that were run while it learnt, and FLOPs are not.
    """
    state, settings = stage.state, stage.settings
    flops = training_flops(stage.model.config)  # now: counting builds a model, which is no part of a recorded step
    tokens: list[int] = [state.tokens]  # after each step

    def note() -> None:
        tokens.append(state.tokens)

    def about(steps: int) -> dict[str, Any]:
        return dict(
            first_step=state.step - steps,
            tokens_per_step=(tokens[-1] - tokens[-1 - steps]) / steps if stage.take else settings.total_batch_size,
            dtype=stage.meta["dtype"],
            fp8=stage.meta["plan"].get("fp8"),
            compiled=stage.compile,
            flops_per_token={} if stage.take else flops,
        )

    def due() -> list[str]:
        """What nanochat/trainer.py does between steps."""
        samples, evaluation = stage.due(settings.sample_every), stage.evaluation_due()
        found = dict(checkpoint=stage.save_due(), samples=samples, evaluation=evaluation)
        return [f"{what} after step {state.step}" for what, now in found.items() if now]

    more = "train longer (--num-iterations), or begin it again (--fresh)"
    left = settings.num_iterations - state.step
    return Watched(stage.name, stage.folder, stage.hardware, more, about, left, due, note)


def decoding(engine: Engine, name: str, folder: Path, hardware: Hardware, more: str) -> Watched:
    """A step is one of the engine: new prompts are read, and every running request gets one more token."""
    keys: list[list[int]] = []  # of each step, how many keys each row saw, its own among them
    prompts: list[int] = []  # of each step, how many prompt tokens were read before it
    linear_params(engine.config)  # remembered for `about`: counting builds a model, which is no part of a recorded step

    def note() -> None:
        keys.append(engine.slots.lengths[: len(engine.running)])
        prompts.append(engine.read)

    def due() -> list[str]:
        idle = not engine.waiting and all(request.finished for request in engine.running)
        return [f"a pause of the engine after step {len(keys)}"] if idle else []

    def about(steps: int) -> dict[str, Any]:
        model = engine.model
        sizes = model.dtype.itemsize, model.lm_head.weight.itemsize  # which may be int8's
        made = [decode_cost(engine.config, rows, *sizes) for rows in keys[-steps:]]
        return dict(
            first_step=len(keys) - steps,
            tokens_per_step=sum(map(len, keys[-steps:])) / steps,
            dtype=str(model.dtype),
            fp8=None,
            compiled=engine.decoding == "compiled",
            flops_per_token={},
            decoding=dict(
                how=engine.decoding,
                flops=sum(flops for flops, _ in made) / steps,
                bytes=sum(moved for _, moved in made) / steps,
                prompt_tokens=sum(prompts[-steps:]) / steps,
                rows=[len(rows) for rows in keys[-steps:]],
                prompts=prompts[-steps:],
            ),
        )

    return Watched(name, folder, hardware, more, about, None, due, note, False, lambda: not prompts[-1])
