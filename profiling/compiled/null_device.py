"""A CUDA device that needs no GPU: in torch's CPU wheel, for proving the program that will run on a card not here.

    python -m profiling.compiled.null_device [--card NAME] [--gpus N] [--compute] MODULE|SCRIPT arguments…

runs a module or script (Python or shell) on it; child processes have it too. `torch.cuda` answers like the named
card's, and fake tensors (torch's FakeTensorMode) on "cuda" have autograd, torch.compile and AOTAutograd. With
--compute, real tensors on "cuda" lie in host memory and the CPU's kernels work on them, Triton's are interpreted, and
torch.compile stops before Inductor. A script can also call `install(card, gpus, compute)` before it imports torch.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from nanochat.errors import UserError
from nanochat.files import base_dir
from profiling.compiled import null_bindings, null_ops
from profiling.compiled.null_cards import Machine, NullCard, card

SOURCE = Path(__file__).with_name("null_cuda.cpp")
SETTING = "NANOCHAT_NULL_DEVICE"  # of a Machine, inherited by child processes


def obstacle() -> str:
    """Why there can be no null device here; "" where there can."""
    if not shutil.which("g++"):
        return "the null device needs g++ to compile its library"
    if torch_version()[1]:
        return "the null device needs torch's CPU wheel; this torch is built for CUDA or ROCm"
    return ""


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("the null device needs torch: pip install torch")
    return Path(spec.origin).parent


def torch_version() -> tuple[str, str]:
    """(torch's version, the CUDA or ROCm version it is built for or ""), without importing torch."""
    namespace: dict[str, Any] = {}
    exec((torch_folder() / "version.py").read_text(), namespace)
    return namespace["__version__"], namespace["cuda"] or namespace["hip"] or ""


def library() -> Path:
    """The compiled library, built where it is not in the cache. Raises UserError where it cannot be built."""
    if reason := obstacle():
        raise UserError(reason)
    torch = torch_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + torch_version()[0].encode()).hexdigest()[:16]
    path = base_dir() / "null_device" / f"null_cuda.{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch}/include", str(SOURCE), "-o", str(part)]
        built = subprocess.run([*command, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
        if built.returncode:
            raise UserError(
                f"g++ cannot compile {SOURCE.name} against torch {torch_version()[0]}: {built.stderr[-800:]}"
            )
        os.replace(part, path)
    return path


def load(path: str) -> ctypes.CDLL:
    """Loads the library; torch must not be imported yet, because it looks for CUDA's hooks once, while it starts."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path or str(library()), mode=ctypes.RTLD_GLOBAL)


class _Hook:
    """Calls functions with a module right before and right after it is imported."""

    def __init__(self, name: str, after: Callable[[Any], None], before: Callable[[Any], None] = lambda module: None):
        self.name, self.after, self.before = name, after, before

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.name else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.before(module)
            run(module)
            self.after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(name: str = "", gpus: int = 0, compute: bool = False) -> Machine:
    """This process's torch, once imported, has `gpus` cards of this name. Without arguments: as the launcher said.

    Raises UserError where the library cannot be built, ValueError for a card that is not in null_cards.py.
    """
    if "torch" in sys.modules:
        raise RuntimeError("null_device.install() comes after `import torch`; it must come before")
    machine = Machine.of(os.environ.get(SETTING, ""))
    machine.card, machine.gpus = card(name or machine.card.name), gpus or machine.gpus
    machine.compute = compute or machine.compute
    os.environ[SETTING] = machine.setting
    if machine.compute:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["TORCH_DISABLE_NATIVE_JIT"] = "1"  # torch's own Triton kernels for CUDA
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # not that kernels are registered twice
    loaded: list[ctypes.CDLL] = []
    hooks = [  # nothing is loaded before torch is imported: most Python processes never do
        _Hook("torch", lambda torch: None, before=lambda torch: loaded.append(load(machine.library))),
        _Hook("torch._C", lambda c: null_bindings.put_on(c, loaded[0], machine)),
        _Hook("torch.cuda", lambda cuda: _properties(cuda, machine)),
        _Hook("torch.version", lambda version: _version(version, machine.card)),
        _Hook("torch._subclasses.fake_tensor", lambda module: setattr(module, "init_gpu_context", lambda device: None)),
        _Hook("triton.runtime.driver", lambda module: module.driver.set_active(_driver(machine))),
    ]
    if machine.compute:
        hooks[0].after = lambda torch: null_ops.register(torch, loaded[0])
        hooks.append(_Hook("torch.distributed.distributed_c10d", lambda c10d: null_ops.gloo_for_nccl(c10d, loaded[0])))
        hooks.append(_Hook("torch.profiler.profiler", null_ops.profile_the_host))
        hooks.append(_Hook("triton.runtime.interpreter", null_ops.interpret_in_one_thread))
    sys.meta_path[:0] = hooks  # type: ignore[assignment]
    global _machine
    _machine = machine
    return machine


_machine: Machine | None = None


def become(name: str, gpus: int = 1) -> None:
    """From now on the device of this process is another card: for what asks torch anew each time, like a plan."""
    import torch

    if _machine is None:
        raise RuntimeError("null_device.become() comes before install()")
    _machine.card, _machine.gpus = card(name), gpus
    os.environ[SETTING] = _machine.setting
    torch.cuda._cached_device_count = None  # type: ignore[attr-defined]
    _version(torch.version, _machine.card)


def _properties(cuda: Any, machine: Machine) -> None:
    cuda._get_device_properties = lambda index: machine.card.properties(index)


def _version(module: Any, of: NullCard) -> None:
    module.cuda, module.hip = (None, "7.2.53211") if of.arch else ("13.0", None)


def _driver(machine: Machine) -> Any:
    """What Triton asks an active driver: enough to compile, not to launch."""
    from triton.backends.compiler import GPUTarget

    def target() -> Any:
        of = machine.card
        return GPUTarget("hip", of.target, of.warp) if of.arch else GPUTarget("cuda", int(of.target[3:]), of.warp)

    def torch_cuda() -> Any:
        import torch

        return torch.cuda

    return SimpleNamespace(
        get_current_target=target,
        get_current_device=lambda: torch_cuda().current_device(),
        get_device_interface=torch_cuda,
        get_active_torch_device=lambda: f"cuda:{torch_cuda().current_device()}",
        get_current_stream=lambda device=None: 0,
        is_active=lambda: True,
    )


def environment(name: str, gpus: int = 1, compute: bool = False) -> dict[str, str]:
    """The environment in which every Python process has the null device. Raises UserError where there can be none."""
    here = Path(__file__).parent
    paths = [str(here / "site"), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    machine = Machine(card(name), gpus, compute, str(library()))
    others = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # all are visible
    return {**others, "PYTHONPATH": path, SETTING: machine.setting}


def main(arguments: list[str]) -> int:
    """Replaces this process by the program that is asked for, on the null device."""
    flags = {"--card": "h100", "--gpus": "1", "--compute": ""}
    while arguments and arguments[0] in flags:
        flag, *arguments = arguments
        flags[flag] = "yes" if flag == "--compute" else arguments.pop(0) if arguments else ""
    if not arguments or arguments[0].startswith("-") or flags["--gpus"] not in map(str, range(1, 65)):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    program = arguments[0]
    before = ["bash"] if program.endswith(".sh") else [sys.executable] + ([] if program.endswith(".py") else ["-m"])
    command = before + arguments
    os.execvpe(command[0], command, environment(flags["--card"], int(flags["--gpus"]), bool(flags["--compute"])))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
