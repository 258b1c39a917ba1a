"""Weights of 8 bits: what a product gives, one copy of them, what an engine says, and who may not have them."""

import gc

import pytest
import tiny
import torch
from torch import nn

from nanochat.engine import Engine, Request, Sampling
from nanochat.engine.cache import late_zeros
from nanochat.engine.weights import Dense, Int8, Int8Table, check, fastest_product, joined, quantized, rounded
from nanochat.errors import UserError

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True)
def integers(monkeypatch):
    """Whatever is faster here."""
    monkeypatch.setattr("nanochat.engine.weights.fastest_product", lambda rows, width, dtype: "integers")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_a_row_is_rounded_to_half_of_its_own_step():
    weight = drawn(5000, 24) * torch.logspace(-8, 4, 5000)[:, None]  # more rows than are rounded at a time
    weight[7] = 0
    whole, scale = rounded(weight)
    assert whole.dtype == torch.int8 and scale.shape == (5000,)
    assert (whole.abs().amax(1) == 127).sum() == 4999 and not whole[7].any()
    error = (whole.double() * scale.double()[:, None] - weight.double()).abs().amax(1)
    assert (error <= 0.5001 * scale).all()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_a_product_is_the_one_of_the_rounded_weights(dtype, rounding):
    """One row as it is; several with their own rounding where they are multiplied as integers, and no other error."""
    whole, scale = rounded(drawn(3000, 96))
    weight = whole.double() * scale.double()[:, None]
    x = drawn(7, 96, seed=1).to(dtype)
    x[3] *= 1000
    for integers in (True, False):
        product = Int8(whole, scale, integers)
        assert off(product(x[:1]), x[:1].double() @ weight.T) < rounding
        taken, size = quantized(x)
        seen = taken.double() * size.double() if integers else x.double()
        several = seen @ weight.T
        worst = max(off(mine, exact) for mine, exact in zip(product(x), several))
        assert worst < rounding + (0 if integers or dtype == torch.float32 else 3e-3)  # weights turned back are rounded
        assert off(product(x), x.double() @ weight.T) < 0.02
        assert torch.equal(product(x[None], relu=True), product(x)[None].relu())
        assert torch.equal(product.plus(x, x[:, :1].expand(7, 3000)), x[:, :1] + product(x))


def test_integers_do_not_depend_on_the_company():
    product = Int8(*rounded(drawn(300, 64)), True)
    x = drawn(9, 64, seed=1)
    assert torch.equal(product(x)[2:4], product(x[2:4]))


def test_a_table_gives_rounded_rows():
    weight = drawn(50, 16)
    table = Int8Table(*rounded(weight), torch.float32)
    assert (table(torch.tensor([[3, 7]])) - weight[[3, 7]]).abs().max() < weight.abs().max() / 250


def linears() -> list[nn.Linear]:
    return [nn.Linear(8, out, bias=False) for out in (4, 6)]


def test_matrices_joined_are_there_once():
    made, gate = linears(), drawn(2, 8)
    before = [linear.weight.detach().clone() for linear in made]
    whole = joined(made, gate, pack=False)
    assert isinstance(whole, Dense) and torch.equal(whole.weight, torch.cat([*before, gate]))
    ends = {linear.weight.untyped_storage().data_ptr() for linear in made}
    assert ends == {whole.weight.untyped_storage().data_ptr()}


def bytes_of(engine: Engine) -> int:
    """Of all tensors that the model and the decode step hold; a storage counts once, whoever looks into it."""
    found = {}
    for module in (engine.model, engine._decode.step):
        for tensor in [*module.parameters(), *(p for m in module.modules() for p in vars(m).values())]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("slots", [1, 4])
def test_an_engine_has_its_weights_once(slots):
    sizes = dict(n_embd=64, n_layer=4, vocab_size=512)
    count = sum(p.numel() for p in tiny.model(**sizes).parameters())
    wide, eight = tiny.model(**sizes), Engine(tiny.model(**sizes), slots, "int8")
    wide.set_dtype(torch.bfloat16)
    assert bytes_of(Engine(wide, slots)) < 1.1 * 2 * count
    assert bytes_of(eight) < 1.3 * count  # with a scale of four bytes for each 64


def test_an_engine_with_int8_says_what_its_model_says():
    """Prefill, one row and several: within a few parts of a hundred of the logits of what was rounded."""
    model, exact = tiny.model(n_embd=64, n_layer=4), tiny.model(n_embd=64, n_layer=4)
    engine = Engine(model, 4, "int8")
    ids = [5, 9, 7, 30, 2, 80, 11]
    with torch.inference_mode():
        wanted = exact(torch.tensor([ids]))
        assert off(engine.model(torch.tensor([ids])), wanted.double()) < 0.05
        for rows in (1, 3):
            engine.slots.forget()
            for token in ids:
                logits = engine._decode([token] * rows)
            said = 15 * torch.tanh(logits / 15)
            assert max(off(row, wanted[0, -1].double()) for row in said) < 0.05
            engine.slots.previous.zero_()
    requests = [engine.submit(Request([5, 6, i], 8, GREEDY)) for i in range(6)]
    while not engine.idle:
        engine.step()
    assert all(len(request.output) == 8 for request in requests)


def test_a_second_engine_takes_the_model_as_it_is():
    model = tiny.model()
    model.set_dtype(torch.bfloat16)
    scale = Engine(model, 2, "int8").model.lm_head.scale.clone()
    assert scale.dtype == torch.float32 and torch.equal(Engine(model, 1, "int8").model.lm_head.scale, scale)


def test_int8_takes_no_other_weights():
    engine = Engine(tiny.model(), 1, "int8")
    with pytest.raises(ValueError, match="its weights are int8; make another engine"):
        engine.load(tiny.model().state_dict())


@pytest.mark.parametrize(
    "rows, seconds, wanted",
    [
        (8, [1.0, 3.0, 2.0], "integers"),
        (8, [1.0, 3.0, 0.85], "integers"),  # nearly as fast with a quarter of the bytes
        (8, [1.0, 1.1, 1.0], "turned back"),
        (8, [1.0, 3.0, 0.7], "unrounded"),
        (8, [3.0, 1.0, 0.7], "unrounded"),
        (1, [1.0, 3.0], "integers"),
    ],
)
def test_which_product_pays_is_measured(monkeypatch, rows, seconds, wanted):
    left = iter(seconds)
    monkeypatch.setattr("nanochat.engine.weights.fastest", lambda call, tries: call() is not None and next(left))
    assert fastest_product(rows, 64, torch.float32) == wanted and not [*left]


def test_where_the_compute_dtype_is_faster_only_tables_are_rounded(monkeypatch):
    monkeypatch.setattr("nanochat.engine.weights.fastest_product", lambda rows, width, dtype: "unrounded")
    model, exact = tiny.model(n_embd=64, n_layer=4), tiny.model(n_embd=64, n_layer=4)
    head = model.lm_head
    engine = Engine(model, 4, "int8")
    assert model.lm_head is head and isinstance(model.transformer["wte"], Int8Table)
    assert all(isinstance(table, Int8Table) for table in model.value_embeds.values())
    table = model.transformer["wte"]
    assert Engine(model, 2, "int8").model.transformer["wte"] is table
    with torch.inference_mode():
        ids = torch.tensor([[5, 9, 7, 30, 2]])
        assert off(engine.model(ids), exact(ids).double()) < 0.05
    with pytest.raises(ValueError, match="its weights are int8"):
        engine.load(exact.state_dict())


def test_who_may_not_have_them_is_told_in_a_sentence():
    with pytest.raises(UserError, match="--weights is 'int4', wanted int8"):
        check("int4", torch.device("cpu"))
    with pytest.raises(UserError, match="--weights int8 is for CPUs, and this is cuda: leave it out"):
        check("int8", torch.device("cuda"))


@pytest.mark.parametrize("script", ["chat_cli", "chat_web", "infer_bench"])
def test_scripts_refuse_other_words(script, capsys):
    assert tiny.call(script, "--weights=int4") == 2
    assert "--weights is 'int4'" in capsys.readouterr().err


def test_late_zeros_are_zeros_that_can_be_written():
    zeros = late_zeros((3, 5), torch.float32)
    assert not zeros.any() and zeros.shape == (3, 5)
    zeros[1, 2] = 4
    assert zeros.sum() == 4


def operations(engine: Engine, rows: int) -> set[str]:
    with torch.profiler.profile() as found, torch.inference_mode():
        engine._decode([1] * rows)
    return {event.key for event in found.key_averages()}


def packs() -> set[int]:
    """Where there are matrices in oneDNN's layout, whoever holds them."""
    found = (each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter))
    return {torch.ops.mkldnn.data_ptr(each) for each in found if each.layout == torch._mkldnn}


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 12])
@pytest.mark.parametrize("weights", ["", "int8"])
def test_the_compiled_step_is_the_eager_one_and_compiled_once(slots, weights):
    """In bfloat16, where oneDNN has packs: no guard looks at them, and compiling makes no more of them. One row has its
    own code, and every engine.
    """
    from torch._dynamo.utils import counters

    models = [tiny.model() for _ in range(3)]
    torch.manual_seed(7)
    models[2].init_weights()  # else all are the same
    for model in models:
        model.set_dtype(torch.bfloat16)
    engines = [Engine(model, slots, weights) for model in models]
    before = packs()
    assert engines[0].compile() == "" and engines[0].decoding == "compiled"
    assert len(packs() - before) == (slots > 1 and not weights)  # the gate of smear, a row
    compiled = counters["stats"]["unique_graphs"]

    def check(engines):
        with torch.inference_mode():
            for rows in (rows for rows in (1, 2, 8, 5, 12, 1) if rows <= slots):
                found, wanted = (engine._decode(list(range(rows))).float() for engine in engines)
                assert (found - wanted).abs().max() < 3e-2 * wanted.abs().max()

    check(engines[:2])
    assert counters["stats"]["unique_graphs"] == compiled
    product = "mkldnn::_linear_pointwise"
    assert product not in operations(engines[0], 1)
    assert slots == 1 or (product in operations(engines[0], 3)) == (not weights)
    with torch.inference_mode():
        other = engines[2]._decode([5])
    engines[2].slots.forget()
    assert engines[2].compile() == ""
    with torch.inference_mode():
        assert (engines[2]._decode([5]) - other).abs().max() < 3e-2 * other.abs().max()


def test_what_they_cost_is_said_and_kept(monkeypatch, tmp_path):
    from nanochat import scores
    from nanochat.evaluate import results, rounding
    from nanochat.run import Run

    result = dict(stage="sft", model="m", dtype="bfloat16", bpb=[1.0, 1.0049], tasks=dict(a=[0.5, 0.6], b=[0.5, 0.4]))
    assert rounding.verdict(result) == "int8 weights cost no more than 0.5%."
    result["bpb"] = [1.0, 1.0051]
    assert "more than 0.5% worse: bits per byte by 0.5%." in rounding.verdict(result)
    result["tasks"] = dict(a=[0.5, 0.49], b=[0.5, 0.5])
    assert "bits per byte by 0.5%, the mean of the tasks by 1.0%" in rounding.verdict(result)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    results.keep_entry(Run.open("a"), "sft", result, "int8")
    section = scores.evaluation(Run.open("a"), Run.open("a").summary("eval"))
    table, said = section.blocks
    assert tuple(table.head) == ("int8 weights, sft", "bfloat16", "int8") and said == rounding.verdict(result)
    assert table.rows[:2] == [("bits per byte", "1.0000", "1.0051"), ("a", "0.5000", "0.4900")]


def test_the_scores_in_text_are_the_models_own():
    from nanochat.evaluate import bits_per_byte, rounding

    model, ids = tiny.model(), torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    with torch.no_grad():
        each = torch.ones(300, dtype=torch.int64)
        mine = rounding.score(model, ids, targets, each)
        wanted = bits_per_byte.score(model, ids, targets, each)
        assert torch.allclose(mine[0], wanted[0], rtol=1e-5) and mine[1] == wanted[1]
        eight = Engine(tiny.model(), 4, "int8").model
        assert off(rounding.score(eight, ids, targets, each)[0], wanted[0].double()) < 0.02


def test_scores_want_int8(capsys):
    assert tiny.call("infer_bench", "--run=x") == 2
    assert "give --weights int8 too" in capsys.readouterr().err
