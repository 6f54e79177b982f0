"""What a compression policy may look at: how much attention every slot received."""

from pallas_kernels.observe.ops import column_mass, column_reduce, window_mass, window_probs

__all__ = ["column_mass", "column_reduce", "window_mass", "window_probs"]
