"""The instructions of the selection kernel on numpy arrays: all threads of a CTA in lockstep, so that its code runs as it is."""

import re
import types

import numpy as np

_TYPES = {"f": np.float32, "r": np.uint32, "l": np.uint64}
_ROW, _OUT = 1 << 40, 1 << 41  # addresses of the global arrays


class Reg:
    """A register of all threads."""

    def __init__(self, value, kind):
        self.value, self.kind = np.asarray(value).astype(_TYPES[kind]), kind

    def _both(self, x, signed=False):
        other = x.value if isinstance(x, Reg) else constant(x, self.kind).value
        if signed and self.kind == "r":
            return self.value.view(np.int32), other.view(np.int32)
        return self.value, other

    def __add__(self, x):
        return Reg(np.add(*self._both(x)), self.kind)

    def __sub__(self, x):
        return Reg(np.subtract(*self._both(x)), self.kind)

    def __mul__(self, x):
        return Reg(np.multiply(*self._both(x)), self.kind)

    def __and__(self, x):
        return Reg(np.bitwise_and(*self._both(x)), self.kind)

    def __or__(self, x):
        return Reg(np.bitwise_or(*self._both(x)), self.kind)

    def __xor__(self, x):
        return Reg(np.bitwise_xor(*self._both(x)), self.kind)

    def __lshift__(self, x):
        return Reg(np.left_shift(*self._both(x)), self.kind)

    def __rshift__(self, x):
        return Reg(np.right_shift(*self._both(x)), self.kind)

    def __lt__(self, x):
        return np.less(*self._both(x, signed=True))

    def __le__(self, x):
        return np.less_equal(*self._both(x, signed=True))

    def __gt__(self, x):
        return np.greater(*self._both(x, signed=True))

    def __ge__(self, x):
        return np.greater_equal(*self._both(x, signed=True))

    def equals(self, x):
        return np.equal(*self._both(x))


def constant(x, kind):
    return Reg(np.float32(x) if kind == "f" else int(x) & (2**32 - 1), kind)


arith = types.SimpleNamespace(
    CmpIPredicate=types.SimpleNamespace(ugt=np.greater),
    cmpi=lambda compare, a, b: compare(a, b),
    extui=lambda _, bit: bit.astype(np.uint32),
    shrsi=lambda a, b: (a.view(np.int32) >> b.view(np.int32)).view(np.uint32),
)


class Machine:
    """Stands for the module `ptx` in a CTA that selects from one row [n] into `out` [width]."""

    bits_to_float = staticmethod(lambda x: Reg(x.value.view(np.float32), "f"))
    as_bits = staticmethod(lambda x: Reg(x.value.view(np.uint32), "r"))
    wide = staticmethod(lambda x: Reg(x.value.view(np.int32).astype(np.int64).view(np.uint64), "l"))
    i32 = staticmethod(lambda x: constant(x, "r"))
    both, either = staticmethod(np.logical_and), staticmethod(np.logical_or)
    register_type = staticmethod(lambda kind: None)
    scalar = staticmethod(lambda x: constant(x, "r"))
    smem_address = staticmethod(lambda place: constant(place, "r"))

    def __init__(self, threads, shared_bytes, row, width):
        self.threads, self.active = threads, np.ones(threads, bool)
        self.shared = np.full(shared_bytes // 4, 0xDEADBEEF, np.uint32)
        self.row, self.out = row.view(np.uint32), np.zeros(width, np.int32)
        self.writes = np.zeros(width, int)

    def global_address(self, name):
        return Reg(_ROW if name == "row" else _OUT, "l")

    def select(self, bit, a, b):
        return Reg(np.where(bit, *a._both(b)), a.kind)

    def _spread(self, x):
        return np.broadcast_to(x.value if isinstance(x, Reg) else x, (self.threads,))

    def _keep(self, mask, new, old):
        return [Reg(np.where(mask, n.value, o.value), n.kind) for n, o in zip(new, old)]

    def if_(self, bit, then, otherwise=()):
        before, self.active = self.active, self.active & self._spread(bit)
        if self.active.any():
            otherwise = self._keep(self.active, then(), otherwise)
        self.active = before
        return otherwise

    def for_(self, start, stop, step, body, carry=()):
        before, i = self.active, start
        while (runs := before & self._spread(i < stop)).any():
            self.active = runs
            carry, i = self._keep(runs, body(i, carry), carry), i + step
        self.active = before
        return list(carry)

    def _warps(self, x):
        """Per warp [warps, 32]; what exchanges values needs whole warps."""
        active = self.active.reshape(-1, 32)
        assert (active.all(1) | ~active.any(1)).all()
        return self._spread(x).reshape(-1, 32)

    def load(self, address):
        assert (address.value % 4 == 0).all()
        return [Reg(self.shared[self._spread(address) // 4], "r")]

    def store(self, address, x, where=True):
        at, value = self._spread(address), self._spread(x)
        active = self.active & where
        if address.kind == "r":
            self.shared[at[active] // 4] = value[active]
            return
        place = ((at - np.uint64(_OUT)) // np.uint64(4)).astype(np.int64)[active]
        self.out[place] = value[active].view(np.int32)
        np.add.at(self.writes, place, 1)

    def asm(self, text, outs, args=(), *, effects=False):
        if "%tid.x" in text:
            return [Reg(np.arange(self.threads), "r")]
        if text == "bar.sync 0;":
            assert self.active.all()
            return []
        if "ld.global.nc.v4" in text:
            vector = (self._spread(args[0]) - np.uint64(_ROW)).astype(np.int64) // 16
            inside = self._spread(args[1]) != 0
            got = self.row.reshape(-1, 4)[np.where(inside, vector, 0)]
            return [Reg(np.where(inside, got[:, i], 0xFF800000), "r") for i in range(4)]
        if text.startswith("add.rn.f32"):
            return [Reg(args[0].value + np.float32(0), "f")]
        if "red.shared.add.u32" in text:
            *flag, address = args
            active = self.active & (self._spread(flag[0]) != 0 if flag else True)
            np.add.at(self.shared, self._spread(address)[active] // 4, 1)
            return []
        if "@p st." in text:
            self.store(args[1], args[2], self._spread(args[0]) != 0)
            return []
        x = self._warps(args[0])
        if "shfl.sync.up" in text:
            by = int(re.search(r"\$1, (\d+),", text).group(1))
            return [Reg((x + np.pad(x, ((0, 0), (by, 0)))[:, :32]).reshape(-1), "r")]
        reduce = {
            "shfl.sync.idx.b32 $0, $1, 31": lambda x: x[:, 31:],
            "redux.sync.add.u32": lambda x: x.sum(1, keepdims=True, dtype=np.uint32),
            "redux.sync.max.u32": lambda x: x.max(1, keepdims=True),
        }
        (one,) = (f for name, f in reduce.items() if text.startswith(name))
        return [Reg(np.repeat(one(x), 32, axis=1).reshape(-1), "r")]
