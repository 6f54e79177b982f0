"""The instructions that the fetch kernel uses, on Python integers: one thread at a time, every copy at the last moment allowed.

A load's bytes arrive when its barrier is waited for, and a store reads its slot when it must have (`bulk_wait`): a slot that is
asked for again too early, or waited for in the wrong phase, shows as wrong bytes or as an error here.
"""

from __future__ import annotations

import numpy as np


class Int(int):
    """An integer register."""

    def equals(self, other):
        return int(self) == int(other)


def _operator(name):
    def method(self, other):
        return Int(getattr(int, name)(self, int(other)))

    return method


for _name in [
    "add",
    "sub",
    "mul",
    "floordiv",
    "mod",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "radd",
    "rmul",
    "rsub",
]:
    setattr(Int, f"__{_name}__", _operator(f"__{_name}__"))


class Machine:
    """Memory of one thread: global arrays at addresses of their own, shared memory from 0."""

    def __init__(self, thread: int, shared: int) -> None:
        self.thread, self.shared = thread, np.zeros(shared, np.uint8)
        self.arrays, self.barriers, self.loads, self.stores = [], {}, {}, []
        self.bases = {}

    def thread_index(self):
        return Int(self.thread)

    def global_address(self, array):
        self.arrays.append(array)
        return Int(len(self.arrays) << 40)

    def smem_address(self, offset):
        return Int(offset)

    def _global(self, address, size):
        flat = self.arrays[(address >> 40) - 1].reshape(-1).view(np.uint8)
        at = address & ((1 << 40) - 1)
        assert at % 16 == 0 or size == 4, at
        assert at + size <= flat.size, (at, size, flat.size)
        return flat[at : at + size]

    def load(self, address):
        return [Int(self._global(address, 4).view(np.int32)[0])]

    def barrier_init(self, barrier):
        self.barriers[int(barrier)] = 0

    def fence_barrier_init(self):
        pass

    def bulk_load(self, to, source, size, barrier):
        assert int(barrier) not in self.loads, "two loads of one phase"
        assert all(slot != to for slot, *_ in self.stores), "a slot is filled while it is being stored"
        self._global(source, size)
        self.loads[int(barrier)] = (to, source, size)

    def barrier_wait(self, barrier, parity):
        assert self.barriers[int(barrier)] % 2 == parity, "the phase is over, or not begun"
        to, source, size = self.loads.pop(int(barrier))
        self.shared[to : to + size] = self._global(source, size)
        self.barriers[int(barrier)] += 1

    def bulk_store(self, to, source, size):
        self.stores.append((source, to, size))

    def bulk_wait(self):
        while self.stores:
            source, to, size = self.stores.pop(0)
            self._global(to, size)[:] = self.shared[source : source + size]

    def if_(self, bit, then, otherwise=()):
        return then() if bit else list(otherwise)

    def for_(self, start, stop, step, body, carry):
        for i in range(start, stop, step):
            carry = body(Int(i), carry)
        return carry

    @staticmethod
    def select(bit, a, b):
        return Int(a if bit else b)

    i32 = wide = scalar = staticmethod(Int)
