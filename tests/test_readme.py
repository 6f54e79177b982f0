"""The README's table is the registry's, and its example runs."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from launch.policies import BEGIN, END, table

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_policy_table_is_current():
    inside = README.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert inside == table(), "run `python -m launch.policies --write=README.md`"


def test_the_foreign_attention_example_keeps_what_the_policy_says():
    code = next(
        c for c in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "def compress" in c
    )
    assert len(code.strip().splitlines()) <= 21
    scope: dict = {}
    exec(code, scope)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, h, 160, 16)).astype(np.float32) for h in (4, 2, 2))
    positions = np.stack([np.arange(160), np.r_[np.arange(150), np.full(10, -1)]]).astype(np.int32)
    new_k, _, kept = scope["compress"](*map(jnp.asarray, (q, k, v, positions)))
    assert new_k.shape == (2, 2, 40, 16)
    for row, n in ((0, 160), (1, 150)):
        for head in range(2):
            pos = np.asarray(kept)[row, head]
            pos = pos[pos >= 0]
            assert len(pos) == int(n * 0.25) and (np.diff(pos) > 0).all()
            assert set(range(4)) <= set(pos) and set(range(n - 32, n)) <= set(pos)
            unit = k[row, head, :n] / np.linalg.norm(k[row, head, :n], axis=1, keepdims=True)
            anchor = unit.mean(0)
            score = -unit @ anchor
            free = [p for p in pos if 4 <= p < n - 32]
            others = [p for p in range(4, n - 32) if p not in free]
            assert score[free].min() >= score[others].max() - 1e-6
            np.testing.assert_array_equal(np.asarray(new_k)[row, head, : len(pos)], k[row, head, pos])
