"""What the selectors over product codes ask: the logits of coded keys, as block maxima and log-sum-exps."""

from pallas_kernels.code_scores.ops import code_scores, has_kernel
from pallas_kernels.code_scores.reference import look_up

__all__ = ["code_scores", "has_kernel", "look_up"]
