"""SCOPE."""

from kvjax.policies.base import Policy, Room
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.probed import DecodeRegion

STRATEGIES = ("slide", "adaptive", "discontinuous")


@method(
    title="SCOPE: Optimizing Key-Value Cache Compression in Long-context Generation",
    arxiv="2412.13649",
    tiny=dict(scorer=snapkv(window=4, kernel=3), room=4, recent=2, horizon=8),
)
def scope(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    strategy: str = "slide",
    room: int = 512,
    recent: int = 256,
    horizon: int = 4096,
) -> Policy:
    """What is kept of the prompt (by any scorer, snapkv by default) stays; generated entries have their own room.

    Of the generated entries the `recent` newest stay and those that the current query attends to most, `room` in
    all. slide: the room is there at once. adaptive: it grows from `recent` by one every
    delta = (horizon - recent) // (room - recent) steps. discontinuous: adaptive, evicting only every delta steps.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"scope: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not 0 <= recent < room:
        raise ValueError(f"scope: 0 <= recent < room is needed, got recent={recent} and room={room}")
    delta = max((horizon - recent) // (room - recent), 1)
    inner = scoring("scope", scorer, snapkv())
    slots = Room(room) if strategy == "slide" else Room(room, recent, delta)
    return wrap(
        inner,
        True,
        budget,
        scorer=DecodeRegion(inner.scorer, recent),
        evict_decode=True,
        room=slots,
        interval=delta if strategy == "discontinuous" else 1,
    )
