"""Budgets per layer and head, given explicitly."""

from kvjax.policies.allocators.tables import HeadTable, check_entries
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.keydiff import keydiff
from kvjax.policies.registry import method


@method(title="Budgets per layer and head", arxiv="", tiny=dict(head_budgets=((0.25, 20), (7, 0.6))))
def per_head(
    head_budgets: tuple[tuple[int | float, ...], ...] = ((0.5, 0.5),) * 12, scorer: Policy | str | None = None
) -> Policy:
    """KV head h of layer i keeps head_budgets[i][h] entries (int) or that fraction of the prompt (float).

    Entries live in the Ragged layout. The default table fits kvref-22m; the default scorer is keydiff.
    """
    inner = scoring("per_head", scorer, keydiff())
    if not head_budgets or not all(head_budgets):
        raise ValueError("per_head: head_budgets is a list of layers, each with one budget a KV head")
    table = HeadTable(tuple(check_entries("head_budgets", row) for row in head_budgets))
    return wrap(inner, scorer is not None, 1.0, allocator=table)
