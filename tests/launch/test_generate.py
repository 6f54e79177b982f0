"""launch.generate on the small embedded model: text against plain recomputation, flags, and every bad input."""

import errno
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import policies
from kvjax.cache import disk
from kvjax.generation.generator import Generator
from launch import generate
from models import checkpoint, decoder
from models.lm import DecoderLM

MODEL = "kvref-draft-2m"
PROMPT = "The old man sat by the fire and told them about the sea,"
LONG = PROMPT + " and the ships that came home late in the year."
OTHER = "In the morning"
NEW = 12
FIELDS = {
    "text", "prompt_tokens", "new_tokens", "policy", "cache_bytes", "full_cache_bytes", "ttft_s",
    "decode_tokens_per_s", "backend",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(MODEL, "float32")


@pytest.fixture(scope="module")
def greedy(model):
    """Greedy text by a full forward pass per token: no cache, no compiled loop."""
    width = 48

    @jax.jit
    def logits(tokens, positions):
        return decoder.forward(
            model.params, model.config, tokens, positions, None, decoder.causal_attend, last_only=True
        )[0][0, 0]

    def run(prompt, new=NEW):
        ids = model.tokenizer.encode(prompt)
        for _ in range(new):
            tokens, positions = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
            tokens[0, : len(ids)], positions[0, : len(ids)] = ids, np.arange(len(ids))
            ids.append(int(jnp.argmax(logits(tokens, positions))))
        return model.tokenizer.decode(ids[-new:])

    return run


def test_json_has_the_stated_fields_and_greedy_text(command, greedy, model):
    done = command(generate, f"--prompt={PROMPT}", f"--max_new_tokens={NEW}", "--json").json
    assert set(done) >= FIELDS
    assert done["text"] == greedy(PROMPT)
    assert done["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))
    assert done["new_tokens"] == NEW
    assert done["policy"] == "full"
    assert done["cache_bytes"] == done["full_cache_bytes"] > 0
    assert done["backend"] == "cpu"
    assert done["dtype"] == "float32"
    assert done["decode_tokens_per_s"] > 0
    assert done["host_cache_bytes"] == done["moved_bytes_last_step"] == 0


def test_an_offloaded_cache_gives_the_same_text_and_says_what_it_moved(command, greedy, model):
    done = command(
        generate, f"--prompt={PROMPT}", f"--max_new_tokens={NEW}", "--policy=offload", "--nowarmup", "--json"
    ).json
    assert done["text"] == greedy(PROMPT)
    entry = 2 * model.config.kv_heads * model.config.head_dim * 4 * model.config.layers
    assert done["moved_bytes_last_step"] == done["prompt_tokens"] * entry  # without a selector: all of it
    assert done["host_cache_bytes"] >= done["moved_bytes_last_step"]


def test_a_cache_on_disk_gives_the_same_text_and_a_full_disk_fails_its_row_alone(
    command, greedy, model, tmp_path, monkeypatch
):
    argv = [
        f"--prompt={LONG}", f"--prompt={LONG}", f"--max_new_tokens={NEW}", "--nowarmup", "--json",
        f"--policy=offload(disk={str(tmp_path)!r}, memory=0)",
    ]  # fmt: skip
    done = command(generate, *argv).json
    assert [o["text"] for o in done["outputs"]] == [greedy(LONG)] * 2
    pages = done["outputs"][0]["prompt_tokens"] // 16
    entry = 2 * model.config.head_dim * 4
    rows = 2 * model.config.layers * model.config.kv_heads
    assert done["moved_bytes_last_step"] == rows * pages * 16 * entry > 0
    assert done["disk_bytes_last_step"] == rows * pages * (16 * entry + 4) <= done["disk_cache_bytes"]
    assert done["host_cache_bytes"] == 0 and list(tmp_path.iterdir()) == []

    pwrite = os.pwrite

    def full(file, data, offset):
        if os.readlink(f"/proc/self/fd/{file}").endswith("row001.kv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, offset)

    monkeypatch.setattr(disk.os, "pwrite", full)
    run = command(generate, *argv)
    assert "1 of 2 texts failed: row 1: " in run.error and "row001.kv: the disk is full" in run.error
    good, bad = json.loads(run.out.splitlines()[-1])["outputs"]
    assert good["text"] == greedy(LONG) and "error" not in good
    assert bad["text"] == "" and bad["finish"] == "error" and bad["error"] in run.error
    missing = command(generate, f"--prompt={LONG}", f"--policy=offload(disk='{tmp_path}/x')").error
    assert missing.startswith(f"error: {tmp_path}/x: no such directory; ")


def test_several_prompts_are_one_ragged_batch_with_each_ones_own_text(command, greedy):
    done = command(
        generate, f"--prompt={PROMPT}", f"--prompt={OTHER}", f"--max_new_tokens={NEW}", "--nowarmup", "--json"
    ).json
    assert [o["text"] for o in done["outputs"]] == [greedy(PROMPT), greedy(OTHER)]
    assert "text" not in done
    assert done["timings_include_compilation"] is True


def test_a_shared_prefix_and_packed_prompts_give_the_text_of_whole_prompts(command, model, tmp_path):
    file = tmp_path / "prefix.txt"
    file.write_text(PROMPT)
    encode = model.tokenizer.encode
    whole = [encode(PROMPT) + encode(text, bos=False) for text in (OTHER, " and then")]
    plain = Generator(DecoderLM(model.config, "float32"), model.params, policies.parse("full"))
    want = [model.tokenizer.decode(o.tokens) for o in plain.generate(whole, NEW)[0]]
    done = command(
        generate, f"--prompt={OTHER}", "--prompt= and then", f"--shared_prefix_file={file}", "--packing",
        f"--max_new_tokens={NEW}", "--nowarmup", "--json",
    ).json  # fmt: skip
    assert [o["text"] for o in done["outputs"]] == want
    own = command(
        generate, f"--prompt={OTHER}", "--prompt= and then", "--max_new_tokens=1", "--nowarmup", "--json"
    )
    shape = model.config.layers * model.config.kv_heads * (2 * model.config.head_dim + 1) * 4
    slots = -(-len(encode(PROMPT)) // 8) * 8
    assert done["cache_bytes"] == own.json["cache_bytes"] + shape * slots + 4
    file.write_text("")
    assert (
        "prefix.txt is empty" in command(generate, f"--prompt={OTHER}", f"--shared_prefix_file={file}").error
    )


def test_prompt_file_stream_and_chunk_give_the_same_text(command, greedy, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    want = greedy(PROMPT)
    streamed = command(generate, f"--prompt_file={file}", f"--max_new_tokens={NEW}", "--stream", "--json")
    assert streamed.out.startswith(want + "\n")
    assert streamed.json["text"] == want
    chunked = command(
        generate, f"--prompt={PROMPT}", f"--max_new_tokens={NEW}", "--chunk=8", "--nowarmup", "--json"
    )
    assert chunked.json["text"] == want


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop_string(command, greedy, stream):
    want = greedy(PROMPT)
    stop = want[len(want) // 2 :][:3]
    done = command(
        generate,
        f"--prompt={PROMPT}",
        f"--max_new_tokens={NEW}",
        f"--stop={stop}",
        f"--stream={stream}",
        "--json",
    )
    cut = want[: want.index(stop)]
    assert done.json["text"] == cut
    assert done.json["finish"] == "stop"
    assert done.json["new_tokens"] < NEW
    if stream:
        assert done.out.startswith(cut + "\n")


def test_compression_shows_in_the_bytes(command):
    prompt = " ".join([PROMPT] * 8)
    done = command(
        generate, f"--prompt={prompt}", "--max_new_tokens=4", "--policy=streaming_llm(budget=32) | int8",
        "--nowarmup", "--json",
    ).json  # fmt: skip
    assert done["policy"] == "streaming_llm(budget=32) | int8"
    assert done["cache_bytes"] < 0.15 * done["full_cache_bytes"]


def test_seeds_reproduce(command):
    def text(seed):
        return command(
            generate, f"--prompt={OTHER}", f"--max_new_tokens={NEW}", "--temperature=1.5", f"--seed={seed}",
            "--nowarmup", "--json",
        ).json["text"]  # fmt: skip

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either --prompt (may be repeated) or --prompt_file"),
        ([f"--prompt={OTHER}", "--prompt_file=x"], "give either --prompt (may be repeated) or --prompt_file"),
        (["--prompt="], "prompt 0 is empty"),
        (["--prompt=a", "--prompt="], "prompt 1 is empty"),
        (["--prompt_file=/no/such/file"], "/no/such/file: No such file or directory"),
        (["--prompt=a", "--max_new_tokens=0"], "--max_new_tokens must be at least 1, got 0"),
        (["--prompt=a", "--max_new_tokens=-3"], "--max_new_tokens must be at least 1, got -3"),
        (["--prompt=a", "--model=/no/such/model"], "/no/such/model"),
        (["--prompt=a", "--policy=snapkvv(budget=4)"], "unknown policy 'snapkvv'; known, closest first: snapkv"),
        (["--prompt=a", "--policy=snapkv(budgt=4)"], "snapkv has no argument 'budgt'; allowed, closest first: budget"),
        (["--prompt=a", "--policy=snapkv(budget=0)"], "budget"),
        (["--prompt=a", "--policy=snapkv(budget=1.5)"], "budget"),
        (["--prompt=a", "--policy=snapkv | h2o"], "exclude each other"),
        (["--prompt=a", "--policy=snapkv("], "cannot read policy spec"),
        (["--prompt=a", "--policy="], "policy spec"),
        (["--prompt=a", "--policy=snapkv(budget=8, window=32)"], "budget=8 is below the 32 entries"),
        (["--prompt=a", "--temperature=-1"], "temperature must be >= 0, got -1.0"),
        (["--prompt=a", "--top_p=0"], "top_p must be in (0, 1], got 0.0"),
        (["--prompt=a", "--stop="], "--stop is an empty string"),
        (["--prompt=a", "--prompt=b", "--stream"], "--stream shows one prompt, got 2"),
        (["--prompt=a", "--chunk=-1"], "--chunk must not be negative, got -1"),
        (["--prompt=a", "--dtype=float16"], "--dtype=float16"),
        (["--prompt=a", "--mesh=rows=2"], "mesh axis 'rows' is unknown; the axes are data, sequence, tensor"),
        (["--prompt=a", "--mesh=tensor=64"], "needs 64 devices"),
        (["--prompt=a", "--distributed=yes"], "--distributed must be auto or HOST:PORT,PROCESSES,ID, got 'yes'"),
        (["--prompt=a", "--distributed=host:1,2,2"], "process 2 of 2 does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(command, argv, message):
    assert message in command(generate, *argv).error


def test_a_prompt_file_that_is_not_text_is_named(command, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9 au lait")
    assert "prompt.txt is not UTF-8 text" in command(generate, f"--prompt_file={file}").error


def test_a_prompt_longer_than_the_context_says_so_and_truncates_nothing(command):
    long = " ".join(["word"] * 9000)
    error = command(generate, f"--prompt={long}", "--max_new_tokens=4").error
    assert "the model's context is 8192" in error
    assert "nothing was truncated" in error


def test_a_prompt_that_leaves_no_room_for_the_answer_says_how_much_there_is(command):
    error = command(generate, f"--prompt={' word' * 8180}", "--max_new_tokens=64").error
    assert "ask for at most" in error


def test_a_cache_above_the_memory_limit_names_the_bytes(command):
    error = command(generate, f"--prompt={PROMPT}", "--max_new_tokens=1000", "--memory_limit=4096").error
    assert error.startswith("error: not enough memory: the cache needs ")
    assert "4,096 are available" in error


@pytest.fixture
def broken(tmp_path):
    """A copy of the small model that a test may damage."""
    return pathlib.Path(shutil.copytree(checkpoint.EMBEDDED / MODEL, tmp_path / "model"))


def test_truncated_weights_are_named(command, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in command(generate, "--prompt=a", f"--model={broken}").error


def test_corrupt_weights_are_named(command, broken):
    file = broken / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    assert "model.safetensors" in command(generate, "--prompt=a", f"--model={broken}").error


def test_nan_weights_are_named(command, broken):
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name, entry = next((n, e) for n, e in header.items() if n.endswith("down_proj.weight"))
    assert entry["dtype"] == "BF16"
    at = 8 + size + entry["data_offsets"][0] + 10
    data[at : at + 2] = b"\xc0\x7f"  # a quiet NaN in bfloat16
    file.write_bytes(data)
    error = command(generate, "--prompt=a", f"--model={broken}").error
    assert name in error and "NaN" in error


def test_a_shape_that_does_not_fit_the_configuration_names_the_tensor(command, broken):
    config = json.loads((broken / "config.json").read_text())
    config["intermediate_size"] += 8
    (broken / "config.json").write_text(json.dumps(config))
    assert "mlp" in command(generate, "--prompt=a", f"--model={broken}").error


def test_an_architecture_that_is_not_supported_is_named(command, broken):
    config = json.loads((broken / "config.json").read_text())
    config.update(model_type="mamba", architectures=["MambaForCausalLM"])
    (broken / "config.json").write_text(json.dumps(config))
    assert "mamba" in command(generate, "--prompt=a", f"--model={broken}").error.lower()


def test_a_missing_tokenizer_is_named(command, broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in command(generate, "--prompt=a", f"--model={broken}").error


def test_an_empty_directory_is_not_a_model(command, tmp_path):
    assert "config.json" in command(generate, "--prompt=a", f"--model={tmp_path}").error


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "launch.generate", "--prompt=a", "--max_new_tokens=0"],
        capture_output=True, text=True, check=False, env={**os.environ},
        cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --max_new_tokens must be at least 1, got 0\n"


def test_two_processes_give_the_text_of_one(command, greedy):
    """Two hosts of two devices each: batch over data, heads over tensor, one of the processes speaks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [
                sys.executable, "-m", "launch.generate", f"--model={MODEL}", f"--prompt={PROMPT}", f"--prompt={OTHER}",
                f"--max_new_tokens={NEW}", "--cpu_devices=2", "--mesh=data=2,tensor=2", "--nowarmup", "--json",
                f"--distributed=127.0.0.1:{port},2,{index}",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
            cwd=pathlib.Path(__file__).parents[2],
        )
        for index in range(2)
    ]  # fmt: skip
    (first, error), (second, _) = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], error
    assert [o["text"] for o in json.loads(first.splitlines()[-1])["outputs"]] == [
        greedy(PROMPT),
        greedy(OTHER),
    ]
    assert "text" not in second
