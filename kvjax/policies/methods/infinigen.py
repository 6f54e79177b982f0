"""InfiniGen."""

from kvjax.policies.base import Policy
from kvjax.policies.placement import Offload
from kvjax.policies.registry import method
from kvjax.policies.selectors.partial import PartialChannels


@method(
    title="InfiniGen: Efficient Generative Inference of Large Language Models with Dynamic KV Cache Management",
    arxiv="2406.19707",
    tiny=dict(read=12, skip_layers=0),
)
def infinigen(
    read: int | float = 0.2,
    ratio: float = 0.2,
    alpha: float = 4.0,
    skip_layers: int = 2,
    recent: int = 1,
    ahead: bool = True,
) -> Policy:
    """Entries whose logits, foreseen a layer ahead from `ratio` of the skewed channels, are within `alpha` of the largest.

    alpha: the paper's 4 is for OPT, it has 5 for Llama-2. read: the most entries per step and KV head (the paper's 20% of the
    tokens; its fast code takes 400). The skew comes from
    the prompt itself instead of a calibration prompt, so no constants are shipped; the next layer's whole query projection
    is read where the paper reads `ratio` of it. The first `skip_layers` layers read everything and stay on the device.
    """
    selector = PartialChannels(
        read=read, recent=recent, skip_layers=skip_layers, ratio=ratio, alpha=alpha, ahead=ahead
    )
    return Policy(selector=selector, placement=Offload(), explicit=frozenset({"selector"}))
