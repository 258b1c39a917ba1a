"""A step compiled for an H100 that is not here: its launches, their bytes and FLOPs by hand, and the page about it."""

import inspect
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import test_memory
import tiny
import torch

from kernels.triton_utils import Launch
from nanochat.cost import linear_params
from nanochat.gpt import GPT
from nanochat.recipe import model_config
from nanochat.render import page
from profiling.compiled import generated, launches, lint, lower, null_device, plain, provenance, report, sections, work
from profiling.compiled.case import Case
from profiling.predicted.cards import all_reduce, card


def test_categories():
    for name, wanted in {
        "mm": launches.PRODUCTS,
        "linear_relu2: _product_kernel": launches.PRODUCTS,
        "symmetric_product: _symmetric_kernel": launches.PRODUCTS,
        "baddbmm": launches.PRODUCTS,
        "flash_attention: _attention_fwd_kernel": launches.ATTENTION,
        "cross_entropy: _cross_entropy_kernel": launches.LOSS,
        "triton_poi_fused__to_copy_1": launches.COPIES,
        "triton_poi_fused_zeros_12": launches.COPIES,
        "triton_poi_fused__to_copy_add_3": launches.STREAMING,
        "triton_poi_fused_embedding_0": launches.STREAMING,
        "triton_poi_fused_add_mm_mul_0": launches.STREAMING,  # beside a product: only templates multiply
        "triton_tem_fused_mm_0": launches.PRODUCTS,
    }.items():
        assert launches.category(name) == wanted, name


def test_the_line_is_the_models_and_who_called_it():
    frame = '  File "/somewhere/nanochat/gpt.py", line {}, in forward\n    x\n'
    trace = frame.format(7) + frame.format(11) + '  File "/torch/nn/functional.py", line 3, in f\n'
    assert provenance.innermost([trace, frame.format(5), trace]) == ("gpt.py:7 › gpt.py:11", "")
    assert provenance.innermost([]) == provenance.innermost(["nothing"]) == ("", "")
    for own in "memory", "report":
        assert not provenance.of_model(f"/here/nanochat/profiling/compiled/{own}.py")
    assert provenance.of_model("/here/nanochat/profiling/compiled/plain.py") == "plain.py"


def test_the_module_is_the_models_whose_work_is_done():
    path = inspect.getsourcefile(GPT)
    first = {
        name: inspect.getsourcelines(function)[1] + 2 for name, function in inspect.getmembers(GPT, inspect.isfunction)
    }
    assert provenance.locate([(path, first["forward"])])[1] == "GPT.forward"
    linear = inspect.getsourcelines(sys.modules[GPT.__module__].Linear.forward)[1]
    mlp = inspect.getsourcelines(sys.modules[GPT.__module__].MLP.forward)[1]
    assert provenance.locate([(path, first["hidden"]), (path, mlp), (path, linear)])[1] == "MLP"


def test_flops_by_hand():
    a, b = torch.empty(6, 4, device="meta"), torch.empty(4, 5, device="meta")
    assert work.product_flops([a, b]) == 2 * 6 * 4 * 5
    turned, out = b.mT.contiguous(), torch.empty(6, 5, device="meta")
    for read in ((), (out,)):  # by an epilogue
        assert work.template_flops([a, turned, *read, out]) == work.template_flops([a, b, *read, out]) == 240
    q = torch.empty(2, 8, 3, 16, device="meta")  # (B, T, H, D)
    pairs = sum(min(i + 1, 3) for i in range(8))
    assert work.attention_flops("flash_attention", [q, q, q, 2]) == 4 * 2 * 3 * 16 * pairs
    assert work.attention_flops("flash_attention_backward", [q, q, q]) == 10 * 2 * 3 * 16 * 36
    assert work.attention_flops("rotary", [q, q]) == 0
    last, cache = q[:, :2], torch.empty(2, 32, 3, 16, device="meta")  # two new tokens and 30 before them
    for window, pairs in (None, 31 + 32), (4, 5 + 5):
        args = [last, cache, cache, None, window]
        assert work.attention_flops("flash_attention_decode", args) == 4 * 2 * 3 * 16 * pairs
    masked = [x.transpose(1, 2) for x in (last, cache, cache)]
    assert work.attention_flops("_scaled_dot_product_efficient_attention", masked) == 4 * 2 * 3 * 16 * 2 * 32
    masked[1:] = [x[:, :, :2] for x in masked[1:]]  # as many keys as queries, and a mask still
    assert work.attention_flops("_scaled_dot_product_efficient_attention", masked) == 4 * 2 * 3 * 16 * 2 * 2
    tall = torch.empty(4, 1024, 256, device="meta")
    for turned, each in (True, 256 * 256 * 1024), (False, 1024 * 1024 * 256):
        assert work.our_flops("symmetric_product", [tall, None, 1.0, 0.0, turned]) == 4 * each


def test_bytes_by_hand():
    aten, x, y, long = torch.ops.aten, torch.empty(100), torch.empty(100), torch.zeros(3, dtype=torch.int64)

    def moved(op, *args):
        return work.aten_bytes(op, args, op(*args))

    assert moved(aten.zero_.default, x) == moved(aten.fill_.Scalar, x, 1.0) == 400
    assert moved(aten.copy_.default, x, y) == 800
    assert moved(aten.add_.Tensor, x, y) == moved(aten.add.Tensor, x, y) == 1200
    assert moved(aten._foreach_mul_.Scalar, [x, y], 2.0) == 1600 and moved(aten._foreach_zero_.default, [x, y]) == 800
    assert moved(aten._foreach_copy_.default, [x], [y]) == 800 and moved(aten.zeros_like.default, x) == 400
    assert moved(aten.mul.Tensor, x, torch.empty(1).expand(100)) == 804  # of what is expanded one element is there
    table = torch.empty(1000, 4)
    assert moved(aten.embedding.default, table, long) == 2 * 3 * 16 + 24
    assert moved(aten.index_put_.default, table, [long], torch.empty(3, 4)) == 2 * 3 * 16 + 24
    q, k = torch.empty(2, 1, 4, 16), torch.empty(2, 64, 2, 16)
    assert list(work.seen_of_caches("flash_attention_decode", [q, k, k, long, 7]).values()) == [k.nbytes // 8]
    assert list(work.seen_of_caches("flash_attention_decode", [q, k, k, long, None]).values()) == [k.nbytes]
    assert work.seen_of_caches("flash_attention", [q, k, k, True, 7]) == {}


def launched(name, **tensors):
    """As kernels/triton_utils.py records it."""
    kernel = SimpleNamespace(arg_names=[*tensors, "N"], fn=SimpleNamespace(__name__=name))
    return Launch(kernel, (1,), (*tensors.values(), 5), {})


def test_what_our_kernels_move_and_multiply():
    x, y, out = (torch.empty(100) for _ in range(3))
    assert work.kernel_bytes(launched("_k", x_ptr=x, y_ptr=y, again_ptr=x), [], {}) == 800
    assert work.kernel_bytes(launched("_k", x_ptr=x, y_ptr=y), [x], {id(y): 40}) == 840
    assert work.kernel_bytes(launched("_momentum_kernel", buffer_ptr=x, out_ptr=out), [x, out], {}) == 1200
    names = ("_delta_kernel", "_attention_dkdv_kernel", "_attention_dq_kernel")
    assert [work.kernel_flops(launched(name), not i, 70) for i, name in enumerate(names)] == [0, 40, 30]
    assert [work.kernel_flops(launched("_k"), first, 70) for first in (True, False)] == [70, 0]


KERNEL = """
import triton
def triton_poi_fused_0(in_ptr0, in_ptr1, out_ptr0, out_ptr1, xnumel, XBLOCK : tl.constexpr):
    x0 = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:]
    tmp0 = tl.load(in_ptr0 + (x0), None)
    tmp1 = tl.full([XBLOCK], 32768, tl.int32)
    tmp2 = tmp0 + tmp1
    tmp3 = tl.where(tmp0 < 0, tmp2, tmp0)
    tmp4 = tl.load(in_ptr1 + (x0 + 16*tmp3), None).to(tl.float32)
    tmp5 = tl.where(x0 < 7, tmp4, 0.0)
    tmp6 = tmp4 + tmp5
    tmp7, tmp8 = triton_helpers.sort_with_index(tmp4, tmp1)
    tmp9 = tl.where(tmp4 <= 0, 0.0, tmp4)
    {}
"""


@pytest.mark.parametrize(
    "last, nothing",
    [
        ("tl.store(out_ptr0 + (x0), tmp4, None)", True),  # rows of a table, cast: where they lie is no computing
        ("tl.store(out_ptr0 + (x0), tmp5, None)", True),
        ("tl.store(out_ptr0 + (x0), tmp1, None); tl.store(out_ptr1 + (x0), tmp0, None)", True),
        ("tl.store(out_ptr0 + (x0), tmp6, None)", False),
        ("tl.store(out_ptr0 + (x0), tmp8, None)", False),
        ("tl.store(out_ptr0 + (x0), tmp9, None)", False),  # relu chooses by what it is given
        ("tl.store(out_ptr0 + (x0), tmp4, None); tl.store(out_ptr1 + (x0), tmp6, None)", False),
        ("tl.atomic_add(out_ptr1 + (tmp3), tmp4, None, sem='relaxed')", False),
    ],
)
def test_what_computes_nothing_is_seen_in_the_source(last, nothing):
    source = KERNEL.format(last)
    assert work.only_moves(source) is nothing
    args = [torch.empty(n) for n in (1, 2, 3, 4)] + [4]
    assert work.added_to(source, args) == (args[3:4] if "atomic" in last else [])


def test_of_what_loops_the_time_is_the_least():
    row = made(name="triton_red_fused_sum_0")["launches"][0]
    case = Case({}, 1)
    for kernel, least in ({}, False), (dict(looped=False), False), (dict(looped=True), True):
        assert report.predicted(row, case, card("H100"), kernel)["lower_bound"] is least
    product = row | dict(category=launches.PRODUCTS, flops=10**12)
    assert not report.predicted(product, case, card("H100"), dict(looped=True))["lower_bound"]
    titles = [block.rows for block in sections.summary(dict(auto=made(lower_bound=True)), card("H100")).blocks[1:]]
    assert ("predicted ms", "≥ 1") in titles[0]


def made(**changed):
    row = dict(phase="forward 2", who="inductor", name="triton_poi_fused_add_0", category="streaming",
               bytes=2 * 10**9, flops=0, fp8=False, line="gpt.py:1 › gpt.py:2", module="MLP", kernel="k",
               predicted_s=1e-3, usual=0.3, band=0.3,
               bound="memory", lower_bound=False)  # fmt: skip
    phase = dict(peak=2**30, kinds=dict(saved=2**30), blocks=[(2**30, 1, "saved", "buf0 = …")])
    curve = dict(bytes=[1, 2**30], phases={"forward 2": 0})
    kernel = dict(registers=40, access_bytes=16, spill_bytes=0, float64_instructions=0, error="")
    return dict(launches=[{**row, **changed}], kernels=dict(k=kernel), memory={"forward 2": phase}, curve=curve)


def test_what_no_kernel_should_do():
    found = made()
    row, kernel = found["launches"][0], found["kernels"]["k"]
    assert lint.faults(row, kernel) == lint.faults(row, {}) == [] and not lint.violations(found)
    bad = dict(kernel, access_bytes=2, spill_bytes=8, float64_instructions=1)
    assert lint.faults(row, bad) == ["2 bytes at a time", "spills 8 bytes", "float64"]
    assert lint.faults(row, dict(bad, spill_reason="ptxas")) == ["2 bytes at a time", "float64"]
    assert lint.faults(row | dict(bytes=10**6), dict(kernel, access_bytes=2)) == []  # too little to stream
    assert lint.faults(row | dict(category=launches.PRODUCTS), dict(kernel, access_bytes=2)) == []
    found["kernels"]["k"] = bad
    said = "2 bytes at a time, spills 8 bytes, float64"
    assert lint.violations(found) == {(row["name"], said): (2 * 10**9, 1)}
    found["kernels"]["other"] = dict(kernel, spill_bytes=512)  # one name, launched twice: each fault is a row
    found["launches"].append(row | dict(kernel="other", bytes=7))
    assert lint.violations(found) == {(row["name"], said): (2 * 10**9, 1), (row["name"], "spills 512 bytes"): (7, 1)}
    assert "spills 8 bytes" in page("x", sections.sections(dict(auto=found), card("H100")))


def test_kernels_alike_differ_in_their_name_and_in_a_scalars_address():
    source = (
        "def triton_poi_fused_add_3(in_ptr0, in_ptr1):\n    a = tl.load(in_ptr0 + (7))\n    b = tl.load(in_ptr1 + (x0))"
    )
    alike = generated.alike("triton_poi_fused_add_3", source)
    assert alike == generated.alike("triton_poi_fused_add_12", source.replace("_3", "_12").replace("(7)", "(11)"))
    for old, new in ("(x0)", "(7 + x0)"), ("(x0)", "(x1)"), ("in_ptr0 + (7)", "in_ptr1 + (7)"), ("a =", "a = 2 *"):
        assert alike != generated.alike("triton_poi_fused_add_3", source.replace(old, new)), (old, new)


def test_an_exception_is_for_a_kernel_and_a_fault(monkeypatch):
    monkeypatch.setattr(lint, "EXCEPTIONS", {(r"_embedding_\d+$", "2 bytes at a time"): "rows of a table"})
    assert lint.exempt("triton_poi_fused_embedding_0", "2 bytes at a time", 10**9) == "rows of a table"
    assert not lint.exempt("triton_poi_fused_embedding_0", "2 bytes at a time, float64", 10**9)
    assert not lint.exempt("triton_poi_fused_add_0", "2 bytes at a time", 10**9)
    bank = "symmetric_product: _symmetric_kernel", "spills 32 bytes"
    assert lint.exempt(*bank, 28228) and not lint.exempt(*bank, 10**9)  # a large bank may not
    softmax = "triton_red_fused_prepare_softmax_online_0", "spills 136 bytes", 10**9
    assert lint.exempt(*softmax) and not lint.exempt(*softmax, reference=False)  # ours may not


def test_what_is_suspect():
    copies, bad = made(category=launches.COPIES), made()
    bad["kernels"]["k"]["error"] = "no"
    for found, why in (copies, "computes nothing"), (bad, "does not compile: no"):
        assert sections.suspects("x", found).blocks[0].rows[0][1] == why
    narrow = made(phase="optimizer", bytes=7)
    narrow["kernels"]["k"]["access_bytes"] = 4
    assert sections.suspects("x", narrow).blocks[0].rows[0][1] == "4 bytes at a time"
    assert sections.suspects("x", made()).blocks == ["None."]


def test_the_page_has_both_sides_and_says_what_is_predicted():
    two = made(category="matrix products", flops=10**12)
    text = page("x", sections.sections(dict(auto=made(), torch=two), card("H100")))
    assert "PREDICTED" in text and "auto: GB" in text and "torch: GB" in text and "gpt.py:1 › gpt.py:2" in text
    assert "auto / torch" in text and "GB, auto − torch" in text and "The updates by" not in text
    updates = made(phase="optimizer", module="_adamw_step")
    text = page("x", sections.sections(dict(auto=updates), card("H100")))
    assert "The updates by category" in text and "_adamw_step" in text
    many = made()
    many["launches"] = [row | dict(line=f"gpt.py:{i}") for row in many["launches"] for i in range(sections.LINES + 2)]
    table = sections.sums("x", "line", dict(auto=many), sections.micro_step).blocks[0]
    assert len(table.rows) == sections.LINES + 1 and table.rows[-1][:3] == ["the rest", "2", "4.00"]
    assert "nothing was searched" not in text
    assert "nothing was searched" in page("x", sections.sections(dict(x=made(name="triton_tem_fused_0")), card("H100")))
    assert sections.totals(made())["streaming_gigabytes"] == 2 and sections.totals(two)["streaming_gigabytes"] == 0


def test_the_page_says_where_memory_differs():
    ours, other = made(), made()
    block = 2**29, 2, "saved", "buf1 = …"
    other["memory"]["forward 2"] = dict(
        peak=3 * 2**30, kinds=dict(saved=2 * 2**30, workspace=2**30), blocks=[block, (2**31, 2, "saved", "buf2 = …")]
    )
    phases, kinds, blocks = (table.rows for table in sections.memory_differences(dict(auto=ours, plain=other)).blocks)
    assert phases == [["forward 2", "1.00", "3.00", "-2.00"]]
    assert kinds == [["saved", "1.00", "2.00", "-1.00"], ["workspace", "0.00", "1.00", "-1.00"]]
    assert blocks == [["saved", "1,024", "1", "2", "-1.00"], ["saved", "256", "0", "2", "-0.50"]]
    titles = [section.title for section in sections.sections(dict(auto=ours), card("H100"))]
    assert "Memory side by side" not in titles


def test_ratios_are_ours_over_the_other():
    ours, other = sections.totals(made()), sections.totals(made(bytes=8 * 10**9))
    assert sections.ratios(ours, other) == dict(
        launches=1, gigabytes=0.25, streaming_gigabytes=0.25, predicted_ms=1, peak_gib=1
    )


def test_what_ranks_send():
    x = torch.empty(1000, dtype=torch.float32)
    assert launches.sent("allreduce_", ([x], None), 8) == 2 * launches.sent("_allgather_base_", (x, x[:125]), 8) == 7000
    case = Case({}, 1, gpus=8)
    for name, share in ("allreduce_", 1), ("_reduce_scatter_base_", 0.5):
        row = dict(category="communication", name=name, bytes=launches.sent(name, ([x, x[:125]], None), 8))
        found = report.predicted(row, case, card("H100"), {})
        assert (
            found["predicted_s"] == pytest.approx(share * all_reduce(card("H100"), 4000, 8))
            and found["bound"] == "link"
        )
    found = made()
    found["launches"].append({**found["launches"][0], "phase": "optimizer", "category": "communication"})
    assert (
        sections.totals(found)["optimizer_sent_gigabytes"] == 2 and sections.totals(found)["optimizer_gigabytes"] == 0
    )


def test_the_baseline_is_the_model():
    """The same loss and gradients as gpt.py's, at equal weights."""
    config = model_config(2, 100, 16, head_dim=16)
    torch.manual_seed(0)
    ours, other = GPT(config), plain.GPT(asdict(config), torch.float32)
    ours.init_weights()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.1)
    names = dict(
        c_q="q", c_k="k", c_v="v", ve_gate="gate", c_fc="up", **{"attn.c_proj": "attn.o", "mlp.c_proj": "mlp.down"}
    )
    names |= {"transformer.wte": "wte", "transformer.h": "blocks"}

    def renamed(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    state = {renamed(name): value for name, value in ours.state_dict().items()}
    other.load_state_dict(state | dict(cos=ours.cos[:, None], sin=ours.sin[:, None]))
    ids, targets = torch.randint(100, (2, 2, 16))
    losses = [ours(ids, targets, loss_reduction="sum"), other(ids, targets)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    found = dict(other.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, found[renamed(name)].grad, rtol=1e-3, atol=1e-4), name
    plain.MuonAdamW(other)


def test_wrong_use_is_one_sentence(capsys, monkeypatch):
    for flags, said in (
        (["--card=H300"], "H300"),
        (["--card=A100", "--fp8"], "has no fp8 units"),
        (["--against=plain", "--fp8"], "the plain baseline is a training step in bfloat16"),
        (["--part=decode", "--gpus=8"], "the engine runs on one GPU"),
        (["--card=rtx 4070", "--depth=48"], "no such card"),
        (["--kernels=torch", "--against=torch"], "is what --kernels says already"),
        (["--kernels=auto,flash_attention=fa3"], "a library's"),
    ):
        assert tiny.call_module("profiling.compiled.report", *flags) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(null_device.shutil, "which", lambda name: None)
    assert tiny.call_module("profiling.compiled.report", "--depth=1") == 2
    assert "g++" in capsys.readouterr().err


def test_without_triton_it_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for room in "report", "memory":
        assert tiny.call_module(f"profiling.compiled.{room}", "--depth=1") == 2
        assert "pip install triton" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small():
    """(the case, what a child finds of it): four layers, not compiled to machine code."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    case = Case(asdict(model_config(4, 4096, 512)), rows=8, optimizer=False)
    return case, lower.ask("tests.null_device.small_step", case, "h100")


def test_the_lowered_step_of_a_small_model_allocates_what_is_predicted(small):
    test_memory.check(*small)


def test_the_page_of_a_decode_step(tmp_path, capsys):
    """From the command on: what a token of a small model moves is its weights, and the keys that its layers see."""
    if reason := null_device.obstacle():
        pytest.skip(reason)
    pytest.importorskip("triton", reason="Triton is not installed")
    flags = "--depth=2", "--part=decode", "--rows=4", "--card=h100", f"--out={tmp_path}"
    assert tiny.call_module("profiling.compiled.report", *flags) == 0
    assert "PREDICTED" in (tmp_path / "compiled.html").read_text()
    found = json.loads((tmp_path / "compiled.json").read_text())["variants"]["auto"]
    config = model_config(2, 32768)
    S, width = config.sequence_len, config.n_kv_head * config.head_dim
    keys = sum(S if config.window(layer) is None else config.window(layer) + 1 for layer in range(2))
    attention = [row for row in found["launches"] if "_decode_kernel" in row["name"]]
    assert sum(row["bytes"] for row in attention) == pytest.approx(2 * 4 * keys * width * 2, rel=0.05)
    assert all(row["bytes"] < 10**5 for row in found["launches"] if row["name"] in ("index_put_", "embedding"))
    weights = 2 * linear_params(config)
    products = sum(row["bytes"] for row in found["launches"] if row["category"] == launches.PRODUCTS)
    assert products == pytest.approx(weights, rel=0.05)


@pytest.mark.slow
def test_a_step_lowered_in_turn_is_the_same(small):
    case, found = small
    assert lower.ask("tests.null_device.other_strides", case, "h100") == found


def test_launches_of_a_small_step(small):
    """Products have the FLOPs of the model, and each micro-batch the same launches; sources and lines are known."""
    case, found = small
    steps = [[row for row in found["launches"] if row["phase"].endswith(f" {i}")] for i in (1, 2)]
    assert [row["name"] for row in steps[0]] == [row["name"] for row in steps[1]] and len(steps[0]) > 50
    tokens = case.rows * case.config["sequence_len"]
    multiplied = sum(row["flops"] for row in steps[0] if row["category"] == launches.PRODUCTS)
    assert multiplied == pytest.approx(6 * tokens * linear_params(model_config(4, 4096, 512)), rel=0.01)
    known = {*found["generated"], *found["ours"]}
    assert all(row["kernel"] in known for row in steps[0] if row["who"] in (launches.INDUCTOR, launches.OURS))
    assert {row["who"] for row in steps[0]} >= {launches.INDUCTOR, launches.OURS, launches.LIBRARY}
    activations = tokens * case.config["n_embd"] * 2
    first = next(row for row in steps[0] if row["name"].startswith("rms_norm:"))
    assert first["bytes"] == 2 * activations and first["line"].startswith("gpt.py:")
    unknown = [row for row in steps[0] if not row["line"] and row["bytes"] > activations]
    assert len(unknown) < len(steps[0]) / 10, unknown


def test_all_that_a_pointwise_kernel_reads_is_counted(small):
    """Also buffers that an operator of ours has changed in place, as the gradient to which products are added."""
    _, found = small
    counted = {row["name"]: row["bytes"] for row in found["launches"]}
    assert len(found["elements"]) > 5
    assert {name: counted[name] for name, size in found["elements"].items() if counted[name] < size} == {}


def test_what_is_launched_and_what_is_fp8():
    """Nothing is launched for empty results, and bools are no fp8 numbers."""
    recorder = launches.Recorder([], Case({}, 1, device="cpu"))
    aten, empty, some = torch.ops.aten, torch.empty(0, 4), torch.empty(2, 4)
    for func, *args in (
        (aten.clone.default, empty),
        (aten.copy_.default, empty, empty),
        (aten.clone.default, some),
        (aten.logical_not.default, some > 0),
    ):
        recorder.called(func, args, func(*args), [])
    assert [(row.name, row.fp8) for row in recorder.found.launches] == [("clone", False), ("logical_not", False)]


def test_a_launch_without_a_trace_has_the_line_that_runs():
    """As those that a pass of Inductor's makes: AdamW's kernels, of a graph of their own."""
    path = "/somewhere/nanochat/optim.py"
    code = "def call(recorder):\n    # [Provenance debug handles] adamw:1\n    return (lambda: recorder.place())()\n"
    for traces, wanted in ([], "optim.py:1"), ([f'  File "{path}", line 9, in f\n    x\n'], "optim.py:9"):
        graph = lower.Graph("inference", "/tmp/graph.py", code, [], {"1": traces})
        recorder = launches.Recorder([graph], Case({}, 1))
        made = {}
        exec(compile(code, graph.path, "exec"), made)
        exec(compile("found = call(recorder)", path, "exec"), made | dict(recorder=recorder), outer := {})
        assert outer["found"][0] == wanted
