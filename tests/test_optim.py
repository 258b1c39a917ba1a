import math
import os
import socket

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.optim import MuonAdamW, parameter_groups


def test_groups_are_those_of_the_recipe():
    model = tiny.model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.28)
    scale = math.sqrt(768 / 32)
    found = [
        (names[id(g["params"][0])], g["kind"], g["lr"], g.get("betas"), g["weight_decay"])
        for g in groups
        if g["kind"] == "adamw"
    ]
    assert found == [
        ("lm_head.weight", "adamw", 0.004 * scale, (0.8, 0.96), 0.01),
        ("transformer.wte.weight", "adamw", 0.2 * scale, (0.8, 0.995), 0.001),
        ("value_embeds.1.weight", "adamw", 0.2 * scale * 0.5, (0.8, 0.995), 0.01),
        ("resid_lambdas", "adamw", 0.5 * 0.01, (0.8, 0.95), 0.05),
        ("x0_lambdas", "adamw", 0.5, (0.96, 0.95), 0.0),
        ("smear_gate.weight", "adamw", 0.2, (0.8, 0.95), 0.0),
    ]
    assert [names[id(p)] for p in groups[5]["params"]] == ["smear_gate.weight", "smear_lambda", "backout_lambda"]
    muon = [g for g in groups if g["kind"] == "muon"]
    assert all(
        (g["momentum"], g["beta2"], g["steps"], g["lr"], g["weight_decay"]) == (0.95, 0.9, 5, 0.02, 0.28) for g in muon
    )
    assert all(len({p.shape for p in g["params"]}) == 1 for g in muon)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(names)  # each exactly once
    in_blocks = {id(p) for p in model.transformer["h"].parameters()}
    assert {id(p) for g in muon for p in g["params"]} == in_blocks


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def stepped(model, optimizer, seeds):
    for seed in seeds:
        gradients(model, seed)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_saved_and_restored_state_goes_on_bitwise():
    whole = tiny.model()
    wanted = stepped(whole, whole.setup_optimizer(weight_decay=0.1), range(6))
    first = tiny.model()
    optimizer = first.setup_optimizer(weight_decay=0.1)
    stepped(first, optimizer, range(3))
    second = tiny.model()
    second.load_state_dict(first.state_dict())
    again = second.setup_optimizer(weight_decay=0.1)
    again.load_full_state(optimizer.full_state())
    found = stepped(second, again, range(3, 6))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_state_of_another_model_is_refused():
    small, large = tiny.model(n_layer=1), tiny.model(n_layer=3)
    optimizer = large.setup_optimizer()
    stepped(large, optimizer, [0])
    with pytest.raises(ValueError, match="belongs to no parameter"):
        small.setup_optimizer().load_full_state(optimizer.full_state())


def test_bfloat16_embeddings_keep_their_dtype_and_muon_runs_in_it():
    model = tiny.model()
    model.set_dtype(torch.bfloat16)
    optimizer = model.setup_optimizer()
    assert optimizer.dtype == torch.bfloat16
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    wte = model.transformer["wte"].weight
    assert wte.dtype == torch.bfloat16 == optimizer.state[wte]["exp_avg"].dtype
    assert all(p.isfinite().all() for p in model.parameters())


# ---- ranks


def work(rank, world, port, folder):
    """Each rank has its own gradients; together they must do what one process does with their mean."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = tiny.model()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    saved = folder / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_full_state(state["optimizer"])
    for step in range(3):
        gradients(model, 100 * step + rank)
        optimizer.step()
    moments = optimizer.full_state()
    if rank == 0:
        torch.save(dict(model=model.state_dict(), optimizer=moments), folder / f"world{world}.pt")
    dist.barrier()  # nobody hangs up while another still talks
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends the ordinary way


def alone(world, start=None):
    model = tiny.model()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    if start:
        model.load_state_dict(start["model"])
        optimizer.load_full_state(start["optimizer"])
    for step in range(3):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(world):
            gradients(model, 100 * step + rank)
            total = [t + p.grad / world for t, p in zip(total, model.parameters())]
        for t, p in zip(total, model.parameters()):
            p.grad = t
        optimizer.step()
    return dict(model=model.state_dict(), optimizer=optimizer.full_state())


def spawn(world, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (world, port, folder), nprocs=world)
    return torch.load(folder / f"world{world}.pt", weights_only=True)


def assert_close(found, wanted):
    assert found["model"].keys() == wanted["model"].keys()
    assert found["optimizer"].keys() == wanted["optimizer"].keys()
    for part in ("model", "optimizer"):
        for key, value in wanted[part].items():
            torch.testing.assert_close(found[part][key], value, rtol=2e-4, atol=2e-6, msg=f"{part} {key}")


def test_two_ranks_are_one(tmp_path):
    assert_close(spawn(2, tmp_path), alone(2))


@pytest.mark.slow
def test_three_ranks_go_on_from_what_two_saved(tmp_path):
    two = spawn(2, tmp_path)
    torch.save(two, tmp_path / "state.pt")
    assert_close(spawn(3, tmp_path), alone(3, two))


def test_one_process_makes_no_communication():
    assert MuonAdamW(parameter_groups(tiny.model())).world == 1


def test_matrices_of_a_group_lie_in_one_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny.model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = model.setup_optimizer()
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            size = group["params"][0].numel() * group["params"][0].itemsize
            first = group["params"][0].data_ptr()
            assert [p.data_ptr() - first for p in group["params"]] == [i * size for i in range(len(group["params"]))]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in loaded.items())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_cast_once_a_step_are_those_cast_at_every_use(compiled):
    """Losses, gradients and weights to the bit, over steps of two micro-batches."""
    draw = torch.Generator().manual_seed(0)
    batches = torch.randint(300, (3, 2, 4, 33), generator=draw)
    results = []
    for shadows in (False, True):
        model = tiny.model()
        model.set_dtype(torch.bfloat16)
        optimizer = model.setup_optimizer(weight_decay=0.1)
        if shadows:
            optimizer.keep_gradients()
            model.lm_head.gradient = model.lm_head.weight.grad
            model.keep_shadows(optimizer)
        runs = torch.compile(model, dynamic=False) if compiled else model
        losses, gradients = [], []
        for step in batches:
            for ids in step:
                loss = runs(ids[:, :-1], ids[:, 1:]) / 2
                loss.backward()
                losses.append(loss.detach())
            gradients += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results.append([*losses, *gradients, *model.state_dict().values()])
        casts = [m for m in model.modules() if getattr(m, "shadow", None) is not None]
        assert len(casts) == (1 + len(list(model.transformer["h"].parameters())) if shadows else 0)
        assert all(torch.equal(m.shadow, m.weight.to(torch.bfloat16)) and m.shadow.grad is None for m in casts)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_compiled_updates_of_large_tables_are_the_eager_ones(monkeypatch):
    """Over steps with other learning rates, which compile nothing anew."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr("nanochat.optim.LARGE", 300 * 32)
    results = []
    for compiled in (False, True):
        model = tiny.model()
        optimizer = model.setup_optimizer(weight_decay=0.1)
        if compiled:
            optimizer.compile()
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (step + 1) / 4
            before = counters["stats"]["unique_graphs"]
            gradients(model, step)
            optimizer.step()
        results.append(model.state_dict())
        assert counters["stats"]["unique_graphs"] == before
    for name, wanted in results[0].items():
        assert (results[1][name] - wanted).norm() <= 1e-6 * wanted.norm(), name
    assert counters["stats"]["unique_graphs"] > 0
