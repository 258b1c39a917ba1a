import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.cost import meta_model
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import repeat_bitwise


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def parity_model(shared):
    """The model whose numbers nanochat itself computed, and those numbers."""
    file = safe_open(shared / "parity" / "upstream_small.safetensors", "pt")
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model = GPT(GPTConfig(**json.loads(file.metadata()["config"])))
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    model.set_dtype(torch.float32)
    return model, tensors


def test_parity_of_logits_gradients_and_steps(shared):
    model, tensors = parity_model(shared)
    inputs, targets = tensors["inputs"].long(), tensors["targets"].long()
    assert relative(model(inputs[0]).detach(), tensors["logits"]) < 1e-5
    optimizer = model.setup_optimizer(weight_decay=0.28)
    losses = []
    for batch in range(3):
        loss = model(inputs[batch], targets[batch])
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if batch == 0:
            for name, parameter in model.named_parameters():
                assert relative(parameter.grad, tensors[f"grad.{name}"]) < 1e-4, name
        optimizer.step()
        if batch == 0:
            for name, parameter in model.named_parameters():
                before = tensors[f"model.{name}"]
                moved, wanted = parameter.detach() - before, tensors[f"after1.{name}"] - before
                assert relative(moved, wanted) < 2e-4, name
    losses.append(model(inputs[3], targets[3]).item())
    assert losses == pytest.approx(tensors["losses"].tolist(), abs=1e-3)


def test_parity_of_greedy_tokens(shared):
    model, tensors = parity_model(shared)
    tokens = list(model.generate(tensors["greedy.prompt"].tolist(), 48, temperature=0))
    assert tokens == tensors["greedy.tokens"].tolist()


def test_bfloat16_follows_float32_and_a_wrong_epsilon_would_show(shared, monkeypatch):
    """Embeddings scaled down to where the epsilon matters: the first norm restores them, with the right epsilon."""
    model, tensors = parity_model(shared)
    idx = tensors["inputs"][0].long()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(3e-3)
        exact = model(idx)
        model.set_dtype(torch.bfloat16)
        assert relative(model(idx), exact) < 0.03
        from kernels import rms_norm as module_function

        module = __import__("sys").modules[module_function.__module__]
        monkeypatch.setattr(module, "default_eps", lambda dtype: torch.finfo(torch.bfloat16).eps)
        assert relative(model(idx), exact) > 0.1


# ---- the architecture and its settings


def test_the_original_has_none_of_the_tricks():
    original = GPTConfig.original(vocab_size=100, n_layer=4, n_head=2, n_kv_head=2, n_embd=64, sequence_len=32)
    names = {name for name, _ in meta_model(original).named_parameters()}
    assert not [name for name in names if "lambda" in name or "gate" in name or "value_embeds" in name]
    torch.manual_seed(0)
    model = GPT(original)
    model.init_weights()
    assert model.lm_head.weight.abs().max() == 0
    block = model.transformer["h"][0]
    assert block.attn.c_proj.weight.abs().max() == 0 == block.mlp.c_proj.weight.abs().max()
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.05)
    assert block.attn.c_q.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.05)
    assert model.transformer["wte"].weight.std().item() == pytest.approx(1, rel=0.05)
    ids = torch.randint(100, (2, 32))
    assert model(ids, ids).item() == pytest.approx(math.log(100), abs=1e-5)


def test_init_is_the_table():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=1000, n_layer=3, n_head=2, n_kv_head=2, n_embd=128))
    model.init_weights()
    bound = math.sqrt(3 / 128)
    block = model.transformer["h"][0]
    for weight, limit in ((block.attn.c_q.weight, bound), (block.mlp.c_fc.weight, 0.4 * bound)):
        assert 0.98 * limit < weight.abs().max() <= limit
    assert 0.98 * bound < model.value_embeds["0"].weight.abs().max() <= bound
    assert model.transformer["wte"].weight.std().item() == pytest.approx(0.8, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert model.resid_lambdas.tolist() == pytest.approx([1.15, 1.10, 1.05])
    assert model.x0_lambdas.tolist() == pytest.approx([0.20, 0.125, 0.05])
    assert (model.smear_lambda.item(), model.backout_lambda.item()) == (0.0, pytest.approx(0.2))
    assert set(model.value_embeds) == {"0", "2"}


@pytest.mark.parametrize("trick", ["smear", "residual_mix", "value_embeds", "backout"])
def test_each_trick_matters_and_can_be_left_out(trick):
    model = tiny.model(n_layer=3)  # with two, backout subtracts from the last layer what the final norm puts back
    without = GPT(replace(model.config, **{trick: False}))
    names = dict(without.named_parameters())
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k in names})
    without.set_dtype(torch.float32)
    assert len(names) < len(dict(model.named_parameters()))
    ids = torch.arange(30)[None]
    assert relative(without(ids).detach(), model(ids).detach()) > 1e-3
    loss = without(ids, ids)
    loss.backward()
    without.setup_optimizer().step()


def test_windows():
    config = GPTConfig(n_layer=8)
    assert [config.window(i) for i in range(8)] == [512, 512, 512, None] * 2
    assert [GPTConfig(n_layer=3).window(i) for i in range(3)] == [512, 512, None]
    assert GPTConfig(sequence_len=256).window(0) == 128


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (dict(n_layer=0), "n_layer is 0"),
        (dict(n_head=5), "even head dim"),
        (dict(n_kv_head=4), "multiple of n_kv_head"),
        (dict(window_pattern="SX"), "letters S and L"),
        (dict(window_pattern=""), "letters S and L"),
        (dict(vocab_size=0), "vocab_size is 0"),
    ],
)
def test_impossible_configurations(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        GPTConfig(**wrong)


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="65 tokens are more than the model's sequence_len 64"):
        tiny.model()(torch.zeros(1, 65, dtype=torch.long))


# ---- losses, logits, generation


def test_loss_is_the_cross_entropy_of_the_logits_and_reductions_agree():
    model, ids = tiny.model(), torch.randint(300, (2, 40))
    targets = torch.randint(300, (2, 40))
    targets[:, ::3] = -1
    logits = model(ids)
    assert logits.shape == (2, 40, 300) and logits.dtype == torch.float32 and logits.abs().max() <= 15
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    mean, total, each = (model(ids, targets, loss_reduction=r) for r in ("mean", "sum", "none"))
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(total / (targets != -1).sum(), mean)
    assert each.shape == (2, 40) and (each[targets == -1] == 0).all()


def test_the_future_is_not_seen():
    model, ids = tiny.model(), torch.randint(300, (1, 40))
    changed = ids.clone()
    changed[0, 30] += 1
    before, after = model(ids), model(changed % 300)
    assert torch.equal(before[:, :30], after[:, :30]) and not torch.equal(before[:, 30], after[:, 30])


def test_generation_is_seeded_and_top_1_is_greedy():
    model = tiny.model()
    greedy = list(model.generate([1, 2], 20, temperature=0))
    assert list(model.generate([1, 2], 20, top_k=1)) == greedy
    one, same, other = (list(model.generate([1, 2], 20, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert len(list(model.generate([1] * 100, 3))) == 3  # longer than the context: the last part counts


# ---- devices


class Traced(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops, self.dtypes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.add(func.overloadpacket._qualified_op_name)
        for value in [*args, result, *(result if isinstance(result, (tuple, list)) else ())]:
            if torch.is_tensor(value):
                self.dtypes.add(value.dtype)
        return result


# Operators without an MPS kernel in torch 2.13 that code like this could plausibly call.
NOT_ON_MPS = {
    "aten::linalg_eigh",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::linalg_qr",
    "aten::_pin_memory",
    "aten::is_pinned",
    "aten::_scaled_mm",
    "aten::_fused_adamw_",
}


def test_a_training_step_asks_nothing_that_mps_lacks():
    model = tiny.model()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    ids = torch.randint(300, (2, 64))
    with Traced() as traced:
        model(ids, ids).backward()
        optimizer.step()
        model(ids, ids, loss_reduction="none")
    assert torch.float64 not in traced.dtypes
    assert not traced.ops & NOT_ON_MPS
    assert len(traced.ops) > 20


def test_it_can_be_built_without_storage():
    model = meta_model(GPTConfig(n_layer=24, n_embd=1536, n_head=12, n_kv_head=12))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_model_compiles_without_a_break(dtype):
    torch._dynamo.reset()
    model = tiny.model(n_layer=3)
    model.set_dtype(dtype)
    ids = torch.randint(300, (2, 64))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    loss = compiled(ids, ids)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = model(ids, ids)
    plain.backward()
    limit = 1e-4 if dtype == torch.float32 else 0.1
    assert loss.item() == pytest.approx(plain.item(), rel=limit)
    for a, p in zip(grads, model.parameters()):
        assert relative(a.float(), p.grad.float()) < limit * 3


@pytest.mark.slow
def test_compiled_training_on_a_cpu_repeats_bitwise():
    """So large that the compiler uses threads; common tokens collide in the embedding's gradient."""
    repeat_bitwise()
    sizes = dict(sequence_len=256, vocab_size=2048, n_layer=4, n_head=4, n_kv_head=4, n_embd=256, window_pattern="L")

    def losses():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = GPT(GPTConfig(**sizes))
        model.init_weights(torch.bfloat16)
        optimizer = model.setup_optimizer()
        compiled = torch.compile(model, dynamic=False)
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(8):
            often = 1 / (torch.arange(2048) + 5.0)
            ids = torch.multinomial(often, 32 * 256, replacement=True, generator=generator).view(32, 256)
            loss = compiled(ids, ids.roll(-1, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.append(loss.item())
        return found

    assert losses() == losses() == losses()
