"""ShadowKV."""

from kvjax.policies.base import Policy
from kvjax.policies.placement import Offload
from kvjax.policies.registry import method
from kvjax.policies.selectors.low_rank import LowRankKeys


@method(
    title="ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
    arxiv="2410.21465",
    tiny=dict(read=16, chunk=4, rank=16, outliers=1, recent=4),
)
def shadowkv(
    read: int | float = 2048,
    chunk: int = 8,
    rank: int = 160,
    outliers: int = 48,
    recent: int = 32,
    ahead: bool = False,
) -> Policy:
    """Low-rank keys before RoPE on the device, values fetched from host memory for the chunks that landmarks choose.

    read: entries per step and KV head, the newest `recent` included; `outliers` chunks beside them stay exact on the device.
    The decomposition covers all KV heads side by side, through the eigenvectors of K^T K. Unlike the paper, new tokens join
    the landmarks, so that a long output stays selectable; keys are in host memory too, for questions after the prompt.
    ahead: choose with the queries that the layer before foresaw. With `offload(disk=...)` up to 15 more of the newest entries
    stay on the device (whole pages leave it), so that their keys are exact instead of low-rank.
    """
    selector = LowRankKeys(read=read, recent=recent, chunk=chunk, rank=rank, outliers=outliers)
    return Policy(selector=selector, placement=Offload(ahead=ahead), explicit=frozenset({"selector"}))
