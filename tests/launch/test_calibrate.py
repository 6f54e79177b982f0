"""launch.calibrate on the embedded draft model: scores against a float64 loop, files, and mistakes."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from kvjax.cache.plan import Plan
from kvjax.codecs.calibrate_capture import capture
from kvjax.policies import calibration, parse
from kvjax.policies.head_scores import SHIPPED
from launch import calibrate, cli
from launch.calibration import codecs, duo, heads, keys, queries, reads, samples
from launch.session import define_model_flags, open_session
from models.decoder import causal_attend, masked_attention

MODEL = "kvref-draft-2m"


@functools.cache
def session():
    values = flags.FlagValues()
    define_model_flags(values)
    values(["", f"--model={MODEL}"])
    return open_session(values)


def attention(tokens):
    """f64 [layers, q_heads, queries, slots] from the model's own queries and keys."""
    rows = heads.collect(session().lm, session().model.params, *samples.padded(tokens, len(tokens)), operands)
    out = []
    for q, k, scale in rows:
        q, k = np.asarray(q[0], np.float64), np.asarray(k[0], np.float64)
        k = np.repeat(k, q.shape[0] // k.shape[0], axis=0)
        logits = np.einsum("htd,hsd->hts", q, k) * float(scale)
        logits = np.where(np.tril(np.ones(logits.shape[1:], bool)), logits, -np.inf)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(e / e.sum(-1, keepdims=True))
    return np.stack(out)


def operands(x):
    return x.q, x.k, jnp.float32(x.scale)


def test_retrieval_scores_are_those_of_a_loop():
    got = heads.retrieval(session(), 1, 128, lambda n: None)
    item = samples.needle(session(), 128, 0)
    a, tokens = attention(item.tokens), np.asarray(item.tokens)
    layers, q_heads = a.shape[:2]
    plain, reasoning, semantic = (np.zeros((layers, q_heads)) for _ in range(3))
    text = session().model.tokenizer.decode(item.tokens[slice(*item.needles[0])])
    assert "special magic" in text
    for row in range(item.answer - 1, len(tokens) - 1):
        for start, end in item.needles:
            for layer in range(layers):
                for h in range(q_heads):
                    p = a[layer, h, row]
                    best = int(p.argmax())
                    if start <= best < end and tokens[best] == tokens[row + 1]:
                        plain[layer, h] += 1 / (end - start)
                    top = np.argsort(-p)[: end - start]
                    reasoning[layer, h] += p[top[(top >= start) & (top < end)]].sum() / (end - start)
                    if tokens[row + 1] in tokens[start:end]:
                        semantic[layer, h] += p[start:end].sum()
    kv = session().lm.shape.kv_heads
    np.testing.assert_allclose(got["retrieval"], plain.reshape(layers, kv, -1).mean(-1), atol=1e-6)
    np.testing.assert_allclose(
        got["retrieval_reasoning"], reasoning.reshape(layers, kv, -1).mean(-1), atol=1e-4
    )
    np.testing.assert_allclose(got["semantic"], semantic, atol=1e-3)


def test_echo_and_induction_are_those_of_a_loop():
    got = heads.echo_induction(session(), 1, 128, lambda n: None)
    tokens = samples.repeats(session(), 32, 4, 0)
    a, first = attention(tokens), len(tokens) - 128
    echo = induction = 0.0
    for i in range(first + 32, len(tokens)):
        copies = [j for j in range(first, i) if (i - j) % 32 == 0]
        echo = echo + a[:, :, i, copies].sum(-1) / 96
        induction = induction + a[:, :, i, [j + 1 for j in copies if j + 1 < i]].sum(-1) / 96
    kv = session().lm.shape.kv_heads
    grouped = lambda x: x.reshape(x.shape[0], kv, -1).max(-1)  # noqa: E731
    np.testing.assert_allclose(got["echo"], grouped(echo), atol=1e-4)
    np.testing.assert_allclose(got["induction"], grouped(induction), atol=1e-4)


def test_filters_point_away_from_most_queries():
    got = queries.filters(session(), 1, 128, lambda n: None)["filters"]
    moments = queries.moments(session(), 1, 128, lambda n: None)
    tokens = samples.plain(session(), 128, 0)
    rows = heads.collect(session().lm, session().model.params, *samples.padded(tokens, 128), queries._rotated)
    plain = heads.collect(session().lm, session().model.params, *samples.padded(tokens, 128), queries._plain)
    kv = session().lm.shape.kv_heads
    for layer, q in enumerate(rows):
        q = np.asarray(q, np.float64)
        v = []
        for x in q:
            u = np.linalg.svd(x, full_matrices=False)[2][0]
            v.append(u if ((x @ u) > 0).sum() * 2 >= len(x) else -u)
        want = -np.array(v).reshape(kv, -1, q.shape[-1]).mean(1)
        np.testing.assert_allclose(got[layer], want, atol=2e-3)
        x = np.asarray(plain[layer], np.float64)[:, 4:]
        np.testing.assert_allclose(moments["query_mean"][layer], x.mean(1), atol=1e-4)
        np.testing.assert_allclose(moments["query_cov"][layer, 0], np.cov(x[0].T), atol=1e-3)


def test_gates_of_one_give_the_full_model_and_training_lowers_them():
    tokens, positions = samples.padded(samples.plain(session(), 96, 0), 96)
    shape = session().lm.shape
    run = lambda fn: session().lm.hidden(session().model.params, tokens, positions, (), fn)[0]  # noqa: E731
    full = run(causal_attend)
    ones = jnp.ones((shape.layers, shape.kv_heads))
    np.testing.assert_allclose(run(duo.gated(ones, 4, 16)), full, atol=1e-5)
    assert np.abs(np.asarray(run(duo.gated(0 * ones, 4, 16))) - full).max() > 1e-2
    got = duo.gates(session(), 3, 320, lambda n: None, sink=4, recent=16)["duo"]
    assert got.shape == ones.shape and (got <= 1).all() and (got >= 0.9).all() and got.min() < 0.99


def test_reading_scores_are_divergences_of_restricted_answers():
    """KL in float64 of one forward pass over prompt and answer, in which one head's answer rows see little."""
    prompt, answer = samples.plain(session(), 150, 0), samples.plain(session(), 20, 1)
    shape, (lm, params) = session().lm.shape, (session().lm, session().model.params)
    tokens, positions = samples.padded(prompt + answer, len(prompt + answer))
    near = max(reads.WINDOW * len(prompt), 1.0)

    def attend(streamed):
        def fn(x, cache):
            at, pos = x.positions[0][:, None], x.positions[0]
            few = (pos < reads.SINK) | (pos > at - near) | (at < len(prompt))
            seen = (pos <= at) & (few[None] | (jnp.arange(x.k.shape[1]) != streamed[1])[:, None, None])
            return masked_attention(
                x, x.k, x.v, (seen if x.layer == streamed[0] else pos <= at)[None, :, None]
            )

        return lambda x, cache: (
            fn(x, cache) if x.layer == streamed[0] else causal_attend(x, cache)[0],
            cache,
        )

    def log_probs(streamed):
        out = np.asarray(
            lm.logits(params, lm.hidden(params, tokens, positions, (), attend(streamed))[0]), np.float64
        )
        out = out[0, len(prompt) :]
        return out - np.logaddexp.reduce(out, axis=-1, keepdims=True)

    want = log_probs((-1, 0))
    held = heads.collect(lm, params, *samples.padded(prompt, 192), reads._keys_values)
    given, at = samples.padded(answer, 64)
    at = np.where(at >= 0, at + len(prompt), -1)
    full = np.ones((3, shape.layers, shape.kv_heads), bool)
    full[1, 0, 0] = full[2, shape.layers - 1, shape.kv_heads - 1] = False
    got = np.asarray(reads.divergences(lm, params, held, given, at, np.int32(len(prompt)), full))
    for i, streamed in ((1, (0, 0)), (2, (shape.layers - 1, shape.kv_heads - 1))):
        kl = (np.exp(want) * (want - log_probs(streamed))).sum(-1).mean()
        np.testing.assert_allclose(got[i], kl, rtol=1e-3, atol=1e-6)
        assert kl > 1e-5
    assert abs(got[0]) < 1e-6
    score = reads.reading(session(), 1, 704, lambda n: None)["reading"]
    assert score.shape == full.shape[1:] and len(np.unique(score)) > 1
    assert (score >= 0).all()


def test_the_command_writes_a_file_that_only_its_model_accepts(tmp_path, capsys):
    out = tmp_path / "heads.safetensors"
    flags_ = [f"--model={MODEL}", f"--out={out}", "--samples=1", "--length=128"]
    assert cli.run(calibrate.define, calibrate.main, ["--method=headkv", *flags_]) == 0
    assert cli.run(calibrate.define, calibrate.main, ["--method=razorattention", *flags_]) == 0
    shown = capsys.readouterr().out
    arrays = calibration.load(str(out))
    assert {"retrieval", "retrieval_reasoning", "semantic", "echo", "induction"} <= arrays.keys()
    assert "echo" in shown and "fingerprint" in shown
    policy = parse(f"headkv(heads={str(out)!r}, budget=0.5)")
    assert Plan(policy, session().lm.shape, 1, 64, 0).nbytes() > 0
    with pytest.raises(ValueError, match="another model"):
        Plan(parse("headkv(budget=0.5)"), session().lm.shape, 1, 64, 0)
    shipped = SHIPPED / "kvref-22m" / "heads.safetensors"
    copy = tmp_path / "other.safetensors"
    copy.write_bytes(shipped.read_bytes())
    before = copy.read_bytes()
    assert (
        cli.run(calibrate.define, calibrate.main, ["--method=headkv", f"--model={MODEL}", f"--out={copy}"])
        == 2
    )
    assert "another model" in capsys.readouterr().err and copy.read_bytes() == before


def test_predictors_from_the_command_shrink_what_aqua_kv_stores(tmp_path):
    """On a passage of a book that was not calibrated on."""
    words = np.random.default_rng(0).choice(
        ["the", "sea", "was", "calm", "and", "a", "ship", "came", "in", "from", "far"], 4000
    )
    book = tmp_path / "book.txt"
    book.write_text(" ".join(words))
    out = str(tmp_path / "aqua.safetensors")
    given = ["--method=aqua_kv", f"--model={MODEL}", f"--out={out}", f"--texts={book}", "--samples=3"]
    assert cli.run(calibrate.define, calibrate.main, [*given, "--length=640"]) == 0
    shape = session().lm.shape
    width = shape.kv_heads * shape.head_dim
    arrays = calibration.load(out)
    assert arrays["k.1.predict"].shape == (width + 1, width)
    assert arrays["v.1.predict"].shape == (2 * width + 1, width)
    text, _ = codecs._text(session(), 640, 8, codecs.read_books(session(), [str(book)], 640))
    seen, _ = codecs._text(session(), 640, 2, codecs.read_books(session(), [str(book)], 640))
    assert text[0] == seen[0] and not np.array_equal(text, seen)
    nothing = np.zeros(text.shape, np.float32)[None]
    found, _ = capture(session().lm, session().model.params, text[None], nothing)
    (k0, v0), (k1, v1) = ([np.asarray(x, np.float64)[0, 0, 4:] for x in pair] for pair in found)
    one = np.ones((len(k0), 1))
    for target, parts, name in ((k1, (k0,), "k"), (v1, (k1, v0), "v")):
        guess = np.concatenate([*parts, one], axis=1) @ np.asarray(arrays[f"{name}.1.predict"], np.float64)
        assert np.sum((target - guess) ** 2) < 0.9 * np.sum((target - target.mean(0)) ** 2)


@pytest.mark.parametrize(
    "flag", ["--texts=nowhere.txt", "--out=", "--method=nothing", "--samples=-1", "--length=3"]
)
def test_mistakes_exit_with_two(flag, tmp_path, capsys):
    given = [f"--model={MODEL}", f"--out={tmp_path / 'x'}", flag]
    assert cli.run(calibrate.define, calibrate.main, given) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_shipped_files_are_complete():
    arrays = calibration.load(str(SHIPPED / "kvref-22m" / "heads.safetensors"))
    names = {
        "retrieval",
        "retrieval_reasoning",
        "retrieval_heads",
        "layer_errors",
        "echo",
        "induction",
        "duo",
    }
    assert names <= arrays.keys()
    # One KV head copies the needle; every score must point at it.
    for name in ("retrieval", "retrieval_reasoning", "duo"):
        assert np.unravel_index(arrays[name].argmax(), arrays[name].shape) == (7, 1)
    np.testing.assert_allclose(arrays["layer_errors"].sum(), 1, rtol=1e-5)
    stats = calibration.load(str(SHIPPED / "kvref-22m" / "queries.safetensors"))
    assert stats["filters"].shape == (12, 2, 64) and stats["query_cov"].shape == (12, 6, 64, 64)
    codes = calibration.load(str(SHIPPED / "kvref-22m" / "key_codes.safetensors"))
    assert codes["books"].shape == (12, 2, 4, 256, 16) and codes["fine_books"].shape == (12, 2, 16, 16, 4)


def test_the_basis_measures_keys_as_queries_do():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((300, 16)) * np.geomspace(0.1, 4, 16)
    k = rng.standard_normal((500, 16)) @ rng.standard_normal((16, 16))
    moment = q.T @ q
    turn = keys.basis(k, moment, 4, ridge=0.0)
    want = ((k @ q.T) ** 2).sum(-1) * 16 / np.trace(moment)
    np.testing.assert_allclose(((k @ turn) ** 2).sum(-1), want, rtol=1e-6)
    share = ((k - k.mean(0)) @ turn).var(0).reshape(4, 4)
    assert (np.diff(share, axis=1) <= 0).all()  # every slice gets one of the four largest axes, and so on


@pytest.mark.parametrize("name", ["pq_refined", "a2ats"])
def test_codebooks_from_the_command_describe_new_keys(name, tmp_path):
    """A decoded key of another text is nearer to it than the mean key is, in the norm of the queries."""
    out = str(tmp_path / "codes.safetensors")
    given = [f"--method={name}", f"--model={MODEL}", f"--out={out}", "--samples=2", "--length=512"]
    assert cli.run(calibrate.define, calibrate.main, given) == 0
    selector = parse(f"{name}(file={out!r})").selector
    shape = session().lm.shape
    selector.check(shape)
    const = selector.constants(0, shape)
    k, _ = keys._gather(session(), 3, 512, lambda n: None, distance=2048 if name == "a2ats" else 0)
    x = np.asarray(k[0, 0, -100:], np.float64)
    if name == "a2ats":
        factor = const["factor"][0].astype(np.float64)
        far = ((x[:, None] - const["codebook"][0].astype(np.float64)) @ factor) ** 2
        error, size = far.sum(-1).min(-1), (((x - x.mean(0)) @ factor) ** 2).sum(-1)
    else:
        x = (x - const["mean"][0]) @ const["turn"][0].astype(np.float64)
        left = x.copy()
        for level in ("books", "fine_books"):
            words = const[level][0].astype(np.float64)
            part = left.reshape(len(x), len(words), 1, -1)
            at = ((part - words) ** 2).sum(-1).argmin(-1)
            left -= np.stack([w[at[:, i]] for i, w in enumerate(words)], 1).reshape(x.shape)
        error, size = (left**2).sum(-1), ((x - x.mean(0)) ** 2).sum(-1)
    assert error.mean() < 0.5 * size.mean()
