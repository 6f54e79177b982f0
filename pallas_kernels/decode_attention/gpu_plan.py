"""Shapes and layouts of the Hopper decode kernel, which takes 64 or 128 slots of one KV head a step.

Operands are swapped: S^T [slots, columns] = K q^T and O^T [channels, columns] += V^T P, so that the slots and the
channels fill the 64 rows of `wgmma` and the few queries are its columns. All tiles in shared memory are K-major in
128-byte-swizzled blocks of 8 rows x 128 bytes.

A column is one (query head of the group, token), `Plan.columns` of them, laid out per storage format:
  - half: as they are. 8 bits: each twice in QK, since q is split into a high and a low part whose products are
    added: an 8-bit operand with 8 to 16 bits of accuracy, and K is used as stored.
  - packed: in P once for every channel group of V, whose scales are folded into P; in QK as many of these copies
    as fit into the padding to 8 columns. Key groups of 32 are further columns of QK, of which each row uses its own.
Packed K, and V of all but half, are loaded into registers in the fragment layout of `wgmma`; which slot sits at
which place of the contraction is free as long as P is stored in the same order.

Softmax uses a reference that only has to bound P, not to be the maximum: it moves when some P exceeds 2**HEADROOM,
which costs a reduction over the warpgroup; else one barrier a step suffices.
"""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels import ptx
from pallas_kernels.formats import PACKED_BITS
from pallas_kernels.ptx import Reg

LOG2E = math.log2(math.e)
HEADROOM = 5.0  # P may exceed its reference by this many powers of two before the reference moves
P_SCALE = {"f16": 2.0**10, "bf16": 1.0}  # keeps the largest P in range and the smallest above 0
SPLIT = 16.0  # the low part of a split fp8 operand is stored times this


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a kernel."""

    fmt: str  # "half", "int8", "fp8_e4m3", "fp8_e5m2", "int4" or "int2"
    dtype: str  # "bf16" or "f16": of q, and of K and V if fmt is "half"
    dim: int
    columns: int  # query heads of a KV head x tokens
    tokens: int
    block: int  # slots per step
    stages: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    group: int = 64  # packed: slots per key group and channels per value group
    meta: str = "f32"  # dtype of scales: "f32", "bf16" or "f16"
    causal: bool = False  # positions of the queries limit what they see
    positions: bool = False  # slots have explicit positions
    tree: int = 0  # newest slots that a mask decides on
    weights: bool = False  # write P and its references out, from which the mass of every slot follows
    used: int = 0  # slots of a step that hold anything, the first ones; 0: all
    key_chunks: int = 2  # packed: 64-channel parts of K in registers at a time
    value_steps: int = 8  # 16-slot parts of V in registers at a time

    @property
    def packed(self) -> int:
        """Bits per code of a packed format, else 0."""
        return PACKED_BITS.get(self.fmt, 0)

    @property
    def split(self) -> bool:
        """Whether every column of QK is a pair (high, low)."""
        return self.fmt in ("int8", "fp8_e4m3", "fp8_e5m2")

    @property
    def value_groups(self) -> int:
        """Copies of each column, one per channel group of V."""
        return self.dim // self.group if self.packed else 1

    @property
    def copies(self) -> int:
        """Copies of each column in QK: as many value groups as the padding to 8 columns holds."""
        padded = -(-self.columns // 8) * 8
        fits = [c for c in range(1, self.value_groups + 1) if self.value_groups % c == 0]
        return max(c for c in fits if self.columns * c <= padded)

    @property
    def repeats(self) -> int:
        """Copies in P of each column of QK, for the value groups that QK has no copy for."""
        return self.value_groups // self.copies

    @property
    def n_scores(self) -> int:
        """Columns of QK for one key group, padded to 8."""
        return -(-self.columns * self.copies * (2 if self.split else 1) // 8) * 8

    @property
    def tile_groups(self) -> int:
        """Key groups of a 64-slot tile that have columns of their own: rows e = 0 and 1 of a group of 32."""
        return max(1, 64 // self.group) if self.packed else 1

    @property
    def n_raw(self) -> int:
        """Columns of the QK product."""
        return self.n_scores * self.tile_groups

    @property
    def n_values(self) -> int:
        """Columns of the PV product, padded to 8."""
        return -(-self.logical // 2) * 8 * self.repeats

    @property
    def tiles(self) -> int:
        """64-slot tiles of a step."""
        return self.block // 64

    @property
    def logical(self) -> int:
        """Columns that one thread holds after joining pairs."""
        return self.n_scores // 8 * (1 if self.split else 2)

    @property
    def q_bytes(self) -> int:
        """Bytes of an element of the q tile."""
        return 1 if self.split else 2

    @property
    def p_type(self) -> str:
        """PTX type of P."""
        return self.dtype if self.fmt == "half" else "f16"

    @property
    def k_row(self) -> int:
        """Bytes of a row of the K and V tiles."""
        return self.dim * (2 if self.fmt == "half" else 1)

    @property
    def k_rows(self) -> int:
        """Rows of the K and V tiles."""
        return self.block * self.packed // 8 if self.packed else self.block

    @property
    def q_dim(self) -> int:
        """Elements of a row of the q tile: packed keys append the products with the zero points."""
        return self.dim + 64 if self.packed else self.dim

    @property
    def key_groups(self) -> int:
        """q tiles of a step: one per key group, or one for all."""
        return max(1, self.block // self.group) if self.packed else 1

    @property
    def chains(self) -> int:
        """Packed: accumulators per tile in QK, so that two chains of products are in flight at least."""
        return 2 if self.tiles == 1 else 1

    @property
    def score_registers(self) -> int:
        """Registers that `start_scores` leaves in flight."""
        return self.tiles * self.chains * self.n_raw // 2

    @property
    def acc_registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.dim // 64 * self.n_values // 2

    @property
    def state_registers(self) -> int:
        """Registers carried from step to step: accumulator, reference, sum, and the zero points' sum if packed."""
        return self.acc_registers + self.logical * (2 + (self.repeats if self.packed else 0))

    @property
    def bulk(self) -> bool:
        """Weights are the P tile of a step as it lies in shared memory, which the copy engine writes out."""
        return (
            self.weights
            and self.fmt == "half"
            and self.dtype == "bf16"
            and self.block == 64
            and not self.used
        )

    @property
    def reference_columns(self) -> int:
        """Columns of the references written out: `columns`, padded for the copy engine."""
        return -(-self.columns // 4) * 4

    @property
    def weight_columns(self) -> int:
        """Columns of the weights written out: `columns`, padded to write two at a time."""
        return self.columns + self.columns % 2


class Thread:
    """Where a thread sits in the fragments of its warpgroup."""

    def __init__(self, plan: Plan):
        self.index = ptx.thread_index()
        self.warp = self.index >> 5
        lane = self.index & 31
        self.row, self.quad = lane >> 2, lane & 3
        self.plan = plan

    def column(self, j: int) -> Reg:
        """Column (before padding, value groups included) of the thread's j-th logical value."""
        if self.plan.split:
            return self.quad + 4 * j
        return self.quad * 2 + (8 * (j // 2) + j % 2)

    def value_column(self, j: int, repeat: int = 0) -> Reg:
        """Where that column lies in P and in the accumulator, so that the same thread holds it there."""
        return self.quad * 2 + (8 * (j // 2) + j % 2 + repeat * self.plan.n_scores)

    def slot(self, tile: int, e: int) -> Reg:
        """Slot of the step in row e of a 64-slot tile."""
        if self.plan.packed:
            return self.warp * 8 + self.row + (64 * tile + 32 * e)
        return self.warp * 16 + self.row + (64 * tile + 8 * e)


def unpack_state(plan: Plan, regs: list[Reg]):
    """(acc per 64-channel tile, reference, total, zero sums) of the carried registers."""
    n, at = plan.n_values // 2, plan.acc_registers
    acc = [regs[i * n : (i + 1) * n] for i in range(plan.dim // 64)]
    parts = [regs[at + i * plan.logical : at + (i + 1) * plan.logical] for i in range(2)]
    return acc, parts[0], parts[1], regs[at + 2 * plan.logical :]


def pack_state(acc, reference, total, zeros) -> list[Reg]:
    """The inverse of `unpack_state`."""
    return [r for tile in acc for r in tile] + list(reference) + list(total) + list(zeros)


def tile_offset(row: Reg, chunk: Reg | int, row_bytes: int) -> Reg:
    """Byte offset of 16-byte chunk `chunk` of row `row` in a swizzled tile with rows of `row_bytes` bytes."""
    columns = -(-row_bytes // 128)
    chunk = chunk if isinstance(chunk, Reg) else ptx.i32(chunk)
    in_tile = (row & 7) * 128 + (((chunk & 7) ^ (row & 7)) << 4)
    return (row >> 3) * (columns * 1024) + (chunk >> 3) * 1024 + in_tile


def load_meta(plan: Plan, address: Reg) -> Reg:
    """One scale as f32."""
    if plan.meta == "f32":
        return ptx.bits_to_float(ptx.load(address)[0])
    return ptx.unpack_half(ptx.load(address, 2)[0], plan.meta)[0]


def channel(t: Thread, tile: int, e: int) -> Reg:
    """Channel in row e of the thread in a 64-channel tile of the accumulator."""
    if t.plan.fmt == "half":
        return t.warp * 16 + t.row + (64 * tile + 8 * e)
    return t.warp * 32 + t.row * 4 + (128 * (tile // 2) + 2 * (tile % 2) + e)
