"""The instructions of `pallas_kernels.ptx` on numpy arrays: a warpgroup of 128 threads that runs in lockstep.

Enough for inline functions whose branches return nothing; memory is byte arrays, an address the place in one of them.
"""

import re

import numpy as np

THREADS = 128
_TYPES = {"f": np.float32, "r": np.uint32, "l": np.uint64}


class Reg:
    """A register of all threads."""

    def __init__(self, value, kind):
        self.value, self.kind = np.broadcast_to(np.asarray(value), (THREADS,)).astype(_TYPES[kind]), kind

    def _other(self, x):
        if isinstance(x, Reg):
            return x.value
        return const(x, self.kind).value

    def _signed(self, x):
        return (
            (self.value.view(np.int32), self._other(x).view(np.int32))
            if self.kind == "r"
            else (self.value, self._other(x))
        )

    def __add__(self, x):
        return Reg(self.value + self._other(x), self.kind)

    def __sub__(self, x):
        return Reg(self.value - self._other(x), self.kind)

    def __mul__(self, x):
        return Reg(self.value * self._other(x), self.kind)

    def __floordiv__(self, x):
        return Reg(self.value // self._other(x), self.kind)

    def __and__(self, x):
        return Reg(self.value & self._other(x), self.kind)

    def __lshift__(self, x):
        return Reg(self.value << self._other(x), self.kind)

    def __rshift__(self, x):
        return Reg(self.value >> self._other(x), self.kind)

    def __lt__(self, x):
        a, b = self._signed(x)
        return a < b

    def __gt__(self, x):
        a, b = self._signed(x)
        return a > b

    def equals(self, x):
        return self.value == self._other(x)


def const(x, kind):
    return Reg(np.float32(x) if kind == "f" else int(x) & (2**32 - 1), kind)


class Machine:
    """Stands for the module `ptx`: shared memory and one global array at a time, told apart by the address's kind."""

    Reg = Reg

    def __init__(self, shared_bytes):
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        self.memory, self.active = [], np.ones(THREADS, bool)

    def place(self, array):
        """Address of a new global array, whose bytes are shared with `array`."""
        self.memory.append(array.reshape(-1).view(np.uint8))
        return Reg(np.uint64(len(self.memory)) << np.uint64(40), "l")

    def _at(self, address, thread):
        where = int(address.value[thread])
        if address.kind == "r":
            return self.shared, where
        return self.memory[(where >> 40) - 1], where & (2**40 - 1)

    def _read(self, address, size, words, offset=0):
        out = np.zeros((words, THREADS), np.uint32)
        for t in np.flatnonzero(self.active):
            bank, at = self._at(address, t)
            at += offset
            assert at % (size * words) == 0 and at + size * words <= bank.size, (at, size, words, bank.size)
            raw = bank[at : at + size * words].reshape(words, size)
            out[:, t] = (raw.astype(np.uint32) << (8 * np.arange(size, dtype=np.uint32))).sum(
                -1, dtype=np.uint32
            )
        return [Reg(x, "r") for x in out]

    def _write(self, address, values, mask=True):
        for t in np.flatnonzero(self.active & mask):
            bank, at = self._at(address, t)
            raw = np.stack([self.as_bits(v).value[t] for v in values]).view(np.uint8)
            assert at % raw.size == 0 and at + raw.size <= bank.size
            bank[at : at + raw.size] = raw

    @staticmethod
    def f32(x):
        return const(x, "f")

    @staticmethod
    def i32(x):
        return const(x, "r")

    @staticmethod
    def select(bit, a, b):
        return Reg(np.where(bit, a.value, a._other(b)), a.kind)

    @staticmethod
    def both(*bits):
        return np.logical_and.reduce(bits)

    @staticmethod
    def maximum(a, b):
        return Reg(np.fmax(a.value, a._other(b)), "f")

    @staticmethod
    def fma(a, b, c):
        exact = a.value.astype(np.float64) * a._other(b).astype(np.float64) + a._other(c).astype(np.float64)
        return Reg(exact.astype(np.float32), "f")

    @staticmethod
    def ex2(x):
        return Reg(np.exp2(x.value), "f")

    @staticmethod
    def lg2(x):
        with np.errstate(divide="ignore"):
            return Reg(np.log2(x.value), "f")

    @staticmethod
    def prmt(a, b, selector):
        bits = (a._other(b).astype(np.uint64) << np.uint64(32)) | a.value.astype(np.uint64)
        out = np.zeros(THREADS, np.uint32)
        for i in range(4):
            pick = selector >> (4 * i) & 15
            assert pick < 8
            out |= ((bits >> np.uint64(8 * pick)) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
        return Reg(out, "r")

    @staticmethod
    def bits_to_float(x):
        return Reg(x.value.view(np.float32), "f")

    @staticmethod
    def as_bits(x):
        return x if x.kind == "r" else Reg(x.value.view(np.uint32), "r")

    @staticmethod
    def shuffle_xor(x, lanes):
        return Reg(x.value[np.arange(THREADS) ^ lanes], x.kind)

    @staticmethod
    def wide(x):
        return Reg(x.value.view(np.int32).astype(np.int64).view(np.uint64), "l")

    @staticmethod
    def thread_index():
        return Reg(np.arange(THREADS), "r")

    @staticmethod
    def scalar(x):
        return Reg(x, "r")

    def smem_address(self, offset):
        return Reg(offset, "r")

    def global_address(self, array):
        return self.place(array)

    def load(self, address, size=4, *, words=1):
        return self._read(address, size, words)

    def if_(self, bit, then):
        before, self.active = self.active, self.active & bit
        then()
        self.active = before

    def asm(self, text, outs, args=(), *, effects=False):
        if text.startswith("max.u16x2"):
            a, b = (x.value.view(np.uint16) for x in args)
            return [Reg(np.maximum(a, b).view(np.uint32), "r")]
        if text.startswith("bar.sync"):
            return []
        if text.startswith("ld.shared"):
            offset = int(re.search(r"\+(\d+)\]", text).group(1))
            return self._read(args[0], 4, len(outs), offset)
        if text.startswith("st.shared.v4"):
            return self._write(args[0], args[1:])
        assert "@p st.global" in text, text
        return self._write(args[1], args[2:], args[0].value != 0)
