"""The main job in one run: a question about a long text, with the full cache and with compressed ones.

    python -m launch.demo

Four magic numbers are hidden in an essay made on the spot; the embedded model is asked for them. For every
policy: what it answered, how many bytes its cache takes, and how fast it was.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from typing import Any

from absl import flags
from tqdm import tqdm

from kvjax import policies
from kvjax.generation.sampling import Sampling
from launch import cli
from launch.evaluation.report import aligned
from launch.evaluation.samples import Sample, string_match
from launch.evaluation.synthetic import ruler_sample
from launch.generate import decode_speed, warm_up
from launch.session import Session, check_model_flags, define_model_flags, open_session

POLICIES = "full;keydiff(budget=0.25);keydiff(budget=0.25) | int8;streaming_llm(budget=0.25)"
TASK = "niah_multivalue"


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("policies", POLICIES, "policy specs separated by ';'", flag_values=f)
    flags.DEFINE_integer("length", 2048, "tokens of the essay, question and answer", flag_values=f)
    flags.DEFINE_integer("seed", 0, "of the essay", flag_values=f)
    define_model_flags(f)
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=f)


def main(f: flags.FlagValues) -> None:
    """Load the model, make the essay, ask under every policy, report."""
    chosen = [policies.parse(spec) for spec in filter(str.strip, f.policies.split(";"))]
    if not chosen:
        raise ValueError("--policies is empty")
    check_model_flags(f)
    start = time.perf_counter()
    session = open_session(f)
    sample = ruler_sample(TASK, f.length, session.encode, f.seed, 0)
    prompt = session.begin() + session.encode(sample.context + sample.question)
    model = session.model.name
    print(f"{model} on {session.backend}, {session.dtype}; a prompt of {len(prompt)} tokens:\n")
    print(textwrap.indent(_shortened(sample.context + sample.question), "    "))
    print(f"\nhidden: {', '.join(sample.answers)}\n")
    rows = []
    with tqdm(total=len(chosen), desc="policies", unit="policy") as bar:
        for policy in chosen:
            rows.append(ask(session, policy, prompt, sample))
            bar.write(f"{policy.name}\n    {rows[-1]['text'].strip()}\n", file=sys.stdout)
            bar.update()
    header = ["policy", "found", "cache bytes", "of full", "first token s", "tokens/s"]
    print(aligned(header, [_cells(row) for row in rows]))
    print(f"\ndone in {time.perf_counter() - start:.0f} s, compilation included (not in the table)")
    if f.json:
        print(json.dumps({"prompt_tokens": len(prompt), "backend": session.backend, "rows": rows}))


def ask(session: Session, policy: policies.Policy, prompt: list[int], sample: Sample) -> dict[str, Any]:
    """One policy's answer and its cost, after an untimed run that compiles."""
    generator = session.generator(policy)
    tokenizer = session.model.tokenizer
    warm_up(generator, [prompt], sample.max_new_tokens, Sampling())
    (output,), filled = generator.generate([prompt], sample.max_new_tokens, stop_tokens=tokenizer.eos_ids)
    text = tokenizer.decode(output.tokens)
    return {
        "policy": policy.name,
        "text": text,
        "found": string_match(text, sample.answers),
        "cache_bytes": filled.cache_bytes,
        "full_cache_bytes": filled.full_cache_bytes,
        "ttft_s": filled.prefill_s,
        "decode_tokens_per_s": decode_speed(filled, 1),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    speed = row["decode_tokens_per_s"]
    return [
        row["policy"],
        f"{row['found']:.0%}",
        f"{row['cache_bytes']:,}",
        f"{row['cache_bytes'] / row['full_cache_bytes']:.1%}",
        f"{row['ttft_s']:.3f}",
        f"{speed:.1f}" if speed else "-",
    ]


def _shortened(text: str, ends: int = 320) -> str:
    """The first and last characters of a long text, wrapped."""
    if len(text) > 2 * ends:
        text = f"{text[:ends]} [...] {text[-ends:]}"
    return "\n".join(textwrap.fill(line, 96) for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
