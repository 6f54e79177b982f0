"""Static shapes: lengths are rounded up to a few sizes, so that requests share compiled programs."""

from __future__ import annotations


def bucket(n: int, smallest: int = 64) -> int:
    """The smallest size >= n among `smallest` * {1, 1.25, 1.5, 1.75} * 2^i: at most 25% padding above `smallest`.

    >>> bucket(1), bucket(65), bucket(4000)
    (64, 80, 4096)
    """
    if n < 1:
        raise ValueError(f"a length must be positive, got {n}")
    size = smallest
    while size * 2 < n:
        size *= 2
    for quarter in (4, 5, 6, 7, 8):
        if size * quarter // 4 >= n:
            return size * quarter // 4
    raise AssertionError
