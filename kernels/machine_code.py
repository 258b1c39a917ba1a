"""Reading machine code: registers, spills, how wide memory is accessed, and how many instructions of which class.

CUDA cubins are read with the disassembler in Triton's wheel, AMD kernels from the compiler's assembly text. Counts are
of instructions as written: one in a loop counts once, and `looped` says that there is a loop.
"""

import hashlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .triton_utils import triton


def tool(name: str) -> str:
    """Path of a CUDA binary tool out of Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


# A cubin is an ELF file (64 bits, little endian). The disassembler takes half a second to start, so it is given several
# kernels as one file: of each only the sections of its code, with a symbol each. That is for reading; none could run.
HEADER, SECTION, SYMBOL = "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ", "<IBBHQQ"
CODE, SYMBOLS, STRINGS = 1, 2, 3  # types of sections
REGISTERS = 0xFF << 24  # of a code section's `info`, whose low bits are its symbol's number


def code(cubin: bytes) -> tuple[tuple, list[tuple[int, int, bytes]]]:
    """The ELF header's fields, and (flags, info, bytes) of each section of code."""
    header = struct.unpack_from(HEADER, cubin)
    start, size, count, names = header[6], header[11], header[12], header[13]
    rows = [struct.unpack_from(SECTION, cubin, start + size * i) for i in range(count)]
    found = []
    for name, _, flags, _, offset, length, _, info, _, _ in rows:
        if cubin.startswith(b".text.", rows[names][4] + name):
            found.append((flags, info, cubin[offset : offset + length]))
    return header, found


def merged(cubins: list[bytes]) -> bytes:
    """One ELF file of one architecture's kernels: the code of the i-th of them is in `.text.i`."""
    parts = [code(cubin) for cubin in cubins]
    bodies = [(f"{i}".encode(), *section) for i, (_, sections) in enumerate(parts) for section in sections]
    strings = b"\0" + b"".join(name + b"\0" for name, *_ in bodies)
    symbols = bytes(struct.calcsize(SYMBOL))
    for i, (name, _, _, body) in enumerate(bodies, 1):
        global_function, entry = 0x12, 0x10
        symbols += struct.pack(SYMBOL, strings.index(b"\0" + name + b"\0") + 1, global_function, entry, i, 0, len(body))
    out, names = bytearray(struct.calcsize(HEADER)), bytearray(b"\0")
    rows = [bytes(struct.calcsize(SECTION))]

    def add(name: bytes, kind: int, body: bytes, flags: int = 0, link: int = 0, info: int = 0, entry: int = 0) -> None:
        out.extend(bytes(-len(out) % 128))
        rows.append(struct.pack(SECTION, len(names), kind, flags, 0, len(out), len(body), link, info, 128, entry))
        names.extend(name + b"\0")
        out.extend(body)

    table = len(bodies) + 1  # number of the section of symbols
    for i, (name, flags, info, body) in enumerate(bodies, 1):
        add(b".text." + name, CODE, body, flags, table, info & REGISTERS | i)
    add(b".symtab", SYMBOLS, symbols, link=table + 1, info=1, entry=struct.calcsize(SYMBOL))
    add(b".strtab", STRINGS, strings)
    add(b".shstrtab", STRINGS, bytes(names) + b".shstrtab\0")
    header = list(parts[0][0])
    header[5], header[6] = 0, len(out)  # no program headers; where the sections' rows are
    header[10], header[12], header[13] = 0, len(rows), len(rows) - 1
    struct.pack_into(HEADER, out, 0, *header)
    return bytes(out) + b"".join(rows)


_TEXTS: dict[bytes, str] = {}  # disassembled ahead, by a cubin's digest


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def disassemble(cubins: list[bytes]) -> None:
    """Those of one architecture at once, ahead of `read_cuda`: many in hardly more time than one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(merged(cubins))
        file.flush()
        try:
            text = run(tool("nvdisasm"), "-c", file.name)
        except subprocess.CalledProcessError:
            return  # each is read alone
    parts = re.split(r"^//-+ \.text\.(\d+) +-+$", text, flags=re.MULTILINE)
    found: dict[int, str] = {}
    for number, part in zip(map(int, parts[1::2]), parts[2::2]):
        found[number] = found.get(number, "") + part
    _TEXTS.update((hashlib.sha256(cubins[number]).digest(), part) for number, part in found.items())


def sass(cubin: bytes) -> tuple[str, str]:
    """(disassembly, resource usage) of a cubin."""
    digest = hashlib.sha256(cubin).digest()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _TEXTS.pop(digest, "") or run(tool("nvdisasm"), "-c", file.name)
        return text, run(tool("cuobjdump"), "--dump-resource-usage", file.name)


# Classes of instructions, the first that fits; memory's have their width in bits behind them (LDG.128). What fits none
# is "other": moves, branches, waiting.
CUDA_CLASSES = {
    r"(LDGSTS|LDG|STG|LDSM|LDS|STSM|STS)\b.*": "memory",
    r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP|HGMMA|QGMMA|UTCHMMA|UTCQMMA|HMMA|QMMA|IMMA|DMMA)\b.*": "",  # by their own names
    r"(RED|ATOM|ATOMG|ATOMS|REDG)\b.*": "atomic",
    r"MUFU.*": "MUFU",
    r"SHFL.*": "SHFL",
    r"BAR\b.*": "BAR",
    r"FFMA.*": "FP32 fma",
    r"FADD.*": "FP32 add",
    r"FMUL.*": "FP32 mul",
    r"(F2F|F2FP|F2I|I2F|I2FP)\b.*": "convert",
    r"U?(IADD|IMAD|VIADD|LOP3|SHF|LEA|ISETP|IMNMX|VIMNMX|IABS|SGXT|PRMT|BMSK|POPC|FLO)\w*\b.*": "integer",
}
AMD_CLASSES = {
    r"(?:global|buffer|flat)_(?:load|store)_.*": "memory",
    r"ds_(?:read|write|load|store)\w*": "memory",
    r"v_(mfma|wmma|swmmac)_.*": "",
    r"(?:global|buffer|flat|ds)_(?:atomic|add|max|min).*": "atomic",
    r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f.*": "MUFU",
    r"ds_(?:bpermute|swizzle).*|v_permlane.*|v_\w+_dpp": "SHFL",
    r"s_barrier(?:_signal)?": "BAR",
    r"v_(?:pk_|dual_)?(?:fma|fmac|fmaak|fmamk|mad|mac)_f32.*|v_(?:fma|mad)_mix.*": "FP32 fma",  # mix: of 16-bit values
    r"v_(?:pk_|dual_)?(?:add|sub)_f32.*": "FP32 add",
    r"v_(?:pk_|dual_)?mul_f32.*": "FP32 mul",
    r"v_cvt_.*": "convert",
    r"[vs]_(?:\w+_)?(?:add|sub|mul|mad|lsh|ash|and|or|xor|bfe|bfi|perm|min|max|cmp|abs|not)\w*_?[iub]\d+.*": "integer",
}
CUDA_WIDTHS = {"128": 16, "256": 32, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12, "b64": 8, "b32": 4,
              "short": 2, "byte": 1, "u8": 1, "i8": 1, "b8": 1, "16": 2}  # fmt: skip

AMD_HINTS = ("s_delay_alu", "s_clause", "s_code_end")


def cuda_instructions(text: str) -> list[str]:
    """Mnemonics with their modifiers (LDG.E.128), in order, without what predicates them and without padding."""
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    return [word for word in words if word != "NOP"]


def cuda_class(word: str) -> str:
    kind, found = classify(word, CUDA_CLASSES)
    if kind != "memory":
        return kind or found
    if found in ("LDSM", "STSM"):  # .M88.4: four matrices of 8x8 two-byte values, 16 bytes a thread
        return f"{found}.{32 * int(word[-1]) if word[-1].isdigit() else 32}"
    return f"{found}.{8 * cuda_width(word)}"


def cuda_width(word: str) -> int:
    """Bytes that a thread moves by this instruction."""
    return next((CUDA_WIDTHS[part] for part in word.split(".") if part in CUDA_WIDTHS), 4)


def amd_class(word: str) -> str:
    kind, found = classify(word, AMD_CLASSES)
    if kind != "memory":
        return kind or found.upper()
    accesses = 2 if re.match(r"ds_(read2|write2|(load|store)_2addr)", word) else 1
    return f"{'_'.join(re.findall(r'^[a-z]+|load|store|read|write', word))}.{8 * accesses * amd_width(word)}"


def amd_width(word: str) -> int:
    return next((width for part, width in AMD_WIDTHS.items() if part in word), 4)


def classify(word: str, classes: dict[str, str]) -> tuple[str, str]:
    """(class or "" for an instruction that is one of its own, the part of its name in parentheses)."""
    for pattern, kind in classes.items():
        if match := re.fullmatch(pattern, word):
            return kind, match[1] if match.re.groups else word
    return "other", word


# How a jump is written, with its label in parentheses, and what never goes on to the next line.
CUDA_JUMPS = (r"\bBRA\b.*`\((\.L\w+)\)", r"\*/\s+(BRA|EXIT|RET)\b")
AMD_JUMPS = (r"\bs_c?branch\w*\s+(\.L\w+)", r"^\s+s_(branch|endpgm)\b")


def looped(text: str, branch: str, no_return: str) -> bool:
    """Whether an instruction can be reached again from itself, but for the endless loop that ends a kernel's code."""
    lines = [line for line in text.split("\n") if line.strip()]
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L\w+):", line))}
    jumps = {at: labels.get(match[1], at) for at, line in enumerate(lines) if (match := re.search(branch, line))}

    def after(at: int) -> list[int]:
        falls = at + 1 < len(lines) and not re.search(no_return, lines[at])
        return ([at + 1] if falls else []) + ([jumps[at]] if at in jumps else [])

    for start, back in jumps.items():
        if back >= start - 1:  # forward, or to the label just above it
            continue
        seen, left = {back}, [back]
        while left:
            new = [at for at in after(left.pop()) if at not in seen]
            seen.update(new)
            left += new
        if start in seen:
            return True
    return False


def read_cuda(made: Any) -> dict[str, Any]:
    """Registers, memory accesses and instructions of a compiled CUDA kernel."""
    text, usage = sass(made.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    words = cuda_instructions(text)
    moved: dict[str, Counter[int]] = dict(load=Counter(), store=Counter())
    for word in words:
        if (name := word.split(".")[0]) in ("LDGSTS", "LDG", "STG"):
            moved["store" if name == "STG" else "load"][cuda_width(word)] += cuda_width(word)
    units = [word for word in words if re.match(r"(HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA|QMMA)\b", word)]
    return dict(
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        spill_bytes=resources["STACK"] + resources.get("LOCAL", 0),
        access_bytes=usual_width(moved),
        load_bytes=moved["load"].total(),  # by one thread, as written: a loop counts once
        tensor_core=units[0].split(".")[0] if units else "",
        tf32=".TF32" in text,
        float64_instructions=len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP|MMA)\b|\.F64\b|\bMUFU\.\w*64\w*", text)),
        mix=dict(Counter(map(cuda_class, words)).most_common()),
        looped=looped(text, *CUDA_JUMPS),
    )


def read_amd(made: Any) -> dict[str, Any]:
    """The same of a compiled AMD kernel, from its assembly text."""
    text = made.asm["amdgcn"]
    code = text.split(".section")[0]
    number = lambda key: int(m[1]) if (m := re.search(rf"\.{key}:\s+(\d+)", text)) else 0
    # RDNA writes two instructions that issue together in one line, and hints to the scheduler as instructions.
    words = re.findall(r"(?:^\s+|:: )((?:v|s|ds|global|buffer|flat)_\w+)", code, flags=re.MULTILINE)
    words = [word for word in words if word not in AMD_HINTS]
    moved: dict[str, Counter[int]] = dict(load=Counter(), store=Counter())
    for word in words:
        if match := re.match(r"(?:global|buffer)_(load|store)_", word):
            moved[match[1]][amd_width(word)] += amd_width(word)
    units = [unit for unit in map(amd_class, words) if unit in ("MFMA", "WMMA", "SWMMAC")]
    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return dict(
        registers=number("vgpr_count"),
        stack_bytes=number("private_segment_fixed_size"),
        spill_bytes=spilled or number("private_segment_fixed_size"),
        access_bytes=usual_width(moved),
        load_bytes=moved["load"].total(),  # by one thread, as written: a loop counts once
        tensor_core=units[0] if units else "",
        tf32=any("xf32" in word for word in words),
        float64_instructions=sum(bool(re.match(r"v_\w+_f64", word)) for word in words),
        mix=dict(Counter(map(amd_class, words)).most_common()),
        looped=looped(code, *AMD_JUMPS),
    )


def usual_width(moved: dict[str, Counter[int]]) -> int:
    """Bytes of the access through which most data flows, loads or stores, whichever is narrower.

    Fewer than four narrow accesses of a width are no stream but scalars, or a sum per row: a tile whose accesses are
    narrow takes many.
    """
    streams = [{w: total for w, total in count.items() if w >= 16 or total >= 4 * w} for count in moved.values()]
    return min((max(stream, key=lambda width: stream[width]) for stream in streams if stream), default=0)
