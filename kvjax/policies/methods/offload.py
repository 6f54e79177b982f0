"""Host offload."""

from kvjax.policies.base import Policy
from kvjax.policies.placement import Offload
from kvjax.policies.registry import method


@method(title="Host memory offload", arxiv="")
def offload(recent: int = 0, ahead: bool = False) -> Policy:
    """The prompt's entries live in host memory; each step moves the chosen blocks that the last step did not read.

    Composes with any selector: `quest(read=0.1) | offload`; without one every step moves all of it. The device holds the
    index, the newest entries (those that the selector always reads and `recent` more), generated tokens and the blocks of
    the last step. ahead: choose with the
    queries that the layer before foresaw, so that a fetch waits for nothing but that layer's input.
    """
    return Policy(placement=Offload(recent, ahead), explicit=frozenset({"placement"}))
