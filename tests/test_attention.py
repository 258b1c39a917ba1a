"""Attention: which tiles the kernels visit, long offsets, splits, lengths and windows; wrong use."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kernels
from kernels import OPS, probing, traffic, triton_utils, tuned
from kernels.attention import backends, triton_decode
from kernels.readme import needed_tiles, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(
    not triton_utils.INTERPRETED, reason="counts what the interpreter runs: no Triton here, or a GPU"
)


def visited(T, S, window, D=16):
    """(forward, backward) tiles, from the products that the interpreter does; blocks of the tuned rows."""
    case = dict(B=1, T=T, S=S, H=1, K=1, D=D, W=-1 if window is None else window)
    forward, backward = traffic.of_op(OPS["flash_attention"], case, torch.float32)
    found = []
    for count, name, products in ((forward, "flash_attention", 2), (backward, "flash_attention_backward", 3 + 4)):
        config = tuned.config(name, torch.float32, D, torch.device("cpu"))
        block = 2 * config["BLOCK_M"] * config["BLOCK_N"] * D
        found.append((count.flops / (products * block), config["BLOCK_M"], config["BLOCK_N"]))
    return found


@needs_interpreter
@pytest.mark.parametrize(
    "T, S, window",
    [(256, 256, None), (256, 256, 0), (300, 300, 64), (257, 257, 31), (100, 300, 70), (300, 100, None), (64, 64, 500)],
)
def test_no_tile_out_of_sight_is_visited(T, S, window):
    for found, rows, columns in visited(T, S, window):
        assert found == needed_tiles(T, S, window, rows, columns)


@needs_interpreter
@pytest.mark.parametrize("T", [256, *(pytest.param(T, marks=pytest.mark.slow) for T in (512, 2048))])
def test_tiles_of_the_window_pattern(T):
    """SSSL: what is visited is at most 1.15 times what is needed, and much less than four full layers."""
    for found, fewest in tiles(T, (T // 4, T // 4, T // 4, None)).values():
        assert found <= 1.15 * fewest
    full = tiles(T, (None,))["forward"][0]
    assert tiles(T, (T // 4,))["forward"][0] < (0.5 if T == 2048 else 0.7) * full  # tiles are coarse for a short T


SPLITS = [(window, splits) for window in (None, 0, 5, 100, 399) for splits in (1, 2, 3, 7)]


@needs_interpreter
@pytest.mark.parametrize(
    "window, splits",
    [pair if i % 3 == 0 else pytest.param(*pair, marks=pytest.mark.slow) for i, pair in enumerate(SPLITS)],
)
def test_decode_is_the_same_however_keys_are_split(window, splits, monkeypatch):
    monkeypatch.setattr(triton_decode, "split_count", lambda *_: splits)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 3, 6, 24, generator=generator)
    k, v = (torch.randn(4, 400, 2, 24, generator=generator) for _ in range(2))
    start = torch.tensor([0, 5, 200, 397])
    k[1, 8:], v[1, 8:] = float("nan"), float("nan")  # what lies beyond a row's length must never count
    with kernels.use("triton"):
        found = kernels.flash_attention_decode(q, k, v, start, window)
    for row in range(4):
        length = int(start[row]) + 3
        exact = kernels.flash_attention(
            q[row : row + 1].double(),
            k[row : row + 1, :length].double(),
            v[row : row + 1, :length].double(),
            window=window,
        )
        assert (found[row : row + 1] - exact).norm() / exact.norm() < 1e-6


FEW = triton_decode.FEW
SHORT = [(FEW, None), (FEW + 1, 5), (150, 100)]  # the rest by name
REST = [(T, window) for T in (FEW, FEW + 1, 150) for window in (None, 0, 5, 100, 399)]


@needs_interpreter
@pytest.mark.parametrize(
    "T, window", SHORT + [pytest.param(*pair, marks=pytest.mark.slow) for pair in REST if pair not in SHORT]
)
def test_prompts_are_attention_row_by_row_from_each_rows_start(T, window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, T, 6, 24, generator=generator)
    k, v = (torch.randn(3, 400, 2, 24, generator=generator) for _ in range(2))
    start = torch.tensor([0, 37, 400 - T])
    for row in range(2):
        k[row, start[row] + T :], v[row, start[row] + T :] = float("nan"), float("nan")
    with kernels.use("triton"):
        found = kernels.flash_attention_decode(q, k, v, start, window)
    for row in range(3):
        length = int(start[row]) + T
        mine = (x[row : row + 1, :length].double() for x in (k, v))
        exact = kernels.flash_attention(q[row : row + 1].double(), *mine, window=window)
        assert (found[row : row + 1] - exact).norm() / exact.norm() < 1e-6


@needs_interpreter
@pytest.mark.parametrize("window", [None, 70])
def test_a_prompts_tiles_are_those_of_flash_attention(window):
    """A long prompt's queries are not taken 16 at a time, and no tile out of sight is visited."""
    T, S, D = 200, 330, 16
    config = tuned.config("flash_attention", torch.float32, D, torch.device("cpu"))
    rows, columns = config["BLOCK_M"], config["BLOCK_N"]
    q, k = torch.zeros(2, T, 1, D), torch.zeros(2, S, 1, D)
    start = torch.tensor([0, S - T])
    with kernels.use("triton"), traffic.counting() as counted:
        kernels.flash_attention_decode(q, k, k, start, window)
    needed = sum(needed_tiles(T, int(first) + T, window, rows, columns) for first in start)
    assert rows > 16 and counted.flops == needed * 2 * 2 * rows * columns * D


def test_split_count_fills_the_card_but_keeps_splits_long():
    device = torch.device("meta")  # as an H100: 528 programs
    assert triton_decode.split_count(device, 12, 4096, 256) == 16  # limited by the splits' length
    assert triton_decode.split_count(device, 384, 4096, 256) == 2  # limited by the card
    assert triton_decode.split_count(device, 10_000, 4096, 256) == triton_decode.split_count(device, 1, 100, 256) == 1


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the sparse file is in the CPU's memory, and kernels run on the GPU"
)
@pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")
def test_a_batch_over_two_to_the_31_elements_apart(tmp_path):
    """Two sequences of a B·T = 65,536 row tensor of 2³¹ elements and more, in a sparse file: int64 offsets."""
    T, H, D = 32768, 512, 128  # one sequence is 2³¹ elements
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * (2 * T * H * D))
    whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * T * H * D, dtype=torch.float16)
    q = whole.view(2, T, H, D)[:, -40:, -2:]
    assert q.stride(0) == 2**31
    q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(0)))
    with kernels.use("triton"):
        found = kernels.flash_attention(q, q, q, window=16)
    exact = kernels.flash_attention(*(q.double() for _ in range(3)), window=16)
    assert (found - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("setting", ["torch", "triton"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(window=-1), "window is -1"),
        (dict(window=3, causal=False), "window is 3 with causal=False"),
        (dict(k=torch.ones(1, 4, 3, 8)), r"k \(1, 4, 3, 8\)"),
        (dict(k=torch.ones(1, 4, 2, 8).half()), "k torch.float16"),
        (dict(q=torch.ones(1, 4, 5, 8)), "H=5"),
        (dict(q=torch.ones(4, 8)), "wanted"),
    ],
)
def test_wrong_use(change, message, setting):
    tensors = dict(q=torch.ones(1, 4, 4, 8), k=torch.ones(1, 4, 2, 8), v=torch.ones(1, 4, 2, 8))
    if setting == "triton" and not triton_utils.INSTALLED:
        pytest.skip("Triton is not installed")
    with kernels.use(setting), pytest.raises(ValueError, match=f"flash_attention: .*{message}"):
        kernels.flash_attention(**{**tensors, **change})


# ---- FlashAttention packages, by stand-ins that check how they are called


@pytest.fixture
def card(monkeypatch):
    """Says which compute capability the (CPU) tensors' device has, and forgets what was tried."""
    monkeypatch.setattr(backends, "_TRIED", {})

    def of(major):
        monkeypatch.setattr(backends, "capability", lambda device: major)

    return of


def stand_in(monkeypatch, name, unlimited, pair=False, wrong=False):
    """Puts a package into sys.modules that computes the reference and notes its windows."""
    windows = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=None):
        assert q.ndim == 4 and q.size(2) % k.size(2) == 0 and k.shape == v.shape  # (B, T, H, D): heads not repeated
        assert q.dtype in (torch.float16, torch.bfloat16) and causal and softmax_scale > 0
        windows.append(window_size)
        left, right = window_size
        assert (left, right) == (unlimited, unlimited) or (left >= 0 and right == 0)
        window = None if left in (None, -1) else left
        out = kernels.attention.flash.flash_attention_reference(q, k, v, causal, window + wrong if window else window,
                                                                softmax_scale)  # fmt: skip
        return (out, None) if pair else out

    def forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, return_lse):
        out = flash_attn_func(q, k, v, softmax_scale, causal, (window_size_left, window_size_right))
        return out[0], q.new_zeros((q.size(0), q.size(2), q.size(1)), dtype=torch.float32), None, None

    def backward(q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right):
        assert lse.shape == (q.size(0), q.size(2), q.size(1)) and out.shape == dout.shape

        def gradients():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            made = flash_attn_func(*leaves, softmax_scale, causal, (window_size_left, window_size_right))
            windows.pop()
            return torch.autograd.grad(made[0], leaves, dout)

        with ThreadPoolExecutor(1) as pool:  # an operator's own thread records no gradients
            return pool.submit(gradients).result()

    module = types.ModuleType(name)
    module.flash_attn_func = flash_attn_func
    if name == "flash_attn.cute":
        interface = types.ModuleType("flash_attn.cute.interface")
        interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)
    return windows


def bf16(T=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    "name, module, unlimited, pair, major",
    [("fa4", "flash_attn.cute", None, True, 10), ("fa3", "flash_attn_interface", -1, False, 9),
     ("fa3", "flash_attn_interface", -1, True, 9), ("fa2", "flash_attn", -1, False, 8)],
)  # fmt: skip
def test_each_package_is_called_its_own_way(name, module, unlimited, pair, major, card, monkeypatch):
    card(major)
    windows = stand_in(monkeypatch, module, unlimited, pair)
    with kernels.use(f"auto,flash_attention={name}"):
        for window in (None, 5, 0, 11, 500):  # 11 and 500 are no limit for 12 keys
            found = kernels.flash_attention(*bf16(), window=window)
            with kernels.use("torch"):
                assert torch.equal(found, kernels.flash_attention(*bf16(), window=window))
    assert windows[2:] == [(unlimited, unlimited), (5, 0), (0, 0), (unlimited, unlimited), (unlimited, unlimited)]
    assert windows[:2] == [(unlimited, unlimited), (50, 0)]  # what it was tried with


def test_the_order_and_what_each_takes(card, monkeypatch):
    for name, module, unlimited in (("fa4", "flash_attn.cute", None), ("fa3", "flash_attn_interface", -1)):
        stand_in(monkeypatch, module, unlimited, pair=name == "fa4")
    fa2 = types.ModuleType("flash_attn")
    stand_in(monkeypatch, "flash_attn", -1)
    fa2 = sys.modules["flash_attn"]
    assert hasattr(fa2, "flash_attn_func")
    device, pick = torch.device("cpu"), backends.pick
    expected = {7: "", 8: "fa2", 9: "fa4", 10: "fa4", 12: "fa4", 13: ""}
    for major, name in expected.items():
        card(major)
        assert pick(torch.bfloat16, 128, device, "auto") == name, major
    card(9)
    assert pick(torch.float16, 256, device, "auto") == "fa3"  # heads too large for FA4
    assert pick(torch.float32, 64, device, "auto") == pick(torch.bfloat16, 512, device, "auto") == ""
    with pytest.raises(ValueError, match="fa2 is asked for .* takes float16 and bfloat16, not torch.float32"):
        pick(torch.float32, 64, device, "fa2")
    card(8)
    with pytest.raises(ValueError, match="fa3 is asked for .* needs compute capability 9 to 9, this device has 8"):
        pick(torch.bfloat16, 64, device, "fa3")


def test_a_package_that_is_not_there_is_passed_over_quietly_and_a_broken_one_aloud(card, monkeypatch):
    card(9)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))  # no function
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    with pytest.warns(UserWarning, match=r"fa3 is installed but does not work here \(.*\): AttributeError"):
        assert backends.pick(torch.bfloat16, 64, torch.device("cpu"), "auto") == ""
    assert backends.pick(torch.bfloat16, 64, torch.device("cpu"), "auto") == ""  # said once
    with pytest.raises(ValueError, match="fa2 is asked for .* flash_attn.* is not installed"):
        backends.pick(torch.bfloat16, 64, torch.device("cpu"), "fa2")


def test_a_package_that_counts_windows_differently_fails_its_probe(card, monkeypatch):
    card(9)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    stand_in(monkeypatch, "flash_attn_interface", -1, wrong=True)
    with pytest.warns(UserWarning, match=r"fa3 .* is off by .* \(window 50\)"):
        assert backends.pick(torch.bfloat16, 64, torch.device("cpu"), "auto") == ""


def test_on_a_cpu_no_package_is_looked_for(monkeypatch):
    monkeypatch.setattr(backends, "pick", lambda *_: pytest.fail("looked"))
    with kernels.use("auto"):
        kernels.flash_attention(*bf16())


@pytest.mark.parametrize("T, S, window", [(300, 300, 40), (40, 300, 64), (300, 40, None), (5, 200, None), (200, 5, 3)])
def test_the_reference_never_makes_the_whole_mask(T, S, window):
    """Blocks of queries against the keys in their sight: no (T, S) mask for a window."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if torch.is_tensor(result) and result.dtype == torch.bool:
                largest.append(result.numel())
            return result

    q = torch.randn(1, T, 2, 16, generator=torch.Generator().manual_seed(0))
    k = torch.randn(1, S, 2, 16, generator=torch.Generator().manual_seed(1))
    with Watch(), kernels.use("torch"):
        kernels.flash_attention(q, k, k, window=window)
    if window is not None and T >= 300:
        assert max(largest) <= 128 * (128 + window)


def test_flash_attention_4_is_one_operator_in_a_compiled_graph(card, monkeypatch):
    """Its Python, which nothing can trace, runs inside; gradients too."""
    card(10)
    stand_in(monkeypatch, "flash_attn.cute", None, pair=True)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    q, k, v = (x.requires_grad_() for x in bf16(40))
    with kernels.use("auto,flash_attention=fa4"):
        assert backends.pick(torch.bfloat16, 16, torch.device("cpu"), "fa4") == "fa4"  # tried before it is traced
        torch._dynamo.reset()
        found = torch.compile(kernels.flash_attention, fullgraph=True, backend=backend)(q, k, v, window=5)
    with kernels.use("torch"):
        wanted = kernels.flash_attention(q, k, v, window=5)
    assert any("flash_attention_4" in target for target in seen)
    assert torch.equal(found, wanted)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), direction), torch.autograd.grad(wanted, (q, k, v), direction)
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "T, S, window",
    [
        (150, 150, 31),
        pytest.param(150, 150, None, marks=pytest.mark.slow),
        pytest.param(70, 100, 20, marks=pytest.mark.slow),
        (100, 70, 0),
    ],
)
def test_dq_and_dkdv_take_blocks_of_their_own(T, S, window):
    """Of other sides: what their loops skip and leave unmasked must not depend on square ones."""
    op = OPS["flash_attention"]
    inputs = op.inputs(dict(B=1, T=T, S=S, H=2, K=1, D=16, W=-1 if window is None else window), torch.float32, DEVICE)
    wanted = probing.answers(op, op.reference, inputs, upcast=True)
    blocks = lambda M, N: dict(BLOCK_M=M, BLOCK_N=N, num_warps=4, num_stages=1)
    for part, M, N in [("backward", 32, 64), ("backward", 64, 32), ("dq_backward", 32, 64), ("dq_backward", 64, 32)]:
        with tuned.trial(f"flash_attention_{part}", blocks(M, N)):
            found = probing.answers(op, op.triton, inputs)
        assert all(probing.relative(a, b) < 2e-6 for a, b in zip(found, wanted, strict=True)), (part, M, N)


@pytest.mark.parametrize("scale", [-0.3, -1e-46, 0.0, 1e-46, 0.3])
def test_any_scale(scale):
    """The kernels take the maximum before they scale."""
    q, k, v = (torch.randn(1, 70, 2, 16, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3))
    with kernels.use("torch"):
        wanted = kernels.flash_attention(q, k, v, window=20, scale=scale)
    with kernels.use("triton"):
        found = kernels.flash_attention(q, k, v, window=20, scale=scale)
        decoded = [kernels.flash_attention_decode(q[:, :n], k, v, torch.zeros(1, dtype=torch.int64, device=DEVICE),
                                                  window=20, scale=scale) for n in (3, 70)]  # fmt: skip
    assert probing.relative(found, wanted) < 1e-6
    for answer in decoded:
        assert probing.relative(answer, wanted[:, : answer.size(1)]) < 1e-6
