"""Hopper's copy engine and the barriers that count its bytes, for kernels written with `pallas_kernels.ptx`."""

from __future__ import annotations

from pallas_kernels.ptx import Reg, asm, fence_async


def bulk_store(to: Reg, source: Reg, size: int) -> None:
    """Let the copy engine write `size` bytes of shared memory to global memory; both 16-byte aligned."""
    asm(f"cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], {size};", "", [to, source])
    asm("cp.async.bulk.commit_group;", "")


def bulk_wait() -> None:
    """Wait until what this thread's `bulk_store`s write has been read from shared memory."""
    asm("cp.async.bulk.wait_group.read 0;", "")


def bulk_load(to: Reg, source: Reg, size: int, barrier: Reg) -> None:
    """Let the copy engine read `size` bytes of global memory into shared memory, both 16-byte aligned; one phase of the
    barrier, which expects one arrival (this thread's)."""
    asm(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};", "", [barrier])
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    asm(f"{copy} [$0], [$1], {size}, [$2];", "", [to, source, barrier])


def barrier_init(barrier: Reg) -> None:
    """A barrier of 8 bytes in shared memory whose phases end with one arrival and the bytes it expects."""
    asm("mbarrier.init.shared::cta.b64 [$0], 1;", "", [barrier])


def fence_barrier_init() -> None:
    """Make this thread's new barriers known to the copy engine."""
    asm("fence.mbarrier_init.release.cluster;", "")
    fence_async()


def barrier_wait(barrier: Reg, parity: Reg) -> None:
    """Wait for the end of a barrier's phase, its number's lowest bit being `parity`."""
    attempt = "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;"
    asm(f"{{ .reg .pred p; AGAIN: {attempt} @!p bra AGAIN; }}", "", [barrier, parity])
