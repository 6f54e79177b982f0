"""int8 storage."""

from kvjax.codecs.base import PerToken
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(title="int8 keys and values, one scale per token and head", arxiv="")
def int8() -> Policy:
    """Codes round(x / s) with s = max|x| / 127 per token, KV head and tensor; scales stay f32.

    The attention kernel multiplies logits by key scales and probabilities by value scales.
    """
    return Policy(codec=PerToken("int8"), explicit=frozenset({"codec"}))
