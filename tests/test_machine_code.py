"""What the kernels become on cards that are not here: compiled in processes that do not interpret, and read."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import machine_code, triton_utils, tuned
from kernels.architectures import ALL_TARGETS, NO_FP8, OTHER_TARGETS, REFUSED, TARGETS, refused
from kernels.targets import occupancy, resident_blocks

pytestmark = pytest.mark.skipif(
    not triton_utils.INSTALLED, reason="Triton is not installed, so nothing can be compiled"
)
ROOT = Path(__file__).parent.parent


def run(*words, **variables):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "NANOCHAT_KERNELS")
    }
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **variables},
    )  # fmt: skip


def report(*flags):
    made = run("-m", "kernels", "compile", "--json", *flags)
    assert made.stdout.startswith("["), made.stderr[-2000:]
    return json.loads(made.stdout), made.returncode


def check(rows, code, targets, dtype="bfloat16", ops=None):
    wrong = {(row["kernel"], row["op"], row["target"], row["shape"]): row["faults"] for row in rows if row["faults"]}
    assert not wrong and code == 0
    wanted = itertools.product(ops or tuned.ops(), targets)
    there = {(op, target) for op, target in wanted if not refused(op, target, getattr(torch, dtype))}
    assert {(row["op"], row["target"]) for row in rows} == there
    for row in rows:
        least = 8 if row["target"].startswith("gfx") else 16
        assert least <= row["registers"] <= 512 and 0 < row["occupancy"] <= 1, row
        mix = row["mix"]
        assert sum(mix.values()) > 20 and mix.get("integer", 0) > 0 and mix["other"] < 0.6 * sum(mix.values()), row
        assert row["tensor_core"] in (*mix, "", "none needed"), row
        if "symmetric" in row["kernel"]:
            assert row["tensor_core"]


def test_every_kernel_keeps_its_promises_on_an_h100():
    check(*report("--target=sm_90"), ("sm_90",))


TOGETHER = """
from kernels import OPS, machine_code, targets
import torch
launches = [launch for op in ("rms_norm", "rotary")
            for launch in targets.launches(OPS[op], OPS[op].cases["odd"], torch.bfloat16, "sm_90")]
made = [targets.compiled(launch, "sm_90") for launch in launches]
alone = [machine_code.read_cuda(one) for one in made]
targets.disassemble_ahead(launches, "sm_90")
disassembler, run = machine_code.tool("nvdisasm"), machine_code.run
def without(*words):
    assert words[0] != disassembler, "asked again"
    return run(*words)
machine_code.run = without
assert [machine_code.read_cuda(one) for one in made] == alone and len({repr(one) for one in alone}) > 2
"""


def test_kernels_disassembled_together_are_what_they_are_alone():
    made = run("-c", TOGETHER)
    assert made.returncode == 0, made.stderr[-2000:]


@pytest.mark.slow
def test_a_prompts_attention_uses_matrix_units_and_does_not_spill():
    rows, code = report("--op=flash_attention_decode", "--shape=prompt", "--target=sm_80,sm_90")
    assert code == 0 and [(row["kernel"], row["faults"]) for row in rows] == [("_prefill_kernel", [])] * 2
    assert rows[1]["tensor_core"] == "HGMMA"


@pytest.mark.slow
def test_what_a_card_without_bfloat16_and_one_with_waves_of_32_get():
    ops = ("add_rms_norm", "qk_norm_rotary", "embedding", "fp8_add_rms_norm")
    rows, code = report("--target=sm_75,gfx1100", "--dtype=float16", f"--op={','.join(ops)}")
    check(rows, code, ("sm_75", "gfx1100"), "float16", ops)
    assert {row["tensor_core"] for row in rows if row["op"] == "embedding"} == {"WMMA"}


def test_what_is_refused_is_said():
    assert refused("flash_attention", "sm_75", torch.float16).startswith("on sm_75, Triton does not use its tensor")
    assert refused("flash_attention", "gfx1201", torch.bfloat16).startswith("on gfx1201, at D = 128")
    assert refused("fp8_linear", "gfx1100", torch.bfloat16) == "gfx1100 has no fp8 instructions"
    assert refused("fp8_linear", "gfx950", torch.bfloat16) == refused("rms_norm", "sm_75", torch.float16) == ""
    assert "float16" in refused("linear_relu2", "sm_90", torch.float16)
    assert {target for _, target in REFUSED} | set(NO_FP8) <= set(ALL_TARGETS)
    assert {op for op, _ in REFUSED} <= set(tuned.ops())


def test_rows_of_block_sizes_are_shared_by_architectures_alike(monkeypatch):
    tables = {
        "gfx1100": {"adamw_": [dict(dtype="*", config=dict(BLOCK=1), ms=1), dict(dtype="*", config=dict(BLOCK=2))]},
        "default": {"adamw_": [dict(dtype="*", config=dict(BLOCK=3))]},
    }
    monkeypatch.setattr(tuned, "table", lambda arch: tables.get(arch, {}))
    found = []
    for arch in ("gfx1100", "gfx1201", "sm_121"):
        with tuned.assume(arch):
            found.append(tuned.config("adamw_", torch.float32, 1, torch.device("meta"))["BLOCK"])
    assert found == [1, 2, 3]  # what was measured on one card is not said of another


# Each of these takes minutes. All shapes and targets of a dtype are one process: it compiles and reads what they share
# once, and there is one child for all AMD cards. A T4 computes in float16, so nothing is compiled in bfloat16 for it.
SHAPES, DTYPES = "d12,d24,d32", ("bfloat16", "float16", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [False, True], ids=["", "their neighbours"])
def test_every_kernel_keeps_its_promises_everywhere(near, dtype):
    targets = [name for name in (OTHER_TARGETS if near else TARGETS) if (name, dtype) != ("sm_75", "bfloat16")]
    shapes = "d24" if near else SHAPES
    rows, code = report(f"--target={','.join(targets)}", f"--shape={shapes}", f"--dtype={dtype}")
    if dtype == "float32":  # IEEE products have no tensor cores
        rows = [dict(row, tensor_core=row["tensor_core"] or "none needed") for row in rows]
    check(rows, code, targets, dtype)
    assert {row["shape"] for row in rows} >= set(shapes.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_other_heads_fits_into_every_cards_shared_memory(dtype):
    shapes, cards = "head_64,head_256", "sm_80,sm_86,sm_90,sm_120,gfx942"
    rows, _ = report(f"--target={cards}", f"--shape={shapes}", f"--dtype={dtype}", "--op=flash_attention")
    assert len(rows) >= 40 and all(row["occupancy"] and not row["error"] for row in rows)


@pytest.mark.slow
def test_each_fault_is_found():
    made = run(str(ROOT / "tests" / "faulty_kernels.py"))
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout)
    for name in ("good", "ieee", "tensor cores", "shared memory of an H100", "WMMA", "MFMA"):
        assert found[name] == [], name
    for name, words in {
        "float64": "float64 instructions", "narrow": "2 bytes at a time", "spills": "spills", "tf32": "TF32",
        "no tensor cores": "tensor cores: none", "does not compile": "nonsense",
        "shared memory": "needs 131,072 bytes of shared memory, a block has 101,376",
        "no tensor cores for sm_75": "tensor cores: none",  # else it is to be taken out of architectures.REFUSED
    }.items():  # fmt: skip
        assert any(words in fault for fault in found[name]), (name, found[name])


def test_occupancy():
    card = TARGETS["sm_90"]
    assert occupancy(card, 32, 0, 4) == 1.0  # 64 warps x 32 lanes x 32 registers are exactly all
    assert occupancy(card, 64, 0, 4) == 0.5
    assert occupancy(card, 65, 0, 4) == 28 / 64  # 2,304 registers a warp, 7 warps a partition
    assert occupancy(card, 32, 100 << 10, 8) == 16 / 64  # two blocks of 101 KB
    assert occupancy(card, 32, 228 << 10, 8) == 0  # no block may have as much
    assert occupancy(card, 16, 0, 1) == 32 / 64  # not more than 32 blocks
    assert occupancy(TARGETS["gfx942"], 128, 64 << 10, 4) == 4 / 32
    assert occupancy(TARGETS["gfx942"], 257, 0, 4) == 4 / 32  # 264 of a SIMD's 512 registers: one wave on each
    assert occupancy(TARGETS["sm_75"], 64, 64 << 10, 4) == 4 / 32 and occupancy(TARGETS["sm_75"], 64, 98304, 4) == 0
    assert occupancy(TARGETS["gfx1100"], 96, 0, 4) == 1.0  # RDNA: 16 waves of 96 of a SIMD's 1,536 registers
    assert occupancy(TARGETS["gfx1100"], 97, 0, 4) == 48 / 64  # 120: they come in 24s
    assert (
        occupancy(TARGETS["gfx1100"], 96, 64 << 10, 8) == 16 / 64 and occupancy(TARGETS["gfx1100"], 96, 65537, 8) == 0
    )
    assert occupancy(ALL_TARGETS["gfx950"], 128, 160 << 10, 8) == 8 / 32


CUDA = {name: target for name, target in ALL_TARGETS.items() if target.backend == "cuda"}


def test_blocks_at_known_points():
    order = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
    assert set(order) == set(CUDA)
    assert [resident_blocks(CUDA[name], 40, 0, 4) for name in order] == [8] + [12] * 7
    assert [resident_blocks(CUDA[name], 64, 48 << 10, 8) for name in order] == [1, 3, 2, 2, 4, 4, 2, 2]


ORACLE = """
#include <cuda_occupancy.h>
#include <stdio.h>
int main(void) {
    int major, minor, warps, threads, registers; unsigned long per_sm, per_block, reserved, shared;
    while (scanf("%d %d %d %lu %lu %lu %d %d %lu", &major, &minor, &warps, &per_sm, &per_block, &reserved, &threads,
                 &registers, &shared) == 9) {
        struct cudaOccDeviceProp card = {0};
        card.computeMajor = major; card.computeMinor = minor; card.warpSize = 32; card.numSms = 1;
        card.maxThreadsPerBlock = 1024; card.maxThreadsPerMultiprocessor = 32 * warps;
        card.regsPerBlock = card.regsPerMultiprocessor = 65536;
        card.sharedMemPerBlock = 48 << 10; card.sharedMemPerBlockOptin = per_block;
        card.sharedMemPerMultiprocessor = per_sm; card.reservedSharedMemPerBlock = reserved;
        struct cudaOccFuncAttributes kernel = {0};
        kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.numBlockBarriers = 1;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; kernel.maxDynamicSharedSizeBytes = shared;
        struct cudaOccDeviceState state = {0};
        state.carveoutConfig = SHAREDMEM_CARVEOUT_DEFAULT;
        struct cudaOccResult result;
        int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &card, &kernel, &state, threads, shared);
        printf("%d\\n", status ? -status : result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_blocks_as_nvidias_calculator_has_them(tmp_path):
    """Its header is plain C and comes with Triton."""
    header = Path(machine_code.tool("x")).parent.parent / "include" / "cuda_occupancy.h"
    if not shutil.which("gcc") or not header.exists():
        pytest.skip("needs gcc and the cuda_occupancy.h of Triton's wheel")
    (tmp_path / "oracle.c").write_text(ORACLE)
    built = ["gcc", "-w", "-I", str(header.parent), str(tmp_path / "oracle.c"), "-o", str(tmp_path / "oracle")]
    subprocess.run(built, check=True)
    rng = random.Random(0)
    sizes = [0, 1, 127, 128, 1024, 9300, 48 << 10, *(kb << 10 for kb in (63, 64, 98, 99, 100, 163, 164, 226, 227, 228))]
    grid = [
        *itertools.product(CUDA, (1, 2, 3, 4, 8, 16, 32), (1, 16, 32, 40, 64, 65, 128, 129, 168, 255, 256), sizes),
        *(
            (name, rng.randint(1, 32), rng.randint(1, 255), rng.randint(0, 230 << 10))
            for _ in range(2000)
            for name in CUDA
        ),
    ]
    asked = "".join(
        f"{CUDA[name].arch // 10} {CUDA[name].arch % 10} {CUDA[name].warps} {CUDA[name].shared} "
        f"{CUDA[name].block_shared} {CUDA[name].reserved} {32 * warps} {registers} {shared}\n"
        for name, warps, registers, shared in grid
    )
    said = subprocess.run([str(tmp_path / "oracle")], input=asked, capture_output=True, text=True, check=True).stdout
    answers = [int(line) for line in said.split()]
    assert len(answers) == len(grid) and len(set(answers)) > 15
    for (name, warps, registers, shared), blocks in zip(grid, answers):
        found = resident_blocks(CUDA[name], registers, shared, warps)
        assert found == blocks, (name, warps, registers, shared)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR6][R24.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR6][R24.64] ;
        /*0030*/              @!UP0 LDGSTS.E.BYPASS.LTC128B.128 [R43], desc[UR28][R30.64], P5 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   FFMA.FTZ R1, R2, R3, R4 ;
        /*0060*/                   FADD2 R1, R2, R3 ;
        /*0070*/                   IADD3.X R1, R2, R3 ;
        /*0080*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0090*/                   LDSM.16.M88.4 R4, [R5] ;
        /*00a0*/              @!P0 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_1:
        /*00c0*/                   BRA `(.L_x_1);
        /*00d0*/                   NOP;
"""


def test_instructions_by_class():
    words = machine_code.cuda_instructions(SASS)
    assert [machine_code.cuda_class(word) for word in words] == [
        "other", "LDG.128", "LDG.16", "LDGSTS.128", "HGMMA", "FP32 fma", "FP32 add", "integer", "UTMALDG", "LDSM.128",
        "other", "other", "other",
    ]  # fmt: skip
    amd = ["global_load_dwordx4", "buffer_store_short", "ds_read2_b64", "v_mfma_f32_32x32x8_bf16_1k", "v_pk_fma_f32",
           "v_add_f32_dpp", "v_exp_f32_e32", "s_barrier", "v_lshlrev_b32_e32", "v_mov_b32_e32"]  # fmt: skip
    assert [machine_code.amd_class(word) for word in amd] == [
        "global_load.128", "buffer_store.16", "ds_read.128", "MFMA", "FP32 fma", "SHFL", "MUFU", "BAR", "integer",
        "other",
    ]  # fmt: skip
    rdna = ["global_load_b128", "global_store_d16_hi_b16", "ds_load_2addr_b64", "ds_store_b32", "global_load_u8",
            "v_wmma_f32_16x16x16_f16", "v_swmmac_f32_16x16x32_bf16", "v_dual_fmac_f32", "v_dual_add_f32",
            "v_permlanex16_b32", "s_barrier_signal", "v_dual_lshlrev_b32", "s_wait_loadcnt",
            "v_fma_mixlo_f16"]  # fmt: skip
    assert [machine_code.amd_class(word) for word in rdna] == [
        "global_load.128", "global_store.16", "ds_load.128", "ds_store.32", "global_load.8", "WMMA", "SWMMAC",
        "FP32 fma", "FP32 add", "SHFL", "BAR", "integer", "other", "FP32 fma",
    ]  # fmt: skip


RDNA = """
	s_clause 0x1
	global_load_b128 v[0:3], v4, s[2:3]
	s_delay_alu instid0(VALU_DEP_1)
	v_dual_mul_f32 v5, v0, v1 :: v_dual_mul_f32 v6, v2, v3
	v_wmma_f32_16x16x16_f16 v[8:15], v[16:23], v[24:31], v[8:15]
	global_store_b64 v4, v[5:6], s[2:3]
	s_endpgm
	.section	.rodata
    .vgpr_count:     32
"""


def test_rdna_issues_two_instructions_in_one_line():
    found = machine_code.read_amd(SimpleNamespace(asm={"amdgcn": RDNA}))
    assert found["mix"] == {"FP32 mul": 2, "global_load.128": 1, "WMMA": 1, "global_store.64": 1, "other": 1}
    assert (found["tensor_core"], found["registers"], found["access_bytes"]) == ("WMMA", 32, 16)


def test_a_loop_is_a_way_back_to_the_same_instruction():
    cuda = lambda text: machine_code.looped(text, *machine_code.CUDA_JUMPS)
    assert cuda(SASS)
    assert not cuda(SASS.replace("BRA `(.L_x_0)", "BRA `(.L_x_1)"))
    amd = lambda text: machine_code.looped(text, *machine_code.AMD_JUMPS)
    placed_before = (
        "\ts_branch .LBB0_2\n.LBB0_1:\n\ts_endpgm\n.LBB0_2:\n\tv_mov\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
    )
    assert not amd(placed_before)
    assert amd(placed_before.replace("\ts_endpgm\n.LBB0_2", "\tv_mov\n.LBB0_2"))


def test_one_launch_for_one_row_is_another_kernel_than_for_many():
    """Sizes of one are folded and odd sizes are not marked divisible, as at run time."""
    code = (
        "import torch; from kernels import OPS, targets\n"
        "for c in (dict(N=64, C=128), dict(N=1, C=128), dict(N=37, C=100)):\n"
        "    launch = targets.launches(OPS['rms_norm'], c, torch.bfloat16)[0]\n"
        "    name, signature, constants, attributes = targets.source(launch)\n"
        "    n = list(signature).index('N')\n"
        "    print(signature['N'], signature['x_ptr'], (n,) in attributes, (0,) in attributes)\n"
    )
    made = run("-c", code)
    assert made.stdout.split("\n")[:3] == ["i32 *bf16 True True", "constexpr *bf16 False True", "i32 *bf16 False True"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("compile", "--op=softmax"), "--op names 'softmax'; the ops with a Triton kernel are rms_norm"),
        pytest.param(("compile", "--target="), "''; the targets are sm_75", marks=pytest.mark.slow),
        pytest.param(("compile", "--target=sm_70"), "'sm_70'; the targets are sm_75", marks=pytest.mark.slow),
        pytest.param(("compile", "--shape=d99"), "--shape names 'd99'", marks=pytest.mark.slow),
        (("tune",), "tuning needs a CUDA device"),
    ],
)
def test_wrong_use_is_one_sentence(words, message):
    made = run("-m", "kernels", *words, CUDA_VISIBLE_DEVICES="")
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and message in made.stderr


def test_the_readme_is_of_these_kernels():
    """Generated by `python -m kernels readme`: every op with a kernel, every target."""
    text = (ROOT / "kernels" / "README.md").read_text()
    for name in [*tuned.ops(), *TARGETS]:
        assert f"| {name} |" in text, f"kernels/README.md does not have {name}; run python -m kernels readme"


@pytest.mark.slow
def test_the_symmetric_product_saves_what_it_says():
    from kernels.readme import symmetric_share

    assert symmetric_share(1536) <= 0.60
