"""Checks of a run before the training libraries are loaded, which takes many seconds."""

from __future__ import annotations

import os
from pathlib import Path

from knapsack_rl.offline.tables import READABLE
from knapsack_rl.runs.files import MODEL_FOLDER
from knapsack_rl.training.data import load_task
from knapsack_rl.training.settings import MODEL_PRESETS, TrainSettings

MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder with one of these files holds a model, or adapters that name their model."""


def check_inputs(settings: TrainSettings) -> None:
    """Check that a model folder exists and that a data file can be read.

    Names on the hub are not checked.

    Raises:
        FileNotFoundError: a folder or file does not exist, or the folder holds no model.
        ValueError: the file lacks a column or rows, or cannot be read.
        ImportError: the data needs an extra.
    """
    check_model(settings.model)
    if Path(settings.dataset).suffix in READABLE:
        load_task(settings)


def check_model(model: str) -> None:
    """Reject a folder without a model and a path that does not exist.

    Raises:
        FileNotFoundError: the message names what was found and what is allowed.
    """
    path = Path(model)
    if model in MODEL_PRESETS or _holds_model(path):
        return
    if path.is_dir():
        inside = path / MODEL_FOLDER
        hint = f"; the run's model is in {inside}" if _holds_model(inside) else ""
        raise FileNotFoundError(f"{model} holds no model: it has no config.json{hint}")
    if is_path(model):
        raise FileNotFoundError(f"there is no model folder {model}; {allowed_models()}")


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MODEL_FILES)


def is_path(model: str) -> bool:
    """Return whether this is a path rather than a name on the hub (NAME or OWNER/NAME)."""
    separators = {os.sep, os.altsep or os.sep}
    return model[:1] in {".", "~", *separators} or model[-1:] in separators or model.count("/") > 1


def allowed_models() -> str:
    """Return the allowed kinds of model, for messages."""
    return f"a model is {' or '.join(MODEL_PRESETS)}, a Hugging Face folder, or a name on the hub"
