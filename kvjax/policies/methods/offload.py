"""Offload to host memory or to disk."""

from kvjax.policies.base import Policy
from kvjax.policies.placement import MEMORY, Offload
from kvjax.policies.registry import method


@method(title="Offload to host memory or disk", arxiv="")
def offload(
    recent: int = 0, ahead: bool = False, disk: str = "", memory: int = MEMORY, keep: bool = False
) -> Policy:
    """The prompt's entries live in host memory; each step moves the chosen blocks that the last step did not read.

    Composes with any selector: `quest(read=0.1) | offload`; without one every step moves all of it. The device holds the
    index, the newest entries (those that the selector always reads and `recent` more), generated tokens and the blocks of
    the last step. ahead: choose with the queries that the layer before foresaw, so that a fetch waits for nothing but that
    layer's input.

    disk: an existing directory. Complete pages of the prompt then live in files in it, one a sequence, each page with a
    checksum that is verified when it is read; `memory` bytes of host memory hold the pages read last. A damaged page, a
    short read or a full disk ends its own sequence with an error, the others go on. The files go with the cache, unless
    `keep`.
    """
    return Policy(placement=Offload(recent, ahead, disk, memory, keep), explicit=frozenset({"placement"}))
