"""The uncompressed cache."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(title="Full cache", arxiv="")
def full() -> Policy:
    """Every token is kept in the model's dtype: the reference that other policies are measured against."""
    return Policy()
