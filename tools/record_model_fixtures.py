"""Records what transformers computes, in float32 on a CPU, for the model tests.

    python tools/record_model_fixtures.py --out=tests/fixtures/models --text=DIR

Needs the `oracle` extra (torch, transformers) and sentencepiece. For every family it writes a directory as
`save_pretrained` does, with bfloat16 weights, and `expected.npz`: input ids and the logits at every position.
For the embedded checkpoint it writes logits of one prompt and greedy continuations of short ones, cut from
the public-domain books in DIR (`*.txt`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers

TOKENS = 96
PREFILL = 32
VOCAB = 96
CHECKPOINTS = Path(__file__).parent.parent / "models" / "checkpoints"

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    attn_implementation="eager",
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    long_factor=[1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)

PHI3 = dict(hidden_size=64, rope_parameters=LONGROPE, partial_rotary_factor=0.75)

# name -> (architecture without "Config" and "ForCausalLM", settings)
CASES: dict[str, tuple[str, dict]] = {
    "llama2": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_yarn": ("Llama", dict(rope_parameters=YARN, attention_bias=True)),
    "llama_linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=20)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_sliding": (
        "Qwen2",
        dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict()),
    "gemma": ("Gemma", dict()),
    "gemma2": (
        "Gemma2",
        dict(
            sliding_window=20,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            num_hidden_layers=3,
            sliding_window=20,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e5, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            ),
        ),
    ),
    "phi3": ("Phi3", dict(sliding_window=20)),
    "phi3_short": (
        "Phi3",
        PHI3 | dict(original_max_position_embeddings=128),
    ),
    "phi3_long": (
        "Phi3",
        PHI3 | dict(original_max_position_embeddings=64),
    ),
    "mixtral": ("Mixtral", dict(num_local_experts=6, num_experts_per_tok=2)),
    "qwen2_moe": (
        "Qwen2Moe",
        MOE | dict(shared_expert_intermediate_size=40, num_hidden_layers=3, mlp_only_layers=[1]),
    ),
    "qwen3_moe": ("Qwen3Moe", MOE | dict(norm_topk_prob=True)),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every term matters, on the bfloat16 grid."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            is_norm = "norm" in name
            center = weight.flatten()[0].item() if is_norm else 0.0
            value = center + 0.2 * noise
        else:
            value = noise * weight.shape[-1] ** -0.5 * (4.0 if "embed" in name else 1.5)
        weight.data.copy_(value.bfloat16().float())


def record_family(name: str, out: Path, seed: int) -> None:
    """Writes one tiny model and its logits; checks transformers' own cached decoding against them."""
    architecture, settings = CASES[name]
    config = getattr(transformers, f"{architecture}Config")(**(COMMON | settings))
    model_class = getattr(transformers, f"{architecture.removesuffix('Text')}ForCausalLM")
    model = model_class(config).float().eval()
    randomise(model, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(4, VOCAB, (1, TOKENS)))
    ids[0, 0] = 1
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        if name != "phi3_long":  # transformers changes frequencies under its own cache there
            _check_cached(model, ids, logits)
    directory = out / name
    shutil.rmtree(directory, ignore_errors=True)
    model.bfloat16().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "model.safetensors").chmod(0o644)
    np.savez_compressed(
        directory / "expected.npz", ids=ids[0].numpy().astype(np.int32), logits=logits[0].numpy()
    )


def _check_cached(model: torch.nn.Module, ids: torch.Tensor, logits: torch.Tensor) -> None:
    step = model(ids[:, :PREFILL], use_cache=True)
    parts, cache = [step.logits], step.past_key_values
    for i in range(PREFILL, TOKENS):
        step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        parts.append(step.logits)
        cache = step.past_key_values
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=1e-4, atol=1e-4)


def record_kvref(out: Path, books: list[Path]) -> None:
    """Logits of a 400-token prompt, and 20 greedy continuations of 32 tokens."""
    source = CHECKPOINTS / "kvref-22m"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    texts = [book.read_text(encoding="utf-8") for book in books]
    ids = [1, *pieces.encode(texts[0][20000:24000])][:400]
    rows = np.array([0, 1, 2, 7, 31, 63, 64, 127, 200, 255, 256, 300, 350, 397, 398, 399])
    columns = np.arange(0, 8192, 16)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    prompts, continuations = [], []
    for i in range(20):
        start = 30000 + 7001 * i
        prompt = [1, *pieces.encode(texts[i % len(texts)][start : start + 160])][: 16 + i]
        with torch.no_grad():
            new = model.generate(
                torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False
            )
        prompts.append(prompt)
        continuations.append(new[0, len(prompt) :].tolist())
    np.savez_compressed(
        out / "kvref-22m.npz",
        ids=np.array(ids, np.int32),
        rows=rows,
        columns=columns,
        logits=logits[rows][:, columns].numpy(),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
        logsumexp=torch.logsumexp(logits, -1).numpy(),
    )
    greedy = [{"prompt": p, "continuation": c} for p, c in zip(prompts, continuations)]
    (out / "kvref-22m-greedy.json").write_text(json.dumps(greedy) + "\n")


def main() -> None:
    """Parses the command line and records everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="folder of public-domain .txt books")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for seed, name in enumerate(CASES):
        record_family(name, args.out, seed)
    record_kvref(args.out, sorted(args.text.glob("*.txt")))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (args.out / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
