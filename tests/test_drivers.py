"""Cards that a driver sees and torch cannot use, through a stand-in of nvidia-smi and of the kernel's files."""

import os

import pytest
import standins
import torch

import benchmarks.__main__
from nanochat import drivers, hardware
from nanochat.errors import UserError
from profiling.predicted import calibrate

H100 = "NVIDIA H100 80GB HBM3, 81559, {driver}, 9.0, Disabled"
V100 = "Tesla V100-SXM2-16GB, 16384, {driver}, 7.0, [N/A]"
RTX5090 = "NVIDIA GeForce RTX 5090, 32607, {driver}, 12.0, [N/A]"
GT1030 = "NVIDIA GeForce GT 1030, 2048, {driver}, 6.1, [N/A]"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    """torch 2.13 for CUDA 13.0 that sees nothing; no driver, no variable that hides cards."""
    for name in ("CUDA", "NVIDIA", "HIP", "ROCR"):
        monkeypatch.delenv(f"{name}_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "has_mps", lambda: False)
    monkeypatch.setattr(drivers, "_torch_says", lambda: "it says 'no'")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(drivers, "ANSWER_SECONDS", 5.0)


@pytest.fixture
def smi(tmp_path):
    """smi(lines, code): nvidia-smi answers so; `only` a query without what old ones do not know is answered."""

    def plug(*lines, code=0, driver="580.65.06", old=False, place="bin/nvidia-smi"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse = (
            """case "$*" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2;; esac"""
        )
        text = "\n".join(lines).format(driver=driver)
        path.write_text(f"#!/bin/sh\n{refuse if old else ''}\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        path.chmod(0o755)

    return plug


def files(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def proc(root, model="NVIDIA H100 80GB HBM3", cards=1, dev=True):
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build"
    for i in range(cards):
        files(root, **{f"proc/driver/nvidia/gpus/0000:0{i}:00.0/information": f"Model: \t\t {model}\nIRQ: 1\n"})
        if dev:
            files(root, **{f"dev/nvidia{i}": ""})
    files(root, **{"proc/driver/nvidia/version": version})


def test_nothing_here(tmp_path):
    assert drivers.unusable(tmp_path) == ("", False)
    assert hardware.pick("", 0) in ("cpu", "mps")


def test_an_old_driver_names_the_build_that_fits_it(tmp_path, smi):
    smi(*[H100] * 8, driver="535.183.01")
    said, large = drivers.unusable(tmp_path)
    assert large and said.count("\n") == 0
    assert "torch 2.13.0+cu130 cannot use the 8 x NVIDIA H100 80GB HBM3 (driver 535.183.01)" in said
    assert "built for CUDA 13.0, which wants driver 580 or newer" in said
    assert "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126" in said
    assert "update the driver to 580" in said and "--device-type cpu" in said and "--device cpu" in said


@pytest.mark.parametrize(
    "card, driver, built, wanted, not_wanted",
    [
        (RTX5090, "570.86.15", "13.0", ["Update the driver to 580 or newer"], ["pip install", "cu126"]),
        (H100, "470.82", "13.0", ["Update the driver to 580 or newer"], ["pip install"]),
        (H100, "580.65", None, ["built for CPUs only", "2.13.0+cu130 --index-url"], ["update the driver", "cu126"]),
        (H100, "535.1", None, ["2.13.0+cu126"], ["cu130", "update the driver"]),
        (RTX5090, "570.1", None, ["Update the driver to 580 or newer and install", "2.13.0+cu130 --"], ["cu126"]),
        (V100, "535.1", "13.0", ["2.13.0+cu126"], ["update the driver"]),
        (V100, "470.1", "13.0", ["Update the driver to 525 or newer and install", "+cu126"], ["cu130 "]),
        (H100, "580.65", "13.0", ["it says 'no'", "Mend that"], ["pip install"]),
    ],
)
def test_what_to_do_for_a_card_a_driver_and_a_build(
    tmp_path, smi, monkeypatch, card, driver, built, wanted, not_wanted
):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130" if built else "2.13.0+cpu")
    smi(card, driver=driver)
    said = drivers.unusable(tmp_path)[0].replace("torch 2.13.0+cu130 cannot", "torch cannot")
    assert all(words in said for words in wanted), said
    assert not any(words in said for words in not_wanted), said


@pytest.mark.parametrize(
    "version, card, driver, wanted",
    [
        ("2.11.0", H100, "535.1", "pip install torch==2.11.0+cu128"),
        ("2.11.0", RTX5090, "570.1", "pip install torch==2.11.0+cu128"),
        ("2.11.0", V100, "535.1", "pip install torch==2.11.0+cu126"),
        ("2.12.1", H100, "550.1", "pip install torch==2.12.1+cu126"),
        ("2.12.1", RTX5090, "570.1", ". Update the driver to 580 or newer"),
        ("2.12.1", H100, "470.1", ". Update the driver to 580 or newer"),
    ],
)
def test_older_versions_of_torch_have_builds_of_their_own(tmp_path, smi, monkeypatch, version, card, driver, wanted):
    monkeypatch.setattr(torch, "__version__", f"{version}+cu130")
    smi(card, driver=driver)
    assert wanted in drivers.unusable(tmp_path)[0]


def test_of_another_torch_no_build_is_claimed_but_what_to_look_for_is_said(tmp_path, smi, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu130")
    smi(H100, driver="535.1")
    said, _ = drivers.unusable(tmp_path)
    assert "Install a build of torch for CUDA 12 or older, which this driver runs (pytorch.org" in said
    assert ", or update the driver to 580 or newer, or insist" in said and "pip install" not in said
    smi(H100, driver="440.1")
    assert "Install a build of torch for this driver and card (pytorch.org" in drivers.unusable(tmp_path)[0]


def test_the_scripts_stop_and_may_be_told_to_use_the_cpu(smi, capsys):
    smi(GT1030, H100, driver="535.1")
    for asked in ("", "cuda"):
        with pytest.raises(UserError, match="2 x NVIDIA H100"):
            hardware.pick(asked, 0)
    assert hardware.pick("cpu", 0) == "cpu"
    smi(GT1030)
    assert hardware.pick("", 0) == "cpu"
    assert capsys.readouterr().out.startswith("note: torch 2.13.0+cu130 cannot use the NVIDIA GeForce GT 1030")


CUDA = "CUDA_VISIBLE_DEVICES"


def test_benchmarks_and_calibration_say_it_too(smi, monkeypatch, tmp_path):
    """Else the CPU's smoke test would be taken for the card's result."""
    smi(H100, driver="550.54.15")
    monkeypatch.setattr("sys.argv", ["benchmarks", "run", "--out", str(tmp_path / "first.json")])
    with pytest.raises(UserError, match="driver 550.54.15.*--profile smoke"):
        benchmarks.__main__.run()
    monkeypatch.setattr("sys.argv", ["calibrate"])
    with pytest.raises(UserError, match="driver 550.54.15"):
        calibrate.main()


@pytest.mark.parametrize(
    "name, value", [(CUDA, ""), (CUDA, "-1"), (CUDA, "NoDevFiles"), ("NVIDIA_VISIBLE_DEVICES", "void")]
)
def test_hidden_cards_are_nobodys_business(smi, monkeypatch, tmp_path, name, value):
    smi(H100, driver="535.1")
    proc(tmp_path)
    monkeypatch.setenv(name, value)
    assert drivers.unusable(tmp_path) == ("", False) and hardware.pick("", 0) == "cpu"
    monkeypatch.setenv(name, "0,1")
    assert drivers.unusable(tmp_path)[1]


def test_an_old_nvidia_smi_is_asked_for_less(tmp_path, smi):
    smi("NVIDIA H100 80GB HBM3, 81559, {driver}", driver="525.1", old=True)
    seen = drivers.nvidia(tmp_path)
    assert seen.driver == "525.1" and seen.cards == (drivers.Card("NVIDIA H100 80GB HBM3", 81559 << 20),)


def test_driver_and_library_of_different_versions(tmp_path, smi):
    smi("Failed to initialize NVML: Driver/library version mismatch", "NVML library version: 580.95", code=18)
    said, large = drivers.unusable(tmp_path)
    assert not large and "no NVIDIA card is seen: nvidia-smi says 'Failed to initialize NVML" in said
    proc(tmp_path)
    said, large = drivers.unusable(tmp_path)
    assert large and "H100" in said and "driver 550.54.15" in said and "a reboot loads the new driver" in said


@pytest.mark.parametrize("lines, code", [(["No devices were found"], 6), (["\x00\xff a, b"], 0), ([""], 0)])
def test_no_devices_and_garbage_are_a_note(tmp_path, smi, lines, code):
    smi(*lines, code=code)
    said, large = drivers.unusable(tmp_path)
    assert not large and said.startswith("no NVIDIA card is seen: nvidia-smi ") and hardware.pick("", 0) == "cpu"


def test_an_nvidia_smi_that_hangs_is_not_waited_for(tmp_path, smi, monkeypatch):
    smi(H100)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr(drivers, "ANSWER_SECONDS", 0.2)
    assert "nvidia-smi does not answer" in drivers.unusable(tmp_path)[0]
    proc(tmp_path, cards=2)
    said, large = drivers.unusable(tmp_path)
    assert large and "2 x NVIDIA H100" in said


def test_without_nvidia_smi_the_kernels_files_tell(tmp_path):
    proc(tmp_path, cards=8)
    seen = drivers.nvidia(tmp_path)
    assert seen.driver == "550.54.15" and len(seen.cards) == 8 and seen.large and not seen.remark
    proc(tmp_path, "NVIDIA GeForce MX450", cards=8)  # memory is not reported, and cards.py does not know it
    assert not drivers.nvidia(tmp_path).large
    files(tmp_path, **{"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun"})
    assert drivers.nvidia(tmp_path).driver == "535.183.01"


def test_a_container_that_was_given_no_card(tmp_path):
    proc(tmp_path, dev=False)
    assert "--gpus all" in drivers.unusable(tmp_path)[0]


def test_mig_without_an_instance(tmp_path, smi):
    smi(H100.replace("Disabled", "Enabled"))
    assert "MIG mode is on without an instance" in drivers.unusable(tmp_path)[0]
    smi(H100.replace("Disabled", "Enabled").replace("81559", "[Insufficient Permissions]"))
    assert drivers.unusable(tmp_path)[1]  # by its name


def test_wsl_keeps_nvidia_smi_off_the_path(tmp_path, smi):
    smi("NVIDIA GeForce RTX 4090, 24564, {driver}, 8.9, [N/A]", driver="566.36", place="usr/lib/wsl/lib/nvidia-smi")
    said, large = drivers.unusable(tmp_path)
    assert large and "RTX 4090 (driver 566.36)" in said and "cu126" in said


def kfd(root, *nodes):
    for i, (simds, target, size) in enumerate(nodes):
        node = f"sys/class/kfd/kfd/topology/nodes/{i}"
        files(root, **{f"{node}/properties": f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {target}\n"})
        files(root, **{f"{node}/mem_banks/0/properties": f"heap_type {1 if simds else 0}\nsize_in_bytes {size}\n"})


def test_amds_cards_want_a_build_for_rocm(tmp_path):
    kfd(tmp_path, (0, 0, 1 << 40), *[(1216, 90402, 192 << 30)] * 8)
    files(tmp_path, **{"dev/kfd": "", "sys/module/amdgpu/version": "6.16.6\n"})
    said, large = drivers.unusable(tmp_path)
    assert large and "8 x AMD gfx942 (driver 6.16.6)" in said and "built for CUDA 13.0" in said
    assert "2.13.0+rocm7.2 --index-url https://download.pytorch.org/whl/rocm7.2" in said


@pytest.mark.parametrize("variable", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_amds_cards_hidden_small_or_closed(tmp_path, monkeypatch, variable):
    kfd(tmp_path, (96, 110001, 16 << 30), (8, 90010, 512 << 20))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.2.1")
    said, large = drivers.unusable(tmp_path)
    assert large and "2 x AMD gfx1101" in said and "no /dev/kfd" in said and "pip" not in said
    files(tmp_path, **{"dev/kfd": ""})
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "groups render and video" in drivers.unusable(tmp_path)[0]
    monkeypatch.setenv(variable, "-1")
    assert drivers.unusable(tmp_path) == ("", False)
    monkeypatch.delenv(variable)
    kfd(tmp_path, (0, 0, 0), (8, 90010, 512 << 20))
    assert drivers.amd(tmp_path).cards == (drivers.Card("AMD gfx90a", 512 << 20),) and not drivers.unusable(tmp_path)[1]


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((8, 6), ["sm_80"], True),  # a later minor version of the same major one
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 1), ["sm_120"], True),
        ((15, 0), standins.CU130, True),  # PTX
        ((7, 0), standins.CU130, False),
        ((6, 0), standins.CU130, False),
        ((7, 5), standins.CU130, True),
        ((7, 5), ["sm_80", "something"], True),
    ],
)
def test_which_binaries_run_on_a_card(capability, archs, runs):
    assert drivers.runs_on(capability, archs) == runs


def test_a_card_that_the_build_left_out(monkeypatch, smi, capsys):
    standins.gpus(monkeypatch, "V100")
    smi(V100, driver="575.51")
    for asked in ("", "cuda"):
        with pytest.raises(UserError, match="with code for sm_75, .* and the card is sm_70.*torch==2.13.0.cu126"):
            hardware.pick(asked, 0)
    standins.gpus(monkeypatch, "GTX 1050")
    assert hardware.pick("", 0) == "cpu" and "note: torch" in capsys.readouterr().out
    standins.gpus(monkeypatch, "unknown")
    assert hardware.pick("", 0) == "cuda"
    with pytest.raises(UserError, match="rank 1 wants a GPU of its own, and torch sees 1"):
        hardware.pick("", 1)
