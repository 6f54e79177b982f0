"""Loading and saving models: embedded checkpoints, Hugging Face directories, Orbax directories."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models import config as config_lib
from models.config import ModelConfig, MoeConfig
from models.params import Params, ParamSpec, ShardingFn, declare
from models.rope import Rope
from models.tokenizer import Tokenizer, load_tokenizer
from models.weights import CheckpointError, TensorReader, assemble

EMBEDDED = Path(__file__).parent / "checkpoints"
CONFIG_FILE = "kvjax_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    name: str
    fingerprint: str  # names the weights in files that depend on them, such as calibration
    directory: Path  # where the tokenizer files are


def embedded_names() -> list[str]:
    """Names that `load` accepts without a path."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").is_file())


def load(source: str | Path, dtype: Any = None, sharding: ShardingFn | None = None) -> Model:
    """Loads an embedded name, a Hugging Face directory, or a directory written by `save_orbax`.

    dtype: of the weights; None keeps the checkpoint's. sharding: where each array lives, by its logical axes;
    None: the default device. Tensors are streamed one at a time. Raises CheckpointError (a ValueError) naming
    the path, file or tensor at fault.
    """
    directory = _directory(source)
    config = read_config(directory)
    orbax = (directory / CONFIG_FILE).is_file()
    read: Callable[..., Params] = _restore_orbax if orbax else read_hf_params
    try:
        tokenizer = load_tokenizer(directory, _special_ids(directory, config))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    params = read(directory, config, jnp.dtype(dtype or config.dtype), sharding)
    return Model(config, params, tokenizer, directory.name, fingerprint(config, params), directory)


def _directory(source: str | Path) -> Path:
    name = str(source)
    if name in embedded_names():
        return EMBEDDED / name
    if not Path(source).is_dir():
        raise CheckpointError(
            f"{name} is neither a directory nor an embedded model; embedded: {', '.join(embedded_names())}"
        )
    return Path(source)


def read_config(source: str | Path) -> ModelConfig:
    """The configuration of what `load` would load, without the weights. Raises CheckpointError."""
    directory = _directory(source)
    if (directory / CONFIG_FILE).is_file():
        return _config_from_json(_read_json(directory / CONFIG_FILE))
    if (directory / "config.json").is_file():
        return read_hf_config(directory)
    raise CheckpointError(f"{directory} has neither config.json (Hugging Face) nor {CONFIG_FILE} (Orbax)")


def save_orbax(model: Model, path: str | Path) -> None:
    """Writes `path/params` with Orbax, and beside it the configuration and the tokenizer files.

    Raises CheckpointError if `path` already holds a model.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if (path / CONFIG_FILE).exists():
        raise CheckpointError(f"{path} already holds a model")
    path.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", model.params)
    for file in TOKENIZER_FILES:
        if (model.directory / file).is_file():
            shutil.copyfile(model.directory / file, path / file)
    stored = dataclasses.replace(model.config, dtype=str(model.params.embedding.dtype))
    (path / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(stored), indent=1) + "\n")


def fingerprint(config: ModelConfig, params: Params) -> str:
    """12 hex digits of the configuration and a sample of the weights; the same for every dtype loaded."""
    settings = dataclasses.asdict(config)
    for runtime in ("dtype", "max_context"):
        del settings[runtime]
    if settings["moe"]:
        del settings["moe"]["dispatch"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    first, last = params.layers[0], params.layers[-1]
    for sample in (params.embedding[:8, :32], first.qkv[:8, 0, 0], last.wo[0, :8], params.final_norm):
        digest.update(_on_host(sample.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:12]


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole array, also where other processes hold a part of it."""
    if isinstance(array.sharding, NamedSharding):
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def read_hf_config(directory: Path) -> ModelConfig:
    """The configuration of a Hugging Face directory. Raises CheckpointError."""
    path = directory / "config.json"
    try:
        config = config_lib.from_hf(_read_json(path))
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the setting {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    generation = directory / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    if eos is not None:  # chat models list there the tokens that end a turn
        ids = (*config.eos_ids, *(eos if isinstance(eos, list) else [eos]))
        config = dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(ids)))
    return config


def _special_ids(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Ids for the tokenizer. Some models name a begin-of-text token that their tokenizer does not add."""
    path = directory / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    is_qwen = str(settings.get("tokenizer_class", "")).startswith("Qwen2")
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        adds_bos = not is_qwen
    return {"bos_id": config.bos_id if adds_bos else None, "eos_ids": config.eos_ids, "pad_id": config.pad_id}


def read_hf_params(
    directory: Path, config: ModelConfig, dtype: np.dtype, sharding: ShardingFn | None = None
) -> Params:
    """The weights of a Hugging Face directory, read one tensor at a time. Raises CheckpointError."""

    def place(array: np.ndarray, spec: ParamSpec) -> jax.Array:
        array = array.astype(dtype, copy=False)
        return jax.device_put(array, sharding(spec.axes, spec.shape) if sharding else None)

    with TensorReader(directory) as reader:
        params = assemble(reader, config, place)
        reader.check_all_read()
    return params


def _restore_orbax(
    directory: Path, config: ModelConfig, dtype: np.dtype, sharding: ShardingFn | None
) -> Params:
    import orbax.checkpoint as ocp

    def target(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        where = sharding(spec.axes, spec.shape) if sharding else None
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where)

    path = directory.absolute() / "params"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path, jax.tree.map(target, declare(config)))
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {' '.join(str(error).split())}"
        ) from error
    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            raise CheckpointError(f"tensor {jax.tree_util.keystr(key)} has NaN or infinite values")
    return params


def _config_from_json(settings: dict[str, Any]) -> ModelConfig:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    fields = {name: frozen(value) for name, value in settings.items()}
    try:
        fields["ropes"] = tuple(Rope(**{k: frozen(v) for k, v in r.items()}) for r in fields["ropes"])
        if fields["moe"] is not None:
            fields["moe"] = MoeConfig(**{k: frozen(v) for k, v in fields["moe"].items()})
        return ModelConfig(**fields)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} does not describe a model: {error}") from error
