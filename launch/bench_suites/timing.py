"""How the suites time a call, and the row they report."""

from __future__ import annotations

import gc
import glob
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]

_SPAN = 0.2  # seconds of work per measurement
_REPEATS = 3
_SHORT = 2e-3  # seconds of one call, the wait for it included
_CHAIN = 32


def own_name() -> str:
    """What `implementation=None` chooses here for the operands of the suites."""
    return {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(jax.default_backend(), "xla")


def measure(fn: Callable[..., Any], *args: Any) -> float:
    """Seconds per call: the median over runs of many calls.

    Calls of under a millisecond run as a dependent chain in one program, since the host needs some 50 us to
    issue a call; longer ones are issued one by one without waiting.
    """
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    if time.perf_counter() - start > _SHORT:
        return _median(lambda: fn(*args), jax.block_until_ready)

    @jax.jit
    def chain(args):
        def again(_, state):
            return jax.lax.optimization_barrier((state[0], fn(*state[0])))

        return jax.lax.fori_loop(1, _CHAIN, again, jax.lax.optimization_barrier((args, fn(*args))))[1]

    jax.block_until_ready(chain(args))
    return _median(lambda: chain(args), jax.block_until_ready) / _CHAIN


def device_spans(run: Callable[[], Any]) -> dict[str, list[float]]:
    """Microseconds of every kernel that a GPU executes during `run`, which must wait for its work, by name."""
    with tempfile.TemporaryDirectory() as where:
        with jax.profiler.trace(where):
            run()
        (path,) = glob.glob(f"{where}/**/*.xplane.pb", recursive=True)
        spans: dict[str, list[float]] = {}
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                if "GPU" in plane.name and "Stream" in line.name:
                    for event in line.events:
                        spans.setdefault(event.name, []).append(event.duration_ns / 1e3)
    return spans


def measure_torch(torch: Any, fn: Callable[[], Any]) -> float:
    """The same for a torch call on the GPU."""
    fn()
    torch.cuda.synchronize()
    return _median(fn, lambda _: torch.cuda.synchronize())


def _median(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    count = int(np.clip(_SPAN / max(once, 1e-6), 2, 200))
    spans = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        spans.append((time.perf_counter() - start) / count)
    return float(np.median(spans))


def row(
    name: str, shape: Sequence[int], dtype: Any, implementation: str, seconds: float,
    *, flops: float | None = None, moved: float | None = None,
) -> Row:  # fmt: skip
    """A row of `launch.bench`; `fraction_of_copy` is filled in by the command, which measures the copy."""
    return {
        "name": name,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype),
        "implementation": implementation,
        "us": seconds * 1e6,
        "gb_per_s": None if moved is None else moved / seconds / 1e9,
        "tflop_per_s": None if flops is None else flops / seconds / 1e12,
        "fraction_of_copy": None,
    }


def attempt(name: str, shape: Sequence[int], dtype: Any, implementation: str, work: Callable[[], Row]) -> Row:
    """The row of `work`, or where the device fails (its memory is too small, say) one with `error` and no times."""
    try:
        return work()
    except jax.errors.JaxRuntimeError as failure:
        lost = row(name, shape, dtype, implementation, float("nan"))
        return lost | {"us": None, "error": str(failure).splitlines()[0]}
    finally:
        gc.collect()  # the next row needs the memory


def torch_with_gpu() -> Any | None:
    """The torch module if it is installed and sees a GPU, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
