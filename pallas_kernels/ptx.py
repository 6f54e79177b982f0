"""Registers and PTX for Mosaic GPU kernels: what `plgpu.inline_mgpu` bodies are written with.

Everything here runs while a kernel is lowered, on MLIR values of one CUDA thread. `Reg` gives such a value Python
operators; the functions emit one instruction or a short sequence. Shared-memory addresses are 32-bit registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

_TYPES = {
    "f": ir.F32Type,
    "r": lambda: ir.IntegerType.get_signless(32),
    "l": lambda: ir.IntegerType.get_signless(64),
}


def register_type(kind: str) -> ir.Type:
    """MLIR type of a register of this kind."""
    return ir.F32Type.get() if kind == "f" else _TYPES[kind]()


class Reg:
    """One register of a thread: kind "f" (f32), "r" (32-bit integer) or "l" (64-bit integer)."""

    __slots__ = ("kind", "value")

    def __init__(self, value: ir.Value, kind: str):
        self.value, self.kind = value, kind

    def _other(self, x: Any) -> ir.Value:
        return x.value if isinstance(x, Reg) else const(x, self.kind).value

    def _binary(self, x: Any, on_float, on_int, swap: bool = False) -> Reg:
        a, b = self.value, self._other(x)
        if swap:
            a, b = b, a
        return Reg((on_float if self.kind == "f" else on_int)(a, b), self.kind)

    def __add__(self, x):
        return self._binary(x, arith.addf, arith.addi)

    def __sub__(self, x):
        return self._binary(x, arith.subf, arith.subi)

    def __rsub__(self, x):
        return self._binary(x, arith.subf, arith.subi, swap=True)

    def __mul__(self, x):
        return self._binary(x, arith.mulf, arith.muli)

    def __truediv__(self, x):
        return self._binary(x, arith.divf, arith.divui)

    def __floordiv__(self, x):
        return self._binary(x, None, arith.divui)

    def __mod__(self, x):
        return self._binary(x, None, arith.remui)

    def __and__(self, x):
        return self._binary(x, None, arith.andi)

    def __or__(self, x):
        return self._binary(x, None, arith.ori)

    def __xor__(self, x):
        return self._binary(x, None, arith.xori)

    def __lshift__(self, x):
        return self._binary(x, None, arith.shli)

    def __rshift__(self, x):
        return self._binary(x, None, arith.shrui)

    __radd__, __rmul__ = __add__, __mul__

    def _compare(self, x: Any, on_float, on_int) -> ir.Value:
        if self.kind == "f":
            return arith.cmpf(on_float, self.value, self._other(x))
        return arith.cmpi(on_int, self.value, self._other(x))

    def __lt__(self, x):
        return self._compare(x, arith.CmpFPredicate.OLT, arith.CmpIPredicate.slt)

    def __gt__(self, x):
        return self._compare(x, arith.CmpFPredicate.OGT, arith.CmpIPredicate.sgt)

    def __le__(self, x):
        return self._compare(x, arith.CmpFPredicate.OLE, arith.CmpIPredicate.sle)

    def __ge__(self, x):
        return self._compare(x, arith.CmpFPredicate.OGE, arith.CmpIPredicate.sge)

    def equals(self, x) -> ir.Value:
        """Bit for comparison with an integer."""
        return self._compare(x, arith.CmpFPredicate.OEQ, arith.CmpIPredicate.eq)


def const(x: float | int, kind: str) -> Reg:
    """A constant register."""
    ty = register_type(kind)
    if kind == "f":
        return Reg(arith.constant(ty, ir.FloatAttr.get(ty, float(x))), kind)
    bits = 32 if kind == "r" else 64
    x = int(x) & (2**bits - 1)
    return Reg(arith.constant(ty, ir.IntegerAttr.get(ty, x - 2**bits if x >= 2 ** (bits - 1) else x)), kind)


def f32(x: float) -> Reg:
    """A float constant."""
    return const(x, "f")


def i32(x: int) -> Reg:
    """An integer constant."""
    return const(x, "r")


def select(bit: ir.Value, a: Reg, b: Reg | float | int) -> Reg:
    """a where the bit is set, else b."""
    return Reg(arith.select(bit, a.value, a._other(b)), a.kind)


def both(*bits: ir.Value) -> ir.Value:
    """Conjunction of bits."""
    out = bits[0]
    for b in bits[1:]:
        out = arith.andi(out, b)
    return out


def either(*bits: ir.Value) -> ir.Value:
    """Disjunction of bits."""
    out = bits[0]
    for b in bits[1:]:
        out = arith.ori(out, b)
    return out


def maximum(a: Reg, b: Reg | float) -> Reg:
    """Larger of two floats; a NaN loses."""
    return asm("max.f32 $0, $1, $2;", "f", [a, b if isinstance(b, Reg) else f32(b)])[0]


def to_float(x: Reg) -> Reg:
    """Signed 32-bit integer -> f32."""
    return Reg(arith.sitofp(ir.F32Type.get(), x.value), "f")


def to_int(x: Reg) -> Reg:
    """f32 -> nearest 32-bit integer, ties to even, clamped."""
    return asm("cvt.rni.s32.f32 $0, $1;", "r", [x])[0]


def asm(
    ptx: str, outs: str, args: Sequence[Reg] = (), *, effects: bool = False, clobber: str = ""
) -> list[Reg]:
    """Inline PTX. `outs`: one kind letter per result ($0, $1, ...); arguments follow."""
    constraints = ",".join([f"={k}" for k in outs] + [a.kind for a in args] + ([clobber] if clobber else []))
    values = [a.value for a in args]
    if not outs:
        ty = ir.Type.parse("!llvm.void")
        llvm.inline_asm(ty, values, ptx, constraints, has_side_effects=True, asm_dialect=0)
        return []
    if len(outs) == 1:
        got = llvm.inline_asm(
            register_type(outs), values, ptx, constraints, has_side_effects=effects, asm_dialect=0
        )
        return [Reg(got, outs)]
    ty = llvm.StructType.get_literal([register_type(k) for k in outs])
    got = llvm.inline_asm(ty, values, ptx, constraints, has_side_effects=effects, asm_dialect=0)
    return [Reg(llvm.extractvalue(register_type(k), got, [i]), k) for i, k in enumerate(outs)]


def thread_index() -> Reg:
    """Index of the thread in its warpgroup, 0 .. 127."""
    return asm("mov.u32 $0, %tid.x;", "r")[0] & 127


def ex2(x: Reg) -> Reg:
    """2 ** x, approximately (2 ulp)."""
    return asm("ex2.approx.ftz.f32 $0, $1;", "f", [x])[0]


def lg2(x: Reg) -> Reg:
    """log2 x, approximately."""
    return asm("lg2.approx.f32 $0, $1;", "f", [x])[0]


def half_multiply(a: Reg, b: Reg, c: Reg | None = None) -> Reg:
    """a * b (+ c) of two f16 each."""
    if c is None:
        return asm("mul.f16x2 $0, $1, $2;", "r", [a, b])[0]
    return asm("fma.rn.f16x2 $0, $1, $2, $3;", "r", [a, b, c])[0]


def half_add(a: Reg, b: Reg) -> Reg:
    """a + b of two f16 each."""
    return asm("add.rn.f16x2 $0, $1, $2;", "r", [a, b])[0]


def half_maximum(a: Reg, b: Reg, dtype: str) -> Reg:
    """Larger of two f16 or bf16 each; a NaN loses."""
    return asm(f"max.{dtype}x2 $0, $1, $2;", "r", [a, b])[0]


def fma(a: Reg, b: Reg | float, c: Reg | float) -> Reg:
    """a * b + c in f32."""
    b, c = (x if isinstance(x, Reg) else f32(x) for x in (b, c))
    return asm("fma.rn.f32 $0, $1, $2, $3;", "f", [a, b, c])[0]


def prmt(a: Reg, b: Reg | int, selector: int) -> Reg:
    """Byte permutation of the 8 bytes b:a."""
    return asm(f"prmt.b32 $0, $1, $2, {selector:#x};", "r", [a, b if isinstance(b, Reg) else i32(b)])[0]


def pack_half(lo: Reg, hi: Reg, dtype: str) -> Reg:
    """Two f32 -> one register of two "f16" or "bf16", `lo` in the low half."""
    return asm(f"cvt.rn.{dtype}x2.f32 $0, $1, $2;", "r", [hi, lo])[0]


def unpack_half(x: Reg, dtype: str) -> tuple[Reg, Reg]:
    """One register of two "f16" or "bf16" -> two f32 (low, high)."""
    if dtype == "bf16":
        return bits_to_float(x << 16), bits_to_float(x & 0xFFFF0000)
    ptx = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    lo, hi = asm(ptx, "ff", [x])
    return lo, hi


def pack_fp8(lo: Reg, hi: Reg, dtype: str) -> Reg:
    """Two f32 -> 16 bits of two "e4m3" or "e5m2", clamped, `lo` in the low byte; upper half zero."""
    ptx = f"{{ .reg .b16 t; cvt.rn.satfinite.{dtype}x2.f32 t, $1, $2; cvt.u32.u16 $0, t; }}"
    return asm(ptx, "r", [hi, lo])[0]


def unpack_fp8(x: Reg, dtype: str) -> tuple[Reg, Reg]:
    """Low 16 bits, two "e4m3" or "e5m2" -> two f32 (low byte, high byte)."""
    ptx = (
        "{ .reg .b16 t, l, h; .reg .b32 p; cvt.u16.u32 t, $2; "
        f"cvt.rn.f16x2.{dtype}x2 p, t; mov.b32 {{l, h}}, p; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }}"
    )
    lo, hi = asm(ptx, "ff", [x])
    return lo, hi


def e4m3_to_f16(x: Reg, high: bool) -> Reg:
    """Low or high 16 bits, two e4m3 -> two f16."""
    half = "h" if high else "l"
    return asm(f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.rn.f16x2.e4m3x2 $0, {half}; }}", "r", [x])[0]


def bits_to_float(x: Reg) -> Reg:
    """Reinterpret 32 bits as f32."""
    return Reg(arith.bitcast(ir.F32Type.get(), x.value), "f")


def shuffle_xor(x: Reg, lanes: int) -> Reg:
    """The value of the lane whose index differs by `lanes`."""
    out = asm(f"shfl.sync.bfly.b32 $0, $1, {lanes}, 0x1f, 0xffffffff;", "r", [as_bits(x)], effects=True)[0]
    return bits_to_float(out) if x.kind == "f" else out


def as_bits(x: Reg) -> Reg:
    """Reinterpret f32 as 32 bits."""
    return x if x.kind == "r" else Reg(arith.bitcast(register_type("r"), x.value), "r")


def smem_address(ref: ir.Value) -> Reg:
    """Shared-memory address of a memref."""
    return Reg(llvm.ptrtoint(register_type("r"), utils.memref_ptr(ref)), "r")


def global_address(ref: ir.Value) -> Reg:
    """Global address of a memref."""
    return Reg(llvm.ptrtoint(register_type("l"), utils.memref_ptr(ref)), "l")


def address(ref: ir.Value) -> Reg:
    """Address of a memref in shared (32 bits) or global memory (64 bits)."""
    return smem_address(ref) if utils.is_smem_ref(ref) else global_address(ref)


def wide(x: Reg) -> Reg:
    """32-bit index -> 64 bits, for global addresses."""
    return Reg(arith.extsi(register_type("l"), x.value), "l")


def load(address: Reg, size: int = 4, *, words: int = 1) -> list[Reg]:
    """`words` consecutive 4-byte words, or one zero-extended 1- or 2-byte value; shared or global by the address."""
    space = "shared" if address.kind == "r" else "global"
    if size < 4:
        kind = {2: "u16", 1: "u8"}[size]
        return asm(f"ld.{space}.{kind} $0, [$1];", "r", [address], effects=True)
    if words == 1:
        return asm(f"ld.{space}.b32 $0, [$1];", "r", [address], effects=True)
    regs = ", ".join(f"${i}" for i in range(words))
    return asm(f"ld.{space}.v{words}.b32 {{{regs}}}, [${words}];", "r" * words, [address], effects=True)


def store(address: Reg, x: Reg, size: int = 4) -> None:
    """Store the low `size` bytes of a register; shared or global by the address."""
    space = "shared" if address.kind == "r" else "global"
    if size == 4:
        asm(f"st.{space}.b32 [$0], $1;", "", [address, as_bits(x)])
    else:
        asm(f"st.{space}.u{8 * size} [$0], $1;", "", [address, x])


def store_zeros(address: Reg) -> None:
    """16 bytes of zeros in shared memory."""
    asm("{ .reg .b32 z; mov.b32 z, 0; st.shared.v4.b32 [$0], {z, z, z, z}; }", "", [address])


def barrier() -> None:
    """Wait for the warpgroup; orders its ordinary shared-memory accesses."""
    asm("bar.sync 1, 128;", "")


def barrier_any(bit: ir.Value) -> ir.Value:
    """Wait for the warpgroup; true if the bit is set in any thread."""
    flag = Reg(arith.extui(register_type("r"), bit), "r")
    ptx = "{ .reg .pred p, r; setp.ne.b32 p, $1, 0; bar.red.or.pred r, 1, 128, p; selp.b32 $0, 1, 0, r; }"
    return asm(ptx, "r", [flag], effects=True)[0].equals(1)


def fence_async() -> None:
    """Make this thread's shared-memory stores visible to tensor cores and the copy engine."""
    asm("fence.proxy.async.shared::cta;", "")


def if_(bit: ir.Value, then, otherwise: Sequence[Reg] = ()) -> list[Reg]:
    """`then()` where the bit is set (the same in all threads), else the registers of `otherwise`."""
    types = [r.value.type for r in otherwise]
    op = ir.Operation.create("scf.if", results=types, operands=[bit], regions=2)
    with ir.InsertionPoint(op.regions[0].blocks.append()):
        got = then()
        scf.yield_([r.value for r in got] if types else [])
    if types:
        with ir.InsertionPoint(op.regions[1].blocks.append()):
            scf.yield_([r.value for r in otherwise])
    return [Reg(v, r.kind) for v, r in zip(op.results, otherwise)]


def for_(start: Reg, stop: Reg, step: Reg, body, carry: Sequence[Reg] = ()) -> list[Reg]:
    """`carry = body(i, carry)` for i from `start` below `stop`, signed; the bounds may differ between threads."""
    op = scf.ForOp(start.value, stop.value, step.value, [r.value for r in carry])
    with ir.InsertionPoint(op.body):
        state = [Reg(v, r.kind) for v, r in zip(op.inner_iter_args, carry)]
        scf.yield_([r.value for r in body(Reg(op.induction_variable, "r"), state)])
    return [Reg(v, r.kind) for v, r in zip(op.results, carry)]


def scalar(x: mgpu.FragmentedArray) -> Reg:
    """The register of a scalar argument (i32)."""
    return Reg(x.registers.item(), "r")


def registers(x: mgpu.FragmentedArray) -> list[Reg]:
    """A float32 array of shape (128 n,) in WG_STRIDED layout as the n registers of each thread."""
    return [Reg(vector.extract(v, dynamic_position=[], static_position=[0]), "f") for v in x.registers.flat]


def as_array(regs: Sequence[Reg]) -> mgpu.FragmentedArray:
    """The inverse of `registers`."""
    ty = ir.VectorType.get((1,), ir.F32Type.get())
    values = np.array([vector.from_elements(ty, [r.value]) for r in regs], dtype=object)
    layout = mgpu.WGStridedFragLayout((128 * len(regs),), 1)
    return fragmented_array.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)
