"""Generate text with a compressed KV cache.

    python -m launch.generate --policy='snapkv(budget=0.25) | int8' --prompt='Once upon a time'

The text and what it cost go to stdout; with --json the last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from kvjax import policies
from kvjax.cache.prefix import Prefix
from kvjax.generation.generator import Generator, Output
from kvjax.generation.generator import Session as Filled
from kvjax.generation.sampling import Sampling
from launch import cli
from launch.session import Session, check_model_flags, define_model_flags, open_session
from models.tokenizer import StreamDecoder, Tokenizer


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string(
        "policy",
        "full",
        "how the cache is compressed: name(arg=value, ...), composed with ' | '",
        flag_values=f,
    )
    flags.DEFINE_multi_string("prompt", [], "text to continue; several flags make one batch", flag_values=f)
    flags.DEFINE_string("prompt_file", "", "file with the text to continue (UTF-8)", flag_values=f)
    flags.DEFINE_string(
        "shared_prefix_file",
        "",
        "file with text that every prompt follows (UTF-8); its cache is stored and read once for all prompts",
        flag_values=f,
    )
    flags.DEFINE_bool("packing", False, "let short prompts share rows of the prefill", flag_values=f)
    flags.DEFINE_integer("max_new_tokens", 64, "most tokens to generate per prompt", flag_values=f)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", flag_values=f)
    flags.DEFINE_integer("top_k", 0, "sample from the k best tokens (0: all)", flag_values=f)
    flags.DEFINE_float("top_p", 1.0, "sample from the best tokens that hold this mass", flag_values=f)
    flags.DEFINE_float(
        "min_p", 0.0, "drop tokens below this share of the best one's probability", flag_values=f
    )
    flags.DEFINE_float("repetition_penalty", 1.0, "divide logits of seen tokens (1: off)", flag_values=f)
    flags.DEFINE_integer("seed", 0, "equal seeds give equal text", flag_values=f)
    flags.DEFINE_multi_string("stop", [], "end a text before this string; may be repeated", flag_values=f)
    define_model_flags(f)
    flags.DEFINE_bool("stream", False, "print text while it is generated (one prompt)", flag_values=f)
    flags.DEFINE_bool(
        "warmup", True, "run once before the timed run, so that seconds hold no compilation", flag_values=f
    )
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=f)


def main(f: flags.FlagValues) -> None:
    """Check the flags, load the model, generate, report."""
    policy = policies.parse(f.policy)
    prompts = read_prompts(f)
    before = read_text(f.shared_prefix_file) if f.shared_prefix_file else ""
    if f.shared_prefix_file and not before:
        raise ValueError(f"{f.shared_prefix_file} is empty: there is no prefix to share")
    sampling = read_sampling(f)
    check_model_flags(f)
    if f.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {f.max_new_tokens}")
    if f.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one prompt, got {len(prompts)}")
    if "" in f.stop:
        raise ValueError("--stop is an empty string")
    with tqdm(total=3, desc="loading", disable=None, leave=False, bar_format="{desc} {bar} {elapsed}") as bar:
        session = open_session(f)
        encode = session.encode if before else session.model.tokenizer.encode
        tokens = [encode(text) for text in prompts]
        bar.update()
        generator = dataclasses.replace(session.generator(policy), packing=f.packing)
        prefix = generator.share(session.model.tokenizer.encode(before)) if before else None
        if f.warmup and not f.stream:
            bar.set_description("compiling")
            warm_up(generator, tokens, f.max_new_tokens, sampling, prefix)
        bar.update()
        bar.set_description("generating")
        if f.stream:
            bar.close()
        text = TextWatch(session.model.tokenizer, f.stop, show=_print if f.stream else None)
        outputs, filled = generator.generate(
            tokens,
            f.max_new_tokens,
            sampling,
            stop_tokens=session.model.tokenizer.eos_ids,
            stop=text.stop if f.stop else None,
            on_tokens=text.push if f.stream else None,
            prefix=prefix,
        )
    report(f, session, [text.final(o) for o in outputs], filled)
    failed = [o.error for o in outputs if o.error]
    if failed:
        raise ValueError(f"{len(failed)} of {len(outputs)} texts failed: {'; '.join(failed)}")


def read_prompts(f: flags.FlagValues) -> list[str]:
    """The prompts of --prompt or --prompt_file; ValueError when there is none, or an empty one."""
    if bool(f.prompt) == bool(f.prompt_file):
        raise ValueError("give either --prompt (may be repeated) or --prompt_file")
    prompts = f.prompt
    if f.prompt_file:
        prompts = [read_text(f.prompt_file)]
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty" + (f" ({f.prompt_file})" if f.prompt_file else ""))
    return prompts


def read_text(path: str) -> str:
    """The text of a file; ValueError when it is not UTF-8."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_sampling(f: flags.FlagValues) -> Sampling:
    """Sampling settings; ValueError names one out of range."""
    given: dict[str, Any] = {field.name: f[field.name].value for field in dataclasses.fields(Sampling)}
    return Sampling(**given)


def warm_up(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    prefix: Prefix | None = None,
) -> None:
    """Compile everything that `generate` needs for these prompts, by a run that ends after a few tokens."""
    stop = lambda row, tokens: len(tokens) > 1  # noqa: E731
    generator.generate(prompts, max_new_tokens, sampling, stop=stop, prefix=prefix)


class TextWatch:
    """Turns tokens into text while they come: shows what is certain, and ends a row at a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], show: Callable[[str], None] | None
    ) -> None:
        """show: prints a piece of the (only) row's text; None: nothing is shown before the end."""
        self.tokenizer, self.stops, self.show = tokenizer, stops, show
        self._stream = StreamDecoder(tokenizer)
        self._text, self._shown = "", 0

    def cut(self, text: str) -> int:
        """Where the first stop string begins in `text`, or its length."""
        return min((at for at in (text.find(s) for s in self.stops) if at >= 0), default=len(text))

    def stop(self, row: int, tokens: list[int]) -> bool:
        """True when the row's text holds a stop string."""
        text = self.tokenizer.decode(tokens)
        return self.cut(text) < len(text)

    def push(self, row: int, new: list[int]) -> None:
        """Show what `new` tokens complete, except what may turn out to be the start of a stop string."""
        self._text += "".join(self._stream.push(token) for token in new)
        end = self.cut(self._text)
        if end == len(self._text):
            end -= max((_overlap(self._text, s) for s in self.stops), default=0)
        self._emit(end)

    def _emit(self, end: int) -> None:
        if self.show is not None and end > self._shown:
            self.show(self._text[self._shown : end])
            self._shown = end

    def final(self, output: Output) -> dict[str, Any]:
        """Text up to a stop string, and the number of tokens that it took; shows what was held back."""
        tokens = output.tokens
        text = self.tokenizer.decode(tokens)
        end = self.cut(text)
        if end < len(text):
            count = next(n for n in range(1, len(tokens) + 1) if self.stop(0, tokens[:n]))
            tokens, text = tokens[:count], text[:end]
        self._text = text
        self._emit(len(text))
        done = {
            "text": text,
            "prompt_tokens": output.prompt_tokens,
            "new_tokens": len(tokens),
            "finish": output.finish,
        }
        return {**done, "error": output.error} if output.error else done


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def decode_speed(filled: Filled, rows: int) -> float | None:
    """Tokens per second of the decode loop, all rows together; a row's first token comes from prefill."""
    steps = filled.new_tokens - rows
    return steps / filled.decode_s if steps > 0 and filled.decode_s > 0 else None


def _moved(cost: dict[str, Any]) -> str:
    """What the last step of an offloaded cache moved."""
    if not cost["host_cache_bytes"] + cost["disk_cache_bytes"]:
        return ""
    moved, disk = cost["moved_bytes_last_step"], cost["disk_bytes_last_step"]
    return f"; last step: {moved:,.0f} bytes from host memory, {disk:,} read from disk"


def report(f: flags.FlagValues, session: Session, outputs: list[dict[str, Any]], filled: Filled) -> None:
    """Text and cost on stdout."""
    cost = {
        "policy": filled.generator.policy.name,
        "cache_bytes": filled.cache_bytes,
        "full_cache_bytes": filled.full_cache_bytes,
        "host_cache_bytes": filled.host_cache_bytes,
        "disk_cache_bytes": filled.disk_cache_bytes,
        "moved_bytes_last_step": filled.moved_bytes,
        "disk_bytes_last_step": filled.disk_bytes,
        "ttft_s": filled.prefill_s,
        "decode_tokens_per_s": decode_speed(filled, len(outputs)),
        "backend": session.backend,
        "dtype": session.dtype,
        "timings_include_compilation": bool(f.stream or not f.warmup),
    }
    if f.stream:
        print()
    else:
        for i, output in enumerate(outputs):
            if len(outputs) > 1:
                print(f"[{i}]")
            print(output["text"])
            if "error" in output:
                print(f"failed after {output['new_tokens']} tokens: {output['error']}")
    new = sum(o["new_tokens"] for o in outputs)
    speed = cost["decode_tokens_per_s"]
    print(
        f"\n{new} tokens, first after {filled.prefill_s:.3f} s"
        + (f", then {speed:.1f} tokens/s" if speed else "")
        + f"; cache {filled.cache_bytes:,} bytes, {filled.cache_bytes / filled.full_cache_bytes:.1%} of full"
        + _moved(cost)
        + f"; {cost['policy']}, {session.dtype}, {session.backend}"
    )
    if f.json:
        texts = outputs[0] if len(outputs) == 1 else {"outputs": outputs}
        print(json.dumps({**texts, **cost}))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
