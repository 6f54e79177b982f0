"""What a user gets wrong: one line that names the method and says what to change."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.cache.plan import Plan
from kvjax.policies import Observation, Policy, parse
from kvjax.policies.registry import build
from kvjax.policies.scorers.attention import LastQuery
from kvjax.types import ModelShape
from launch import cli, generate
from launch import eval as evaluation
from tests.policies.observations import OBS

SHAPE = ModelShape(4, 8, 4, 64, (None,) * 4)


@pytest.mark.parametrize(
    "spec, words",
    [
        # A method's own name, not that of an unnamed policy, and what is protected.
        ("snapkv(budget=16)", "snapkv: budget=16 is below the 32 entries that are always kept"),
        ("adakv(taskkv(budget=100))", "taskkv: budget=100 is below the 272"),
        ("compactor(budget=5)", "compactor: budget=5 is below the 12"),
        ("tova(recent=-1)", "tova: recent must be at least 0"),
        ("h2o(budget=0)", "h2o: budget must be at least 1"),
        ("keydiff(budget=1.5)", "keydiff: a float budget is a fraction"),
        # Unknown names, the closest first.
        ("snapvk", "unknown policy 'snapvk'; known, closest first: snapkv,"),
        ("SnapKV(budget=0.5)", "closest first: snapkv,"),
        ("snapkv(budget=0.5) | piramidkv", "closest first: pyramidkv,"),
        ("h2o(recnt=4)", "h2o has no argument 'recnt'; allowed, closest first: recent,"),
        # Ranges.
        ("cap(future=0)", "cap: future must be at least 1"),
        ("nacl(proxy=0)", "nacl: proxy must be at least 1"),
        ("cur(block=-1)", "cur: block must be at least 0"),
        ("roco(prefill_share=2.0)", "roco: shares must be in"),
        ("non_causal_attn(chunk=0)", "non_causal_attn: chunk must be at least 1"),
        ("compactor(sketch=0)", "compactor: chunk and sketch must be positive"),
        # Compositions.
        ("adakv(kivi)", "'kivi' does not score entries; give it a scorer such as snapkv"),
        ("snapkv | h2o", "exclude each other: both set the scorer"),
        ("finch | adakv", "set rerotate=False or use the uniform allocator"),
        ("quest | h2o", "set evict_decode=False"),
        ("decoding(expected_attention)", "choose a scorer that also works while decoding"),
        # Models.
        ("headkv(heads=((1.0, 2.0), (3.0, 4.0)))", "a table of 2 x 2, the model has 4 layers and 4 KV heads"),
        ("per_layer(layer_budgets=(0.5, 0.5))", "has 2 entries, the model has 4 layers"),
        ("compresskv(heads=((1, 2),))", "query heads 0 to 7 for each of 4 layers"),
        ("compresskv(heads=((8,), (0,), (0,), (0,)))", "query heads 0 to 7 for each of 4 layers"),
        ("qfilters(file='nowhere')", "calibration file 'nowhere' does not exist; write it with"),
        ("h2o | kivi", "use a codec of single tokens"),
        ("duoattention", "another model"),
    ],
)
def test_one_line_says_what_to_change(spec, words):
    with pytest.raises(ValueError, match=words) as e:
        Plan(parse(spec), SHAPE, 1, 256, 16).specs()
    assert "\n" not in str(e.value)


def test_a_scorer_may_be_a_spec():
    got = build("adakv", scorer="snapkv(window=8) | int8", budget=0.25)
    assert got.scorer == parse("snapkv(window=8)").scorer and got.budget == 0.25
    assert isinstance(build("block", scorer="l2norm"), Policy)


def test_cur_without_blocks():
    """block=0 leaves norms as they are: a score is a share of all."""
    got = np.asarray(parse("cur(block=0, kind=key)").scorer.score(OBS, {})[0])
    norm = np.where(OBS.valid, np.sum(np.asarray(OBS.k) ** 2, axis=-1), 0.0)
    want = norm / norm.sum(-1, keepdims=True)
    np.testing.assert_allclose(got[np.asarray(OBS.valid)], want[np.asarray(OBS.valid)], rtol=1e-5)


def test_a_missing_observation_is_named():
    bare = Observation(q=None, q_pos=None, k=OBS.k, v=OBS.v, pos=OBS.pos, length=OBS.length)
    with pytest.raises(ValueError, match="observes 'q', which the caller did not supply"):
        LastQuery().score(bare, {})


@pytest.mark.parametrize(
    "spec", ["snapkv(budget=16)", "snapvk", "h2o(recnt=4)", "adakv(scorer=3)", "snapkv | h2o"]
)
@pytest.mark.parametrize(
    "command, flags",
    [(generate, ["--prompt=a few words", "--policy="]), (evaluation, ["--tasks=needle:256", "--policies="])],
    ids=["generate", "eval"],
)
def test_commands_end_with_code_2_and_one_line(command, flags, spec, capsys):
    assert cli.run(command.define, command.main, [flags[0], flags[1] + spec]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
