"""The DLPack structure that hands pinned memory to a GPU, and who frees it."""

import ctypes

import numpy as np
import pytest

from kvjax.cache import pinned


class Pinned:
    """As much of a pinned jax.Array as an exporter looks at."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def unsafe_buffer_pointer(self):
        return self.array.ctypes.data


def structure(capsule):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(pinned._Managed))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_the_structure_describes_the_array(dtype):
    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    capsule = pinned._View(Pinned(x), 1).__dlpack__()
    tensor = structure(capsule).contents.tensor
    assert tensor.data == x.ctypes.data
    assert (tensor.device.type, tensor.device.id) == (2, 1)
    assert tensor.shape[:3] == [2, 3, 4] and tensor.strides[:3] == [12, 4, 1]
    assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (1, 8 * x.dtype.itemsize, 1)
    structure(capsule).contents.deleter(structure(capsule))


def test_the_array_lives_until_it_is_released_and_at_exit_for_good():
    """A view that outlives the interpreter must not call into it: that was a segmentation fault."""
    owned = set(pinned._OWNERS)
    first, second = (pinned._View(Pinned(np.zeros(4, np.float32)), 0).__dlpack__() for _ in range(2))
    assert len(pinned._OWNERS) == len(owned) + 2
    structure(first).contents.deleter(structure(first))
    assert len(pinned._OWNERS) == len(owned) + 1
    pinned._leave_to_the_system()
    structure(second).contents.deleter(structure(second))  # does nothing now
    (left,) = set(pinned._OWNERS) - owned
    assert left == ctypes.addressof(structure(second).contents)
    del pinned._OWNERS[left]
