"""Budgets per layer, given explicitly."""

from kvjax.policies.allocators.tables import LayerTable, check_entries
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.keydiff import keydiff
from kvjax.policies.registry import method


@method(title="Budgets per layer", arxiv="", tiny=dict(layer_budgets=(0.5, 12)))
def per_layer(
    layer_budgets: tuple[int | float, ...] = (0.5,) * 12, scorer: Policy | str | None = None
) -> Policy:
    """Layer i keeps layer_budgets[i] entries per KV head (int) or that fraction of the prompt (float).

    kvpress' PerLayerCompression, whose ratios are 1 - budget. The default list fits kvref-22m's 12 layers; the
    default scorer is keydiff.
    """
    inner = scoring("per_layer", scorer, keydiff())
    table = LayerTable(check_entries("layer_budgets", layer_budgets))
    return wrap(inner, scorer is not None, 1.0, allocator=table)
