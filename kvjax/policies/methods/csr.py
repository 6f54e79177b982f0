"""CSR."""

from kvjax.codecs.dictionary import Dictionary
from kvjax.codecs.quantizers import Pair
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="CSR: Achieving 1 Bit Key-Value Cache via Sparse Representation",
    arxiv="2412.11741",
    tiny=dict(calibration="random", terms=2, atoms=32),
)
def csr(terms: int = 4, atoms: int = 512, calibration: str = "", residual: int = 32, sink: int = 4) -> Policy:
    """A key before RoPE is `terms` (atom, coefficient) pairs over a learned dictionary, found by matching pursuit.

    Values are cut into two chunks with half as many pairs each. An index and a float16 coefficient take 32 bits:
    32 terms / head_dim bits an element (the paper's CSR-8 at head_dim 128 is 2 bits). The dictionary of each layer
    and head is learned offline and shared by all requests; the paper adds atoms sampled from each prompt.
    calibration: a path; default the shipped dictionary; 'random': `atoms` random unit atoms.
    """
    if terms < 2 or terms % 2:
        raise ValueError(f"csr: terms must be even and at least 2, got {terms}")
    file = "" if calibration == "random" else calibration or "csr"
    k, v = Dictionary(terms, 1, atoms, file), Dictionary(terms // 2, 2, atoms, file)
    return Policy(codec=Pair(k, v, residual, sink, pre_rope=True), explicit=frozenset({"codec"}))
