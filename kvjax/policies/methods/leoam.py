"""LeoAM."""

from kvjax.policies.base import Policy
from kvjax.policies.placement import Offload
from kvjax.policies.registry import method
from kvjax.policies.selectors.pyramid import BoundsPyramid


@method(
    title="Breaking the Boundaries of Long-Context LLM Inference: Adaptive KV Management on a Single Commodity GPU",
    arxiv="2506.20187",
    tiny=dict(read=16, chunk=8, rounds=1, skip_layers=0),
)
def leoam(
    read: int | float = 0.2, chunk: int = 128, rounds: int = 3, widen: float = 2.0, skip_layers: int = 2
) -> Policy:
    """Chunks of `chunk` entries, halved `rounds` times where their bound of q.k is high; host memory or disk holds the entries.

    bound(q, chunk) = sum_c max(q_c k_max_c, q_c k_min_c). Each round halves the best chunks of `widen` times `read`
    entries. The paper's first two layers read half of everything in chunks of 8; here they read everything, on the device.
    The three tiers of the paper, device, host and disk: `leoam | offload(disk=DIRECTORY, memory=BYTES)`. Bounds stay on the
    device; only chunks of the last round's size that are chosen are read, whatever the size of the chunk they came from.
    They move as they are stored, and when their layer's turn comes, unless `offload(ahead=True)`.
    """
    selector = BoundsPyramid(read=read, skip_layers=skip_layers, chunk=chunk, rounds=rounds, widen=widen)
    return Policy(selector=selector, placement=Offload(), explicit=frozenset({"selector"}))
