"""How much of the attention each selector finds: recall against exact top-k, policy by policy.

    python tools/selector_recall.py --tasks=ruler_synthetic:4096 --limit=1 --policies='quest(read=0.1);clusterkv(read=0.1)'

The model runs with full attention and given answers; at every answer token each layer's selector chooses, and the
choice is compared with exact logits. Per policy, mean over layers with a selector, KV heads and tokens:

read: bytes of a step, index included, of the full cache's. recall: of the k entries of largest attention (largest softmax of
the query heads of a KV head) the share that is read, k = entries read. mass: attention probability on what is read, mean
over query heads. sharp: of the entries with a probability of 0.15 or more, the share that is read: those that heads copy from.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kvjax import attend, policies
from kvjax.cache import selecting, traffic
from kvjax.cache.plan import Plan
from kvjax.cache.read import stored_attention
from kvjax.compress import finish
from kvjax.generation import engine
from kvjax.generation.buckets import bucket
from kvjax.generation.generator import pad_right
from launch import cli
from launch.eval import read_policies
from launch.evaluation.report import aligned
from launch.evaluation.samples import Sample
from launch.evaluation.tasks import Source, parse_tasks
from launch.session import define_model_flags, open_session

SHARP = 0.15


@functools.partial(jax.jit, static_argnums=(0, 1))
def observed_step(lm, plan, params, cache, token):  # type: ignore[no-untyped-def]
    """(cache, sums f32 [6] of recall, heads, mass, query heads, sharp entries read, sharp entries) of one step."""
    sums = []

    def step(x, cache):  # type: ignore[no-untyped-def]
        if not selecting.active(plan, x.layer):
            return attend.decode(plan)(x, cache)
        cache = attend._append(plan, cache, x)
        table, cache = selecting.choose(plan, cache, x)
        sums.append(compare(plan, cache, x, table))
        return stored_attention(plan, cache, x)[0], attend._remember(plan, cache, x)

    cache = engine._with_tokens(plan, cache, token[:, None])
    positions = cache.next_position[:, None]
    _, cache = lm.hidden(params, token[:, None], positions, cache, step)
    return finish(plan, cache, positions), sum(sums)


def compare(plan, cache, x, table):  # type: ignore[no-untyped-def]
    """The sums of `observed_step` for one layer."""
    entries = selecting.stored_entries(plan, cache, x.layer, x.inv_freq)
    b, h, n, d = entries.k.shape
    slots = selecting.slot_numbers(table, plan.block(x.layer))
    slots = jnp.where(jnp.repeat(table, plan.block(x.layer), axis=2) < 0, n, slots)
    read = jax.vmap(jax.vmap(lambda i: jnp.zeros((n,), bool).at[i].set(True, mode="drop")))(slots)
    valid = entries.pos >= 0
    read &= valid
    q = x.q.reshape(b, h, -1, d).astype(jnp.float32)
    logits = jnp.einsum("bhgd,bhnd->bhgn", q, entries.k.astype(jnp.float32), precision="highest") * x.scale
    p = jax.nn.softmax(jnp.where(valid[:, :, None], logits, -jnp.inf), axis=-1)
    best = jnp.where(valid, jnp.max(p, axis=2), -1.0)
    count = jnp.sum(read, axis=-1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(-best, axis=-1), axis=-1)
    found = jnp.sum(read & (rank < count), axis=-1) / jnp.maximum(count[..., 0], 1)
    sharp = p >= SHARP
    return jnp.stack(
        [
            jnp.sum(found),
            jnp.float32(found.size),
            jnp.sum(jnp.where(read[:, :, None], p, 0)),
            jnp.float32(b * h * p.shape[2]),
            jnp.sum(sharp & read[:, :, None], dtype=jnp.float32),
            jnp.sum(sharp, dtype=jnp.float32),
        ]
    )


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("tasks", "ruler_synthetic:4096", "as for launch.eval", flag_values=f)
    flags.DEFINE_string("policies", "quest(read=0.1)", "policy specs separated by ';'", flag_values=f)
    flags.DEFINE_integer("limit", 1, "samples per task", flag_values=f)
    flags.DEFINE_integer("seed", 0, "of the tasks that are generated", flag_values=f)
    define_model_flags(f)


def main(f: flags.FlagValues) -> None:
    """Samples through every policy, then the table."""
    session = open_session(f)
    tasks = parse_tasks(f.tasks, Source(session.encode, f.limit, f.seed, 1024, 1024))
    samples = [item for task in tasks for item in task.items if isinstance(item, Sample)]
    lines = []
    for spec in read_policies(f.policies):
        policy = policies.parse(spec)
        if policy.selector is None:
            raise ValueError(f"{spec} has no selector")
        sums, read = np.zeros(6), []
        for sample in samples:
            context = session.begin() + session.encode(sample.context)
            question = session.encode(sample.question)
            answer = session.encode(" " + ", ".join(sample.answers))[: sample.max_new_tokens]
            reserve = bucket(len(question) + sample.max_new_tokens)
            plan = Plan(policy, session.lm.shape, 1, bucket(len(context)), reserve)
            params = session.model.params
            _, cache = engine.prefill(session.lm, plan, params, *pad_right([context], plan.prompt))
            tokens, positions = pad_right([question], bucket(len(question)))
            positions = np.where(positions >= 0, positions + len(context), -1)
            _, cache = engine.extend(session.lm, plan, params, cache, tokens, positions, compress=False)
            for token in answer:
                cache, new = observed_step(session.lm, plan, params, cache, jnp.asarray([token], jnp.int32))
                sums += np.asarray(new, np.float64)
            read.append(traffic.read_fraction(plan, cache))
        found = [sums[0] / sums[1], sums[2] / sums[3], sums[4] / max(sums[5], 1)]
        lines.append([spec, f"{np.mean(read):.3f}", *(f"{x:.3f}" for x in found)])
        print(*lines[-1], file=sys.stderr, flush=True)
    print(aligned(["policy", "read", "recall", "mass", "sharp"], lines))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
