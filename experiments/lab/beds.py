"""The beds by name: prompts drawn alike for training and for evaluation, and a base model that solves some of them.

Every prompt has a single right completion, so that its success rate is a probability that the model states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from experiments import tokens
from experiments.lab import octal, skills
from knapsack_rl.tasks import base_model_path, running_sums
from knapsack_rl.tasks.data import DataRequest, TaskData
from knapsack_rl.tasks.registry import load_data


@dataclass(frozen=True)
class Bed:
    """A task and its base model.

    Attributes:
        about: what a run on it shows, in a few words.
        data: maps numbers of training and of held-out prompts to the task.
        grade: column by which prompts are alike.
        make_base: writes the base model into a folder, the tokenizer last; with True a tiny one that is good for
            nothing but tests. None for the model that ships with the package.
        sources: modules that decide what the base model is; it is made again when one of them changes.
    """

    about: str
    data: Callable[[int, int], TaskData]
    grade: str
    make_base: Callable[[Path, bool], None] | None = None
    sources: tuple[ModuleType, ...] = ()


def _of_package(dataset: str) -> Callable[[int, int], TaskData]:
    return lambda train, held_out: load_data(
        DataRequest(dataset=dataset, train_prompts=train, held_out_prompts=held_out)
    )


def _of_skills(about: str, chosen: skills.Skills) -> Bed:
    return Bed(about, chosen.task, "informative", chosen.make_base_model, (skills,))


BEDS: dict[str, Bed] = {
    "addition": Bed("the task of knapsack-rl train: carrying is learned suddenly", _of_package("arithmetic"), "digits"),
    "skills": _of_skills("many graded skills of low variance, each learned for itself", skills.REPORTED),
    "skills-dev": _of_skills("other skills, for choosing settings", skills.DEVELOPMENT),
    "addition-dev": Bed(
        "addition in base eight, for choosing settings", octal.task, "digits", octal.pretrain, (tokens, octal)
    ),
    "running-sums": Bed(
        "answers of 2 to 18 tokens", _of_package(tokens.TASK), "digits", tokens.pretrain, (tokens, running_sums)
    ),
}


def bed(name: str) -> Bed:
    """Return a bed by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in BEDS:
        raise ValueError(f"bed must be one of {', '.join(BEDS)}, got {name!r}")
    return BEDS[name]


def base_folder(name: str, folder: Path, *, quick: bool) -> Path:
    """Return the folder of a bed's base model, which is pre-trained unless it is there.

    Args:
        name: of the bed.
        folder: of all base models.
        quick: take a tiny model that is good for nothing but tests.
    """
    import torch

    one = bed(name)
    if one.make_base is None:
        return base_model_path()
    code = b"".join(Path(str(source.__file__)).read_bytes() for source in one.sources)
    place = folder / f"{name}{'-quick' if quick else ''}-{hashlib.blake2b(code, digest_size=4).hexdigest()}"
    if not (place / "tokenizer_config.json").is_file():  # written last
        torch.set_num_threads(1)  # sums in one order: the same weights each time
        one.make_base(place, quick)
    return place
