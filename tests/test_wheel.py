"""The ops alone: the wheel `nanochat-kernels`, installed from a copy of kernels/ and used as README.md shows.

What runs the installed package is another process: this one has the repository first on its path.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
(LLAMA,) = (block for block in BLOCKS if "nanochat_kernels" in block)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install` brings, without a network and without what it depends on."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(KERNELS, source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    flags = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-compile", "-q")
    made = subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", target, source], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (target / "llama.py").write_text(LLAMA)
    return target


def run(installed, *words, path=()):
    """Python in a folder of no interest, with the installed package and no repository on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *map(str, path)])}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=installed)


def test_the_wheel_has_the_ops_and_asks_for_torch_alone(installed):
    assert {path.name for path in installed.iterdir()} - {"llama.py"} == {
        "nanochat_kernels",
        "nanochat_kernels-0.1.0.dist-info",
    }
    files = {
        str(path.relative_to(installed / "nanochat_kernels")) for path in installed.glob("nanochat_kernels/**/*.*")
    }
    wanted = {path for path in KERNELS.rglob("*.*") if path.suffix in (".py", ".json", ".typed")}
    assert files == {str(path.relative_to(KERNELS)) for path in wanted}
    metadata = message_from_string((installed / "nanochat_kernels-0.1.0.dist-info" / "METADATA").read_text())
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == 1 and needed[0].startswith("torch>=")


LEARNS = """
import sys
import llama, nanochat_kernels, torch
from torch.nn import functional as F

assert nanochat_kernels.__file__.startswith(sys.argv[1]) and "kernels" not in sys.modules


def spelled_out(model, tokens, targets):  # as Llama's paper has it
    layers, T = model.layers, tokens.size(1)
    angle = torch.outer(torch.arange(T), model.frequency).repeat(1, 2)[:, None]  # (T, 1, D)
    norm = lambda x, w: w * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    turn = lambda x: x * angle.cos() + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * angle.sin()
    x = model.embed(tokens)
    for layer in layers:
        h = norm(x, layer.norm1)
        q, (k, v) = layer.q(h).unflatten(-1, (layer.H, -1)), layer.kv(h).unflatten(-1, (2, layer.K, -1)).unbind(2)
        q, k, v = (y.repeat_interleave(layer.H // y.size(2), 2).transpose(1, 2) for y in (turn(q), turn(k), v))
        scores = (q @ k.mT / layer.D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        x = x + layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        gate, up = layer.up(norm(x, layer.norm2)).chunk(2, -1)
        x = x + layer.down(gate * gate.sigmoid() * up)
    return F.cross_entropy(model.head(norm(x, model.norm)).flatten(0, 1), targets.flatten(), ignore_index=-100)


torch.manual_seed(0)
model = llama.Llama(V=64, L=1, C=32, hidden=48)
draw = lambda B, T: (torch.arange(T) + torch.randint(64, (B, 1))) % 64
tokens, targets = draw(3, 20), draw(3, 20)
targets[1, 5:] = -100
exact = spelled_out(model.double(), tokens, targets)
exact.backward()
gradients = {name: p.grad.float() for name, p in model.named_parameters()}
model.float().zero_grad()
loss = model(tokens, targets)
loss.backward()
assert (loss - exact).abs() < 1e-5, (loss, exact)
for name, p in model.named_parameters():
    assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-9, name

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    x = draw(4, 17)
    loss = model(x[:, :-1], x[:, 1:])
    optimizer.zero_grad(), loss.backward(), optimizer.step()
assert loss < 1.5, loss  # 4.2 at the start

compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=sys.argv[2])
for B, T in ((2, 9), (3, 20), (5, 70)):
    x = draw(B, T + 1)
    found = compiled(x[:, :-1], x[:, 1:])
    found.backward()
    assert (found - model(x[:, :-1], x[:, 1:])).abs() < 1e-5
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""


BESIDE = """
import kernels
import kernels.layer
assert kernels.get_kernel("abc") == 3 and not hasattr(nanochat_kernels, "get_kernel")  # Hugging Face's
for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[3])
import kernels
assert kernels.OPS.keys() == nanochat_kernels.OPS.keys() and kernels.OPS is not nanochat_kernels.OPS
x = torch.randn(3, 8)
with kernels.use("triton,rms_norm=torch"):
    assert torch.equal(nanochat_kernels.rms_norm(x), kernels.rms_norm(x))
for package in (kernels, nanochat_kernels):  # each has operators of its own
    dw = torch.zeros(4, 8)
    package.linear_cross_entropy.__globals__["_add_product"](dw, torch.ones(3, 4), x)
    assert torch.allclose(dw, x.sum(0).expand(4, 8))
    assert hasattr(getattr(torch.ops, package.__name__), "add_product")
"""


def test_the_readmes_llama_learns_and_compiles_for_any_size_beside_two_other_packages(installed, tmp_path):
    """In one process: the model, Hugging Face's `kernels` (a stand-in), the repository's."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("from kernels.layer import get_kernel\n")
    (other / "layer.py").write_text("get_kernel = len\n")
    (tmp_path / "kernels-9.dist-info").mkdir()
    (tmp_path / "kernels-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9\n")
    made = run(installed, "-c", LEARNS + BESIDE, str(installed), "eager", str(ROOT), path=[tmp_path])
    assert made.returncode == 0, made.stderr[-3000:]


@pytest.mark.parametrize(
    "words, code, said",
    [
        ((), 0, "rms_norm                 torch"),
        (("--help",), 0, "python -m nanochat_kernels tune"),
        (("readme",), 2, "error: that writes into the repository's kernels/"),
    ],
)
@pytest.mark.slow
def test_its_command(installed, words, code, said):
    made = run(installed, "-m", "nanochat_kernels", *words)
    assert made.returncode == code and said in made.stdout + made.stderr, made.stderr


@pytest.mark.slow
def test_the_readmes_llama_compiled_by_inductor(installed):
    made = run(installed, "-c", LEARNS, str(installed), "inductor")
    assert made.returncode == 0, made.stderr[-3000:]


@pytest.mark.slow
def test_hugging_faces_llama_of_the_same_weights_beside_its_kernels(installed):
    """transformers and Hugging Face's kernels in one process with ours; a Llama of theirs gives the same loss."""
    for name in ("transformers", "kernels"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed (pip install transformers kernels)")
    code = """
import kernels, nanochat_kernels, llama, torch
from transformers import LlamaConfig, LlamaForCausalLM
assert hasattr(kernels, "get_kernel") and not hasattr(kernels, "rms_norm")
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
theirs, ours = LlamaForCausalLM(config), llama.Llama(V=64, L=2, C=32, hidden=48)
with torch.no_grad():
    for p in theirs.parameters(): p.copy_(torch.randn_like(p) * 0.3)
theirs.double(), ours.double()
ours.embed, ours.head, ours.norm = theirs.model.embed_tokens, theirs.lm_head, theirs.model.norm.weight
for mine, layer in zip(ours.layers, theirs.model.layers):
    a, m = layer.self_attn, layer.mlp
    mine.norm1, mine.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    mine.q, mine.out, mine.down = a.q_proj, a.o_proj, m.down_proj
    mine.kv.weight = torch.nn.Parameter(torch.cat((a.k_proj.weight, a.v_proj.weight)))
    mine.up.weight = torch.nn.Parameter(torch.cat((m.gate_proj.weight, m.up_proj.weight)))
tokens = torch.randint(64, (3, 41))
difference = theirs(tokens, labels=tokens).loss - ours(tokens[:, :-1], tokens[:, 1:])
assert difference.abs() < 1e-4, difference  # their angles are float32
print("equal")
"""
    made = run(installed, "-c", code)
    assert made.stdout == "equal\n", made.stderr[-3000:]
