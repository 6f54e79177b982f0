"""Prompts of a small model whose pages lie on disk, for the tests of the disk tier."""

from __future__ import annotations

import kvjax.policies as P
from kvjax.cache import disk
from kvjax.cache.plan import Plan
from kvjax.generation.generator import Generator
from tests.toy import Toy, ragged

LM = Toy()
PARAMS = LM.init()
LENGTHS = (150, 97, 61)
QUEST = "quest(read=12, page=4, skip_layers=0)"
PAGE = 16 * 2 * 8 * 4 + 4  # 16 slots of keys and values, 8 float32 channels each, and the checksum


def on_disk(spec, folder, **kwargs):
    more = "".join(f", {k}={v!r}" for k, v in kwargs.items())
    return P.parse(f"{spec} | offload(disk={str(folder)!r}{more})")


def plan_of(policy):
    return Plan(policy, LM.shape, 3, 160, 16)


def the_store(cache):
    return disk.store(cache.disk.handle)


def prompts_of(lengths):
    tokens, _ = ragged(lengths, 160)
    return [list(map(int, row[:n])) for row, n in zip(tokens, lengths)]


def generator(policy):
    return Generator(LM, PARAMS, policy)
