"""The predicted memory of a training step against what is allocated: in the code that torch.compile makes for an H100
(counted on the null device), and in real steps on this CPU.
"""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import tiny
import torch

from nanochat import cost, plan, presets, trainer
from nanochat.gpt import GPT, GPTConfig
from nanochat.plan import decide
from nanochat.recipe import model_config
from nanochat.run import Run
from profiling.compiled import lower, memory, null_device
from profiling.compiled.case import Case
from profiling.compiled.null_cards import CARDS

BAND = 0.05
CASES = [(12, 32, "auto", "bfloat16", "")]
CASES += [(12, 8, kernels, dtype, "") for kernels in ("auto", "torch") for dtype in ("bfloat16", "float16")]
CASES += [(12, 8, kernels, "bfloat16", scaling) for kernels in ("auto", "torch") for scaling in ("current", "delayed")]
CASES += [(12, 4, "torch", "float32", ""), (24, 16, "auto", "bfloat16", ""), (24, 1, "auto", "bfloat16", "")]
CASES += [(24, 8, "torch", "bfloat16", ""), (24, 16, "auto", "bfloat16", "current")]


@pytest.mark.parametrize(
    "words, said", [("--card=voodoo", "has no card 'voodoo'"), ("--kernels=what", "'what'"), ("--dtype=x", "--dtype"),
                    ("--fp8=x", "--fp8")]
)  # fmt: skip
def test_what_cannot_be_counted_is_one_sentence(words, said, capsys):
    assert tiny.call_module("profiling.compiled.memory", words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.fixture
def null() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)


def check(case: Case, found: dict) -> None:
    """Peak, parameters, shadows and saved activations within 5%; one forward and one backward graph."""
    parts = memory.predicted(case)
    assert found["graphs"][:2] == ["forward", "backward"]
    assert set(found["graphs"][2:]) <= {"inference"} and (case.optimizer or not found["graphs"][2:])
    assert sum(parts.values()) == pytest.approx(found["peak"], rel=BAND)
    phases = found["phases"]
    for kind in ("parameters", "shadows"):
        assert parts.get(kind, 0) == pytest.approx(phases["before"]["kinds"].get(kind, 0), rel=BAND)
    config = GPTConfig(**case.config)
    tokens, itemsize = case.rows * config.sequence_len, cost.ITEMSIZE[case.dtype]
    head = 4 * config.padded_vocab_size * config.n_embd + tokens * config.n_embd * itemsize  # its dW and dx
    assert parts["saved activations"] + head == pytest.approx(phases["forward 1"]["after"]["saved"], rel=BAND)


@pytest.mark.slow
@pytest.mark.parametrize("depth, rows, kernels, dtype, fp8", CASES)
def test_the_lowered_step_allocates_what_is_predicted(null, depth, rows, kernels, dtype, fp8):
    case = Case(asdict(model_config(depth, 32768)), rows, dtype, fp8, kernels, optimizer=False)
    check(case, memory.measured(case))


@pytest.mark.slow
def test_the_model_of_october_2025_and_an_update_allocate_what_is_predicted(null):
    config = GPTConfig.original(n_layer=4, n_embd=512, n_head=4, n_kv_head=2, vocab_size=8192)
    case = Case(asdict(config), rows=4, optimizer=True)
    check(case, memory.measured(case))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_compiled_validation_holds_one_chunk_of_logits(null, kernels):
    config = model_config(1, 32768, 512)
    case = Case(asdict(config), rows=32, kernels=kernels, optimizer=False)
    chunk, activations = 4096 * 32768 * 2, 32 * 512 * config.n_embd * 2
    assert chunk < lower.ask("tests.null_device.evaluation", case, "h100") < chunk + 16 * activations


def allocated(step) -> int:
    """Most bytes alive in a step beyond those alive before it, of the profiler's record of allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    total = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        total += size
        most = max(most, total)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("depth, rows, pattern", [(4, 32, "L"), (2, 64, "SL")])
def test_a_compiled_step_on_the_cpu_allocates_what_is_predicted(depth, rows, pattern):
    config = model_config(depth, 4096, 256, head_dim=64, window_pattern=pattern)
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    optimizer = model.setup_optimizer()
    hardware = SimpleNamespace(device=torch.device("cpu"))
    run = trainer.runnable(SimpleNamespace(hardware=hardware, model=model, optimizer=optimizer, compile=True))
    ids = torch.randint(config.vocab_size, (rows, config.sequence_len))

    def step() -> None:
        for _ in range(2):
            run(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {t.data_ptr(): t.nbytes for t in [*model.buffers(), ids, *moments]}
    storages |= {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    found = sum(storages.values()) + allocated(step)
    parts = cost.training_memory(config, rows * config.sequence_len, dtype="float32", device="cpu")
    assert sum(parts.values()) == pytest.approx(found, rel=BAND)


# ---- what the formula says, by hand


def test_what_is_freed_after_the_step_is_not_the_steps():
    allocations = memory.Allocations({}, device="cpu")
    with allocations:
        kept, gone = torch.empty(100), torch.empty(10)
        del gone
    allocations.end()
    del kept
    assert [(sign, block.size) for _, sign, block in allocations.events] == [(1, 400), (1, 40), (-1, 40)]


def test_parts_by_hand():
    config = model_config(24, 32768)
    parts = cost.training_memory(config, 16 * 2048)
    counts = cost.parameter_counts(config)
    matrices, head = counts["transformer_matrices"], counts["lm_head"]
    tables = counts["wte"] + counts["value_embeds"]
    assert parts["parameters"] == parts["gradients"] == 4 * (matrices + head) + 2 * tables
    assert parts["shadows"] == 2 * (matrices + head)
    assert parts["moments"] == 4 * matrices + 8 * head + 4 * tables
    unit = 16 * 2048 * 1536 * 2
    per_token = 16 * 2048 * (24 * 12 * 4 + 12 * 12 * 2 + 2)  # log-sum-exps, gates
    assert parts["saved activations"] == (24 * 14 + 4) * unit + per_token
    assert sum(parts.values()) == cost.training_bytes(config, 16 * 2048)


def test_graphs_keep_a_micro_batch_while_the_optimizer_works():
    config = model_config(24, 32768)
    alone, kept = (cost.training_memory(config, 16 * 2048, replayed=replayed) for replayed in (False, True))
    slack = "allocator's slack"
    assert {name: kept[name] for name in alone if name != slack} == {k: v for k, v in alone.items() if k != slack}
    largest = 96 * 4 * 1536**2 * 2  # Muon's, of the bank of all square matrices
    assert kept["optimizer"] == largest and "optimizer" not in alone
    assert cost.training_memory(config, 64, replayed=False)["optimizer"] == largest  # a micro-batch of less than that


def test_ranks_share_moments_and_pad_banks():
    config = model_config(20, 32768)
    one, eight = (cost.training_memory(config, 2048, world) for world in (1, 8))
    assert eight["parameters"] > one["parameters"]  # 20 matrices of a shape become 24
    assert eight["moments"] < one["moments"] / 8 * 1.21
    assert "NCCL" in eight and "NCCL" not in one
    gather = cost._Step(model_config(24, 32768), 1, 8, "bfloat16", "", "auto", "cuda").moments()["save"]
    assert sum(gather.values()) == 4 * 24 * 6144 * 1536  # one bank at a time


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_a_preset_takes_less_than_nine_tenths_of_its_card(card, gpus):
    old = card.capability < (8, 0)
    preset = presets.gpu(card.memory / 2**30, gpus, None, "float16" if old else "bfloat16")
    config = preset.config()
    how = dict(dtype="float16", kernels="torch") if old else {}
    rows = int(preset.base["device_batch_size"])
    assert cost.training_bytes(config, rows * config.sequence_len, gpus, **how) < 0.9 * card.memory


def test_a_dry_run_shows_the_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    preset = presets.gpu(79.1, 8, None)
    config = preset.config()
    flags = decide.stage_flags(preset, "hub", "cuda", None)
    made = plan.Plan(
        "r", {}, "cuda", "NVIDIA H100 80GB HBM3", 8, "hub", [], flags, asdict(config), 524288, dict(base=100),
        memory=int(79.1 * 2**30),
    )  # fmt: skip
    plan.show(made, Run.open("r"), ["base"])
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  memory"))
    assert "GiB per GPU" in lines[at] and "% of its 79.1 (predicted)" in lines[at]
    shown = {}
    for line in lines[at + 1 :]:
        if not line.startswith("            "):
            break
        size, name = line.split(maxsplit=1)
        shown[name] = float(size)
    assert list(shown)[0] == "saved activations" and {"parameters", "gradients", "moments"} <= set(shown)
    assert sum(shown.values()) == pytest.approx(float(lines[at].split()[1]), abs=0.3)
