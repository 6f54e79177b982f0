"""Samples through a model: contexts compressed in a batch, then questions, then greedy answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies
from kvjax.cache import traffic
from kvjax.generation import engine
from kvjax.generation.buckets import bucket
from kvjax.generation.generator import Generator
from kvjax.generation.generator import Session as Filled
from kvjax.generation.packing import pad_right
from kvjax.sharding import to_host
from launch.evaluation.runner import Cost
from launch.evaluation.samples import Sample
from launch.evaluation.tasks import Window
from launch.session import Session, compilations, on_mesh


class ModelEngine:
    """`runner.Engine` on a loaded model.

    Call `prepare` with the samples first.

    query_aware: compress context and question together, all but the question's last token. Otherwise the
    context is compressed alone, and the policy cannot know what will be asked. select_question: the question is fed token
    by token, so that a selector chooses for its tokens too.
    """

    def __init__(self, session: Session, *, query_aware: bool = False, select_question: bool = False) -> None:
        self.session, self.query_aware, self.select_question = session, query_aware, select_question
        self._generators: dict[str, Generator] = {}
        self._reserve = 1

    def _generator(self, policy: str) -> Generator:
        if policy not in self._generators:
            self._generators = {policy: self.session.generator(policies.parse(policy))}
        return self._generators[policy]

    def split(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Tokens that are compressed, and tokens that follow."""
        context = self.session.begin() + self.session.encode(sample.context)
        question = self.session.encode(sample.question)
        if not question:
            raise ValueError(f"{sample.task}: a sample has an empty question")
        return (context + question[:-1], question[-1:]) if self.query_aware else (context, question)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Reserve room for the longest question and answer of these samples, so that all share programs.

        ValueError when a sample with its answer is longer than the model's context.
        """
        limit = self.session.lm.shape.max_context
        for sample in samples:
            context, question = self.split(sample)
            after = len(question) + sample.max_new_tokens
            if len(context) + after > limit:
                raise ValueError(
                    f"{sample.task}: a sample needs {len(context) + after} tokens with its answer, "
                    f"{self.session.model.name} has a context of {limit}; nothing was truncated"
                )
            self._reserve = max(self._reserve, after)

    def answer(self, policy: str, samples: Sequence[Sample]) -> tuple[list[str], Cost]:
        """Greedy answers, one a sample."""
        tokenizer = self.session.model.tokenizer
        before = compilations()
        contexts, questions = zip(*(self.split(s) for s in samples))
        limits = [s.max_new_tokens for s in samples]
        free = self.session.lm.shape.max_context - max(len(c) for c in contexts)
        filled = self._generator(policy).prefill(contexts, min(self._reserve, free))
        filled.extend(questions, stepwise=self.select_question)
        outputs = filled.decode(limits, stop_tokens=tokenizer.eos_ids)
        return [tokenizer.decode(o.tokens) for o in outputs], self._cost(filled, before)

    def negative_log_likelihood(self, policy: str, windows: Sequence[Window]) -> tuple[list[float], Cost]:
        """Mean over each window's targets, in nats: context compressed, targets fed as given (one at a time where a
        selector chooses for each)."""
        before = compilations()
        generator = self._generator(policy)
        contexts = [self.session.begin() + list(w.context) for w in windows]
        targets = [list(w.targets) for w in windows]
        width = bucket(max(len(t) for t in targets), 32)
        generator.check([len(c) + len(t) for c, t in zip(contexts, targets)], 0)
        filled = generator.prefill(contexts, width)
        tokens, positions = pad_right([t[:-1] for t in targets], width)
        starts = to_host(filled.cache.next_position)[:, None]
        start = time.perf_counter()
        with on_mesh(generator.mesh):
            if filled.plan.policy.selector is not None:
                logits, filled.cache = engine.feed(
                    generator.lm,
                    filled.plan,
                    generator.params,
                    filled.cache,
                    tokens,
                    positions >= 0,
                    all_logits=True,
                    implementation=generator.implementation,
                    host=filled.host,
                )
            else:
                logits, filled.cache = engine.extend(
                    generator.lm,
                    filled.plan,
                    generator.params,
                    filled.cache,
                    tokens,
                    np.where(positions >= 0, positions + starts, -1),
                    compress=False,
                    all_logits=True,
                    implementation=generator.implementation,
                    host=filled.host,
                )
            wanted = pad_right(targets, width)
            losses = to_host(_losses(filled.logits, logits, *wanted))
        filled.decode_s = time.perf_counter() - start
        return [float(x) for x in losses], self._cost(filled, before)

    def _cost(self, filled: Filled, before: int) -> Cost:
        return Cost(
            cache_bytes=filled.cache_bytes,
            full_cache_bytes=filled.full_cache_bytes,
            read_fraction=traffic.read_fraction(filled.plan, filled.cache),
            prefill_s=filled.prefill_s,
            decode_s=filled.decode_s,
            warm=compilations() == before,
            moved_bytes=filled.moved_bytes,
            disk_bytes=filled.disk_bytes,
            errors=filled.errors,
        )


@jax.jit
def _losses(first: jax.Array, rest: jax.Array, targets: jax.Array, positions: jax.Array) -> jax.Array:
    """Mean negative log-likelihood f32 [batch] of targets [batch, tokens] (position -1 = padding).

    first f32 [batch, vocab] predicts targets[:, 0]; rest f32 [batch, tokens, vocab] the ones that follow.
    """
    logits = jnp.concatenate([first[:, None], rest[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    valid = positions >= 0
    return jnp.sum(jnp.where(valid, losses, 0.0), axis=1) / jnp.sum(valid, axis=1)
