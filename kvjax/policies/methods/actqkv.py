"""ActQKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.blocks import ProbeBlocks


@method(
    title="Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference",
    arxiv="2502.13542",
    tiny=dict(read=16, block=4, best=2, local=8, sink=4, recent=4, window=4),
)
def actqkv(
    read: int | float = 2048,
    window: int = 16,
    cutoff: bool = True,
    block: int = 32,
    best: int = 4,
    local: int = 4096,
    sink: int = 32,
    recent: int = 32,
    skip_layers: int = 0,
) -> Policy:
    """InfLLM's blocks, ranked by a probe that leans to the unusual ones of the last `window` queries.

    probe = sum_i w_i q_i, w_i proportional to sum_c ((q_ic - mean_c) / std_c)^2. cutoff: layers whose ranking is peaked (low
    entropy over blocks) read fewer of them; the paper hands what they save to flat layers, here `read` is the most that
    a layer reads. The paper ranks per window of the prompt too, here only while decoding. Each KV head chooses by
    the sum of its query heads' scores (the paper does not say).
    """
    selector = ProbeBlocks(
        read,
        sink,
        recent,
        skip_layers,
        block=block,
        best=best,
        local=local,
        window=window,
        cutoff=cutoff,
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
