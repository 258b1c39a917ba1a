"""Attention: which tiles the kernels visit, long offsets, splits, lengths and windows; wrong use."""

import pytest
import torch

import kernels
from kernels import OPS, traffic, triton_utils, tuned
from kernels.attention import triton_decode

needs_interpreter = pytest.mark.skipif(
    not triton_utils.INTERPRETED, reason="counts what the interpreter runs: no Triton here, or a GPU"
)


def needed(T, S, window, rows, columns):
    """Tiles (rows of queries, columns of keys) that hold a visible pair."""
    i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    seen = (j <= i) & (j >= i - (S if window is None else window))
    return sum(bool(part.any()) for band in seen.split(rows) for part in band.split(columns, dim=1))


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
    for tiles, rows, columns in visited(T, S, window):
        assert tiles == needed(T, S, window, rows, columns)


@needs_interpreter
def test_tiles_of_the_window_pattern_at_2048():
    """SSSL: what is visited is at most 1.15 times what is needed."""
    total = [0.0, 0.0]
    least = [0, 0]
    for window, layers in ((512, 3), (None, 1)):
        for part, (tiles, rows, columns) in enumerate(visited(2048, 2048, window)):
            total[part] += layers * tiles
            least[part] += layers * needed(2048, 2048, window, rows, columns)
    assert all(found <= 1.15 * fewest for found, fewest in zip(total, least))
    assert total[0] < 0.65 * 4 * needed(2048, 2048, None, 64, 32)  # four full layers would be much more


@needs_interpreter
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [None, 0, 5, 100, 399])
def test_decode_is_the_same_however_keys_are_split(splits, window, monkeypatch):
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


def test_split_count_fills_the_card_but_keeps_pieces_long():
    device = torch.device("meta")  # as an H100: 528 programs
    assert triton_decode.split_count(device, 12, 4096, 256) == 16  # limited by the pieces' length
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
