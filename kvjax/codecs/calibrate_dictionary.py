"""NeuralDict, the offline dictionary of CSR: atoms by gradient descent through matching pursuit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.codecs.dictionary import pick, pursue


@functools.partial(jax.jit, static_argnames=("terms", "steps", "batch"))
def learn(
    x: jax.Array, start: jax.Array, key: jax.Array, *, terms: int, steps: int, batch: int = 512
) -> jax.Array:
    """Unit atoms [kv_heads, N, d] that reconstruct x [kv_heads, n, d] from `terms` of them.

    Loss |x - D r|^2 + beta |I - D D^T|^2 / N^2, beta = clip(0.1 L_mse / L_div, 0, 1); Adam, atoms renormalised
    after each step.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    n_atoms = start.shape[1]

    def unit(a: jax.Array) -> jax.Array:
        return a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)

    def loss(atoms: jax.Array, part: jax.Array) -> jax.Array:
        index, value, _ = pursue(part[None], jax.lax.stop_gradient(atoms), terms)
        value = jax.lax.stop_gradient(value)
        error = part - jnp.sum(pick(atoms, index) * value[..., None], axis=-2)[0]
        mse = jnp.mean(jnp.sum(error * error, axis=-1))
        gram = jnp.einsum("hnd,hmd->hnm", atoms, atoms) - jnp.eye(n_atoms)
        spread = jnp.mean(jnp.sum(gram * gram, axis=(1, 2))) / n_atoms**2
        beta = jnp.clip(0.1 * mse / jnp.maximum(spread, 1e-12), 0.0, 1.0)
        return mse + jax.lax.stop_gradient(beta) * spread

    def step(carry, key):
        atoms, state = carry
        part = x[:, jax.random.randint(key, (batch,), 0, x.shape[1])]
        updates, state = optimiser.update(jax.grad(loss)(atoms, part), state)
        return (unit(optax.apply_updates(atoms, updates)), state), None

    atoms = unit(start)
    (atoms, _), _ = jax.lax.scan(step, (atoms, optimiser.init(atoms)), jax.random.split(key, steps))
    return atoms


def dictionaries(
    samples: dict[str, np.ndarray], *, atoms: int = 512, terms: int = 4, steps: int = 400, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays of a calibration file for `Dictionary`: keys as a whole, values in two chunks."""
    out, key = {}, jax.random.key(seed)
    for side, chunks in (("k", 1), ("v", 2)):
        for layer in range(samples[side].shape[0]):
            x = samples[side][layer].astype(np.float32)
            x = jnp.asarray(x.reshape(x.shape[0], -1, x.shape[-1] // chunks))
            key, pick_key, learn_key = jax.random.split(key, 3)
            start = x[:, jax.random.choice(pick_key, x.shape[1], (atoms,), replace=False)]
            found = learn(x, start, learn_key, terms=max(terms // chunks, 1), steps=steps)
            out[f"{side}.{layer}.atoms"] = np.asarray(found, np.float16)
    return out
