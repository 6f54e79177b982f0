"""Pinned host memory as an operand of device kernels, without a copy.

A GPU reads pinned host memory at its host address (unified addressing). JAX keeps such arrays in a memory space of their
own that its operations do not mix with device arrays, so the same bytes are handed to it once more, as a device array over
the same address, through DLPack. On one H200 a gather of 2 to 16 KB rows through such a view moves 47 GB/s; the runtime's
own copies move 46 to 51 GB/s (docs/results_offload.md).
"""

from __future__ import annotations

import atexit
import ctypes
import math
from typing import Any

import jax

_CUDA = 2  # DLPack's device type; pinned memory is addressable on every CUDA device
_UINT = 1  # DLPack's type code


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]
_OWNERS: dict[int, tuple[Any, ...]] = {}  # address of a live `_Managed` -> what it points to


def _release(managed: Any) -> None:
    _OWNERS.pop(ctypes.addressof(managed.contents), None)


_RELEASE = _Deleter(_release)


@atexit.register
def _leave_to_the_system() -> None:
    """From here on views may outlive the interpreter, which could not run `_release`: they call a C function instead."""
    nothing = ctypes.cast(ctypes.CDLL(None).abs, _Deleter)
    for managed, *_ in _OWNERS.values():
        managed.deleter = nothing


class _View:
    """The DLPack exporter of a pinned array."""

    def __init__(self, array: jax.Array, device: int) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self.device

    def __dlpack__(self, **_: Any) -> Any:
        shape = self.array.shape
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        strides = (ctypes.c_int64 * len(shape))(*(math.prod(shape[n + 1 :]) for n in range(len(shape))))
        kind = _DataType(_UINT, 8 * self.array.dtype.itemsize, 1)
        address = self.array.unsafe_buffer_pointer()
        tensor = _Tensor(address, _Device(_CUDA, self.device), len(shape), kind, sizes, strides, 0)
        managed = _Managed(tensor, None, _RELEASE)
        _OWNERS[ctypes.addressof(managed)] = (managed, sizes, strides, self.array)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(managed), b"dltensor", None)


def device_view(array: jax.Array) -> jax.Array:
    """A pinned array as a device array of unsigned integers of the same width, over the same bytes; read only.

    Arrays that are not in pinned memory (a CPU's) are returned as they are. The pinned array lives as long as the view.
    """
    if array.sharding.memory_kind != "pinned_host" or jax.default_backend() == "cpu":
        return array
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"offload: kernels on {jax.default_backend()} cannot read host memory; use a GPU or a CPU"
        )
    (device,) = array.sharding.device_set
    array.block_until_ready()
    return jax.dlpack.from_dlpack(_View(array, device.local_hardware_id or 0))
