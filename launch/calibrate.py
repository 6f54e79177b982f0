"""Measure what a method must know of a model, and write it to a calibration file.

    python -m launch.calibrate --method=headkv --model=kvref-22m --out=heads.safetensors

Texts are generated, or files (--texts, for codecs); nothing is downloaded. A file of the same model that exists already
gains the new arrays; one of another model is refused. The file carries the model's fingerprint, and policies refuse it
for another model.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from kvjax.policies import calibration
from launch import cli
from launch.calibration import codecs, duo, heads, keys, queries, reads
from launch.session import Session, define_model_flags, open_session

# method -> (samples, tokens of each) that make a usable file; --samples and --length replace them
SIZES = {
    "qfilters": (8, 1024),
    "expected_attention": (8, 1024),
    "headkv": (48, 448),
    "headkv_r2": (48, 448),
    "compresskv": (48, 448),
    "razorattention": (8, 1024),
    "duoattention": (200, 448),
    "head_reads": (16, 2048),
    "pq_refined": (24, 7936),
    "a2ats": (12, 4096),
    **{method: (48, 2048) for method in codecs.METHODS},
}


def measure(
    method: str,
    session: Session,
    count: int,
    length: int,
    step: Callable[[int], Any],
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """The arrays that `method` reads, by name. texts: files that codecs are calibrated on beside generated tasks."""
    if method == "qfilters":
        return queries.filters(session, count, length, step)
    if method == "expected_attention":
        return queries.moments(session, count, length, step)
    if method == "razorattention":
        return heads.echo_induction(session, count, length, step)
    if method == "duoattention":
        return duo.gates(session, count, length, step)
    if method == "head_reads":
        return reads.reading(session, count, length, step)
    if method == "pq_refined":
        return keys.key_codes(session, count, length, step)
    if method == "a2ats":
        return keys.a2ats(session, count, length, step)
    if method in codecs.METHODS:
        return codecs.arrays(method, session, count, length, step, texts)
    found = heads.retrieval(session, count, length, step)
    if method == "compresskv":
        found |= heads.layer_errors(session, count, length, found["retrieval_heads"], step)
    return found


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_enum("method", "headkv", sorted(SIZES), "the method to calibrate", flag_values=f)
    flags.DEFINE_string("out", "", "file to write (.safetensors)", flag_values=f)
    flags.DEFINE_integer("samples", 0, "texts to measure on (0: the method's own number)", flag_values=f)
    flags.DEFINE_integer("length", 0, "tokens of a text (0: the method's own length)", flag_values=f)
    flags.DEFINE_list(
        "texts",
        [],
        "text files for codecs, in place of generated sentences (a third of the samples)",
        flag_values=f,
    )
    define_model_flags(f)


def main(f: flags.FlagValues) -> None:
    """Check the flags, load the model, measure, write."""
    if not f.out:
        raise ValueError("--out=FILE is needed: where to write the calibration")
    if f.samples < 0 or f.length < 0:
        raise ValueError(f"--samples and --length must not be negative, got {f.samples} and {f.length}")
    count, length = f.samples or SIZES[f.method][0], f.length or SIZES[f.method][1]
    if length < 96:
        raise ValueError(f"--length must be at least 96 tokens, got {length}")
    if f.texts and f.method not in codecs.METHODS:
        raise ValueError(f"--texts is for codecs ({', '.join(codecs.METHODS)}), not for {f.method}")
    session = open_session(f)
    limit = session.lm.shape.max_context
    if length + 64 > limit:
        raise ValueError(f"--length={length} and an answer do not fit the model's context of {limit}")
    mark = calibration.fingerprint(session.lm.shape, session.model.fingerprint)
    old = calibration.load(f.out, mark) if pathlib.Path(f.out).exists() else {}
    rounds = 2 if f.method == "compresskv" else 1
    with tqdm(total=count * rounds, desc=f.method, unit="text", disable=None) as bar:
        found = measure(f.method, session, count, length, bar.update, f.texts)
    arrays = {**old, **{n: np.asarray(x) for n, x in found.items()}}
    calibration.save(f.out, arrays, mark, {"model": session.model.name})
    for name in sorted(found):
        print(f"{name} {list(found[name].shape)} {found[name].dtype}")
    print(f"{f.out}: {len(arrays)} arrays, fingerprint {mark}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
