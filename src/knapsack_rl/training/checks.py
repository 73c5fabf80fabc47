"""What can be told to be wrong with a run before the training libraries are loaded, which takes many seconds."""

from __future__ import annotations

import os
from pathlib import Path

from knapsack_rl.offline.tables import READABLE
from knapsack_rl.runs.files import MODEL_FOLDER
from knapsack_rl.training.data import load_task
from knapsack_rl.training.settings import MODEL_PRESETS, TrainSettings

MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder with one of these holds a model, or adapters that name theirs."""


def check_inputs(settings: TrainSettings) -> None:
    """Look for the model's folder and read a data file.

    Names of the hub are left to the hub.

    Raises:
        FileNotFoundError: a folder or file is not there, or the folder holds no model.
        ValueError: the file lacks a column or rows, or cannot be read.
        ImportError: the data needs an extra.
    """
    check_model(settings.model)
    if Path(settings.dataset).suffix in READABLE:
        load_task(settings)


def check_model(model: str) -> None:
    """Refuse a folder without a model, and a path that leads nowhere.

    Raises:
        FileNotFoundError: says what is there and what can be given.
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
    """Whether this can be no name of the hub, which is NAME or OWNER/NAME."""
    separators = {os.sep, os.altsep or os.sep}
    return model[:1] in {".", "~", *separators} or model[-1:] in separators or model.count("/") > 1


def allowed_models() -> str:
    """What a model may be, for messages."""
    return f"a model is {' or '.join(MODEL_PRESETS)}, a Hugging Face folder, or a name on the hub"
