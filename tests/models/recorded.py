"""The recorded models: see tools/record_model_fixtures.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from models import checkpoint
from models.config import ModelConfig

DIRECTORY = Path(__file__).parent.parent / "fixtures" / "models"
FAMILIES = sorted(p.name for p in DIRECTORY.iterdir() if p.is_dir())


def config_of(name: str) -> ModelConfig:
    config = checkpoint.read_hf_config(DIRECTORY / name)
    if name == "phi3_short":  # transformers picks longrope's factors by the prompt, kvjax by the context
        config = dataclasses.replace(config, max_context=128)
    return config


def load(name: str):
    """(config, float32 params, ids int32 [tokens], logits f32 [tokens, vocab])."""
    config = config_of(name)
    params = checkpoint.read_hf_params(DIRECTORY / name, config, jnp.dtype("float32"))
    expected = np.load(DIRECTORY / name / "expected.npz")
    return config, params, expected["ids"], expected["logits"]


def relative_error(found, expected) -> float:
    """Largest difference, relative to the largest logit."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
