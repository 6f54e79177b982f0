"""Which blocks a decode step reads: the numbers of the largest scores of every row."""

from pallas_kernels.select.ops import select_top

__all__ = ["select_top"]
