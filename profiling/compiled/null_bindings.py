"""What torch's CUDA build has in C and its CPU wheel lacks: `torch._C._cuda_…`, in Python, for the null device.

torch's own Python layer (torch.cuda, its Stream, Event, CUDAGraph, graph) stands on these names, so it runs unchanged.
Everything a call would do on a GPU has already happened when it returns. `used` notes what was asked of which device.
"""

import ctypes
import sys
import time
import warnings
from types import ModuleType
from typing import Any

from profiling.compiled.null_cards import Machine

CUDA = 1  # c10::DeviceType::CUDA
BUILT = {"cuda": "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "hip": "gfx90a gfx942 gfx950"}  # what a wheel has code for
used: list[tuple[str, int]] = []  # ("capture", 1): what was done, and the device it was done on


def put_on(c: ModuleType, library: ctypes.CDLL, machine: Machine) -> None:
    """Adds the names to torch._C, before anything of torch looks at them."""
    library.null_current_stream.restype = library.null_new_stream.restype = ctypes.c_int64
    library.null_memory.restype = ctypes.c_int64
    library.null_set_stream.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.null_set_device_count(machine.gpus)

    def init() -> None:
        import torch

        library.null_give_default_generators(True)
        try:
            made = tuple(torch.Generator(device=f"cuda:{index}") for index in range(machine.gpus))
        finally:
            library.null_give_default_generators(False)
        torch.cuda.default_generators = made  # type: ignore[assignment]

    def set_device(index: int) -> None:
        if not 0 <= index < machine.gpus:
            raise c.AcceleratorError("CUDA error: invalid device ordinal")
        library.null_set_device(index)

    def exchange_device(index: int) -> int:
        before = library.null_current_device()
        if index < 0:
            return -1
        set_device(index)
        return before

    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        set_device(device_index)
        library.null_set_stream(device_index, stream_id)

    def current_stream(index: int) -> tuple[int, int, int]:
        return library.null_current_stream(index), index, CUDA

    class StreamBase:
        """torch._C._CudaStreamBase: an id and a device."""

        stream_id: int
        device_index: int
        device_type: int
        priority: int

        def __new__(cls, priority: int = 0, stream_id: int = 0, device_index: int = 0, device_type: int = 0, **_: Any):
            stream = super().__new__(cls)
            known = bool(device_type)
            stream.device_index = device_index if known else library.null_current_device()
            stream.stream_id = stream_id if known else library.null_new_stream()
            stream.device_type, stream.priority = CUDA, priority
            return stream

        def __init__(self, *_: Any, **__: Any):
            pass

        @property
        def device(self):
            import torch

            return torch.device("cuda", self.device_index)

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        def query(self) -> bool:
            library.null_wait()
            return True

        def synchronize(self) -> None:
            waits("synchronize")
            used.append(("stream synchronize", self.device_index))

        def __eq__(self, other: object) -> bool:
            mine = (self.stream_id, self.device_index)
            return mine == (getattr(other, "stream_id", None), getattr(other, "device_index", None))

        def __hash__(self) -> int:
            return hash((self.stream_id, self.device_index))

        def __enter__(self):
            self.before = current_stream(self.device_index), library.null_current_device()
            set_stream(self.stream_id, self.device_index, CUDA)

        def __exit__(self, *_: Any) -> None:
            (stream_id, index, _type), device = self.before
            set_stream(stream_id, index, CUDA)
            library.null_set_device(device)

    class EventBase:
        """torch._C._CudaEventBase: the time of its recording."""

        timing: bool
        time: float | None
        device_index: int

        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
            event = super().__new__(cls)
            event.timing, event.time, event.device_index = enable_timing, None, library.null_current_device()
            return event

        def __init__(self, *_: Any, **__: Any):
            pass

        def record(self, stream: Any) -> None:
            self.time, self.device_index = time.perf_counter(), stream.device_index
            used.append(("event record", stream.device_index))

        def wait(self, stream: Any) -> None:
            used.append(("event wait", stream.device_index))

        def query(self) -> bool:
            library.null_wait()
            return True

        def synchronize(self) -> None:
            waits("synchronize")
            used.append(("event synchronize", self.device_index))

        def elapsed_time(self, end: Any) -> float:
            if not (self.timing and end.timing):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            if self.time is None or end.time is None:
                raise ValueError("Both events must be recorded before calculating elapsed time.")
            return 1e3 * (end.time - self.time)

    class Graph:
        """torch._C._CUDAGraph: the device of the stream that it captured on."""

        device_index: int
        recording: Any

        def __new__(cls, keep_graph: bool = False):
            return super().__new__(cls)

        def __init__(self, *_: Any, **__: Any):
            pass

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            from profiling.compiled.null_graph import Recording

            self.device_index = library.null_current_device()
            if library.null_current_stream(self.device_index) == 0:
                raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
            used.append(("capture", self.device_index))
            self.recording = Recording(self.device_index)
            self.recording.begin()

        def capture_end(self) -> None:
            self.recording.end()
            if not self.recording.calls:
                warnings.warn("The CUDA Graph is empty.", stacklevel=3)

        def replay(self) -> None:
            used.append(("replay", self.device_index))
            self.recording.replay()

        def reset(self) -> None:
            pass

        def pool(self) -> tuple[int, int]:
            return (0, id(self))

    def capturing() -> Any:
        graph = sys.modules.get("profiling.compiled.null_graph")
        return graph.current() if graph else None

    def waits(what: str) -> None:
        """The host waits for the device."""
        if capturing():
            sys.modules["profiling.compiled.null_graph"].refuse_waiting(what)
        library.null_wait()

    def memory(index: int) -> dict[str, Any]:
        now, peak, count = (library.null_memory(index, what) for what in range(3))
        bytes_ = {"all": dict(current=now, peak=peak, allocated=peak, freed=peak - now)}
        names = ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes")
        return dict({name: bytes_ for name in names}, num_ooms=0, num_alloc_retries=0, num_device_alloc=count)

    def memory_left(index: int) -> tuple[int, int]:
        total = machine.card.memory
        return total - library.null_memory(index, 0), total

    def synchronize() -> None:
        waits("synchronize")
        used.append(("synchronize", library.null_current_device()))

    cudart = ModuleType("torch._C._cudart")
    cudart.cudaMemGetInfo = memory_left  # type: ignore[attr-defined]
    names = dict(
        _has_cuda=True,
        _cudart=cudart,
        _cuda_memoryStats=memory,
        _cuda_resetPeakMemoryStats=lambda index: library.null_reset_peak(index),
        _cuda_resetAccumulatedMemoryStats=lambda index: None,
        _cuda_init=init,
        _cuda_getDeviceCount=lambda: machine.gpus,
        _cuda_getDevice=lambda: library.null_current_device(),
        _cuda_setDevice=set_device,
        _cuda_exchangeDevice=exchange_device,
        _cuda_maybeExchangeDevice=lambda index: exchange_device(index),  # Dynamo wants two functions
        _cuda_isInBadFork=lambda: False,
        _cuda_synchronize=synchronize,
        _cuda_getArchFlags=lambda: BUILT["hip" if machine.card.arch else "cuda"],
        _cuda_canDeviceAccessPeer=lambda a, b: True,
        _cuda_getCurrentStream=current_stream,
        _cuda_getDefaultStream=lambda index: (0, index, CUDA),
        _cuda_getCurrentRawStream=lambda index: library.null_current_stream(index),
        _cuda_setStream=set_stream,
        _cuda_sleep=lambda cycles: None,
        _cuda_isCurrentStreamCapturing=lambda: capturing() is not None,
        _cuda_emptyCache=lambda: None,
        _host_emptyCache=lambda: None,
        _CudaStreamBase=StreamBase,
        _CudaEventBase=EventBase,
        _cuda_CUDAAllocator_AllocatorState=object,
        _set_cached_tensors_enabled=lambda enabled: None,
        _CUDAGraph=Graph,
        _graph_pool_handle=lambda: (0, 1),
    )
    for name, value in names.items():
        setattr(c, name, value)
