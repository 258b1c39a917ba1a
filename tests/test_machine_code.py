"""What the kernels become on cards that are not here: compiled in processes that do not interpret, and read."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import machine_code, triton_utils, tuned
from kernels.targets import ALL_TARGETS, NO_FLOAT16, TARGETS, occupancy, resident_blocks

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


def check(rows, code, targets, dtype="bfloat16"):
    wrong = {(row["kernel"], row["op"], row["target"], row["shape"]): row["faults"] for row in rows if row["faults"]}
    assert not wrong and code == 0
    assert {row["op"] for row in rows} == set(tuned.ops()) - set(NO_FLOAT16 if dtype == "float16" else ())
    assert {row["target"] for row in rows} == set(targets)
    for row in rows:
        assert 16 <= row["registers"] <= 512 and 0 < row["occupancy"] <= 1, row
        mix = row["mix"]
        assert sum(mix.values()) > 20 and mix.get("integer", 0) > 0 and mix["other"] < 0.6 * sum(mix.values()), row
        assert row["tensor_core"] in (*mix, "", "none needed"), row
        if "symmetric" in row["kernel"]:
            assert row["tensor_core"]


def test_every_kernel_keeps_its_promises_on_two_cards():
    check(*report("--target=sm_80,sm_90"), ("sm_80", "sm_90"))


def test_a_prompts_attention_uses_matrix_units_and_does_not_spill():
    rows, code = report("--op=flash_attention_decode", "--shape=prompt", "--target=sm_80,sm_90")
    assert code == 0 and [(row["kernel"], row["faults"]) for row in rows] == [("_prefill_kernel", [])] * 2
    assert rows[1]["tensor_core"] == "HGMMA"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", ["d12", "d24", "d32"])
def test_every_kernel_keeps_its_promises_everywhere(shape, dtype):
    rows, code = report(f"--shape={shape}", f"--dtype={dtype}")
    if dtype == "float32":  # IEEE products have no tensor cores
        rows = [dict(row, tensor_core=row["tensor_core"] or "none needed") for row in rows]
    check(rows, code, TARGETS, dtype)


def test_each_fault_is_found():
    made = run(str(ROOT / "tests" / "faulty_kernels.py"))
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout)
    assert found["good"] == found["ieee"] == found["tensor cores"] == []
    for name, words in {
        "float64": "float64 instructions", "narrow": "2 bytes at a time", "spills": "spills", "tf32": "TF32",
        "no tensor cores": "tensor cores: none", "does not compile": "nonsense",
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


CUDA = {name: target for name, target in ALL_TARGETS.items() if target.backend == "cuda"}


def test_blocks_at_known_points():
    assert [resident_blocks(CUDA[name], 40, 0, 4) for name in sorted(CUDA)] == [12] * 6
    order = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    assert [resident_blocks(CUDA[name], 64, 48 << 10, 8) for name in order] == [3, 2, 2, 4, 4, 2]


ORACLE = """
#include <cuda_occupancy.h>
#include <stdio.h>
int main(void) {
    int major, minor, warps, threads, registers; unsigned long per_sm, per_block, shared;
    while (scanf("%d %d %d %lu %lu %d %d %lu", &major, &minor, &warps, &per_sm, &per_block, &threads, &registers,
                 &shared) == 8) {
        struct cudaOccDeviceProp card = {0};
        card.computeMajor = major; card.computeMinor = minor; card.warpSize = 32; card.numSms = 1;
        card.maxThreadsPerBlock = 1024; card.maxThreadsPerMultiprocessor = 32 * warps;
        card.regsPerBlock = card.regsPerMultiprocessor = 65536;
        card.sharedMemPerBlock = 48 << 10; card.sharedMemPerBlockOptin = per_block;
        card.sharedMemPerMultiprocessor = per_sm; card.reservedSharedMemPerBlock = 1024;
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
    sizes = [0, 1, 127, 128, 1024, 48 << 10, *(kb << 10 for kb in (98, 99, 100, 163, 164, 226, 227, 228))]
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
        f"{CUDA[name].block_shared} {32 * warps} {registers} {shared}\n"
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
        "    print(signature['N'], signature['x_ptr'], (7,) in attributes, (0,) in attributes)\n"
    )
    made = run("-c", code)
    assert made.stdout.split("\n")[:3] == ["i32 *bf16 True True", "constexpr *bf16 False True", "i32 *bf16 False True"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("compile", "--op=softmax"), "--op names 'softmax'; the ops with a Triton kernel are rms_norm"),
        (("compile", "--target=sm_70"), "--target names 'sm_70'; the targets are sm_80"),
        (("compile", "--shape=d99"), "--shape is 'd99'"),
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
