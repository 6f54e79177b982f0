"""Hopper's warpgroup products (`wgmma`) for kernels written with `pallas_kernels.ptx`."""

from __future__ import annotations

import itertools

from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.ptx import Reg, const, register_type


def matrix(address: Reg, *, rows_apart: int, leading: int = 16) -> Reg:
    """wgmma descriptor of a 128-byte-swizzled matrix in shared memory.

    Args:
      address: of the matrix, in 1024-byte tiles of 8 rows x 128 bytes.
      rows_apart: bytes from one group of 8 rows to the next.
      leading: bytes from one 128-byte column of tiles to the next, for matrices read transposed.
    """
    fixed = (leading >> 4) << 16 | (rows_apart >> 4) << 32 | 1 << 62
    low = Reg(arith.extui(register_type("l"), ((address & 0x3FFFF) >> 4).value), "l")
    return low | const(fixed, "l")


def wgmma(
    acc: list[list[Reg]],
    a: list[list[Reg] | int],
    b: list[int],
    *,
    b_matrix: Reg,
    a_matrix: Reg | None = None,
    n: int,
    types: tuple[str, str, str],
    init: bool,
    a_transposed: bool = False,
    wait: bool = True,
    tiles: list[int] | None = None,
) -> list[list[Reg]]:
    """A chain of m64 products, and the wait for it: acc[m] += sum over k of A[m, k] B[k].

    Args:
      acc: per 64-row tile the n / 2 accumulator registers (ignored if `init`).
      a: per product, in order (tile 0 all k, tile 1 all k, ...), 4 registers, or the byte offset from `a_matrix`.
      b: per product the byte offset from `b_matrix`.
      n: columns.
      types: (accumulator, A, B) as PTX names them.
      init: start from 0.
      a_transposed: A lies in shared memory with its rows contiguous (16-bit types).
      tiles: per product the index of its accumulator, if the products come in the order of issue instead.
      wait: False leaves the products in flight: nothing may touch the results before `wgmma_wait`.
    """
    kind = "r" if types[0] == "s32" else "f"
    size = n // 2
    k = {"f16": 16, "bf16": 16}.get(types[1], 32)
    count = len(acc)
    flat = [r for tile in acc for r in tile]
    total = count * size
    args = [b_matrix]
    if a_matrix is not None:
        args.append(a_matrix)
    if tiles is None:
        # Tile after tile within a step of k: products that follow one another do not wait for one another.
        per_tile = len(a) // count
        order = [tile * per_tile + s for s in range(per_tile) for tile in range(count)]
        a, b, tiles = [a[i] for i in order], [b[i] for i in order], list(range(count)) * per_tile
    register_a = [regs for regs in a if not isinstance(regs, int)]
    args += [r for regs in register_a for r in regs]
    first = total + (0 if init else total)  # operands: outputs, then tied inputs, then args
    names = itertools.count(first + (1 if a_matrix is None else 2))
    b_name, a_name = f"${first}", f"${first + 1}"
    lines = ["{", ".reg .b64 da, db;", ".reg .pred p;", "wgmma.fence.sync.aligned;"]
    for index, (a_op, b_off, tile) in enumerate(zip(a, b, tiles, strict=True)):
        regs = ", ".join(f"${i}" for i in range(tile * size, (tile + 1) * size))
        lines.append(f"add.s64 db, {b_name}, {b_off >> 4};")
        fresh = init and tile not in tiles[:index]
        lines.append(f"setp.ne.b32 p, {0 if fresh else 1}, 0;")
        if isinstance(a_op, int):
            lines.append(f"add.s64 da, {a_name}, {a_op >> 4};")
            a_text = "da"
        else:
            a_text = "{" + ", ".join(f"${next(names)}" for _ in a_op) + "}"
        flags = "" if kind == "r" else ", 1, 1"
        if k == 16:
            flags += f", {int(a_transposed)}, 0" if isinstance(a_op, int) else ", 0"
        shape = f"m64n{n}k{k}.{types[0]}.{types[1]}.{types[2]}"
        lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{regs}}}, {a_text}, db, p{flags};")
    lines += [
        "wgmma.commit_group.sync.aligned;",
        *(["wgmma.wait_group.sync.aligned 0;"] if wait else []),
        "}",
    ]
    constraints = [f"={kind}"] * total + ([] if init else [str(i) for i in range(total)])
    constraints += [r.kind for r in args]
    ty = llvm.StructType.get_literal([register_type(kind)] * total)
    values = ([] if init else [r.value for r in flat]) + [r.value for r in args]
    got = llvm.inline_asm(
        ty, values, "\n".join(lines), ",".join(constraints), has_side_effects=True, asm_dialect=0
    )
    out = [Reg(llvm.extractvalue(register_type(kind), got, [i]), kind) for i in range(total)]
    return [out[t * size : (t + 1) * size] for t in range(count)]


def wgmma_wait(acc: list[Reg]) -> list[Reg]:
    """Wait for all products in flight; returns their f32 results, `acc`."""
    n = len(acc)
    ty = llvm.StructType.get_literal([register_type("f")] * n)
    constraints = ",".join(["=f"] * n + [str(i) for i in range(n)])
    got = llvm.inline_asm(
        ty, [r.value for r in acc], "wgmma.wait_group.sync.aligned 0;", constraints, has_side_effects=True,
        asm_dialect=0,
    )  # fmt: skip
    return [Reg(llvm.extractvalue(register_type("f"), got, [i]), "f") for i in range(n)]
