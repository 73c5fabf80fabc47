"""One training run: from settings to a run folder with metrics, allocations, model, allocator state and report."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from knapsack_rl.report import write_report
from knapsack_rl.runs.files import (
    CONFIG_FILE,
    MODEL_FOLDER,
    find_start,
    steps_of,
)
from knapsack_rl.settings import AUTO, AllocationSettings
from knapsack_rl.training.card import write_card
from knapsack_rl.training.data import TaskData, for_tokenizer, load_task, stop_token
from knapsack_rl.training.lock import own_folder, refuse_if_owned
from knapsack_rl.training.models import (
    accelerated,
    adapter,
    batch_arguments,
    chosen_threads,
    in_bfloat16,
    load_model,
    load_tokenizer,
    vllm_arguments,
)
from knapsack_rl.training.noise import quiet_about_tied_weights
from knapsack_rl.training.processes import is_main_process
from knapsack_rl.training.recorder import Display, Recorder, all_done
from knapsack_rl.training.settings import GRADE, TrainSettings
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer
from knapsack_rl.trl.generated import Generated

logger = logging.getLogger(__name__)

SAMPLED_PROMPTS = 512
"""Prompts of which sample completions are kept for the report."""

# transformers renamed it; the old name warns.
_CHECKPOINTING = "activation_checkpointing"
if _CHECKPOINTING not in KnapsackGRPOConfig.__dataclass_fields__:
    _CHECKPOINTING = "gradient_checkpointing"


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        folder: the run folder.
        finished: whether all steps were trained; an interrupted run can be resumed.
        steps: steps trained so far.
        report: the report page, None if none was asked for or matplotlib is missing.
    """

    folder: Path
    finished: bool
    steps: int
    report: Path | None


TrainerMaker = Callable[..., KnapsackGRPOTrainer]
"""Takes the keyword arguments of the trainer, and returns one."""


def train(
    settings: TrainSettings,
    folder: Path,
    display: Display,
    *,
    resume: bool = False,
    report: bool = True,
    make_trainer: TrainerMaker = KnapsackGRPOTrainer,
) -> Outcome:
    """Train as the settings say and write the run folder.

    SIGINT (Ctrl-C) or SIGTERM finishes the step, saves a checkpoint and ends the run so that it can be resumed; a
    second SIGINT interrupts at once. Where a launcher (torchrun, accelerate) started several processes, each calls
    this; the first one writes the folder.

    Args:
        settings: the run's settings.
        folder: run folder; made if missing.
        display: where progress goes.
        resume: continue from the folder's newest complete checkpoint.
        report: write the report page at the end.
        make_trainer: makes the trainer; experiments pass their own.

    Raises:
        FileExistsError: the folder already holds a run and ``resume`` is not asked for.
        FileNotFoundError: ``resume`` is asked for, but no checkpoint is complete.
        FolderInUseError: another process writes the folder.
        OSError: a checkpoint could not be written; earlier ones are untouched.
    """
    if not is_main_process():
        checkpoint = find_start(folder, resume=True) if resume else None
        return _train(settings, folder, display, checkpoint, make_trainer, report=False)
    refuse_if_owned(folder)
    find_start(folder, resume=resume)  # a refused folder is left unchanged
    folder.mkdir(parents=True, exist_ok=True)
    with own_folder(folder):
        checkpoint = find_start(folder, resume=resume)  # again: another run may have come in between
        if checkpoint is None:
            (folder / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
        return _train(settings, folder, display, checkpoint, make_trainer, report=report)


def _train(
    settings: TrainSettings,
    folder: Path,
    display: Display,
    checkpoint: Path | None,
    make_trainer: TrainerMaker,
    *,
    report: bool,
) -> Outcome:
    threads, _ = chosen_threads(settings)
    if threads:
        torch.set_num_threads(threads)
    task = load_task(settings)
    # A run may have been stopped after its last checkpoint and before its end.
    trained = checkpoint is not None and all_done(
        settings, steps_of(checkpoint) // settings.updates, Generated.load(checkpoint)
    )
    tokenizer = load_tokenizer(settings)
    task = for_tokenizer(task, tokenizer, settings.chat)
    arguments = _trainer_arguments(settings, folder, task, stop_token(task, tokenizer))
    recorder = Recorder(settings, folder, task, tokenizer, display)
    trainer = make_trainer(
        model=load_model(settings, task, tokenizer, checkpoint if trained else None),
        args=arguments,
        peft_config=None if trained else adapter(settings),
        reward_funcs=[task.reward],
        train_dataset=Dataset.from_list(list(task.train)),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.create_model_card = _no_card  # type: ignore[method-assign] # ours is written at the end
    recorder.trainer = trainer
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if trained and checkpoint is not None:
        trainer.restore_progress(checkpoint)
        trainer.state.global_step = steps_of(checkpoint)
    else:
        _run(trainer, recorder, display, checkpoint)
    steps = trainer.state.global_step // settings.updates
    finished = all_done(settings, steps, trainer.generated)
    if finished:
        trainer.save_model(str(folder / MODEL_FOLDER))
    if not is_main_process():
        return Outcome(folder, finished, steps, None)
    trainer.allocator.save(folder / "allocator.npz")
    _card(folder)
    return Outcome(folder, finished, steps, _report(folder) if report else None)


def _run(trainer: KnapsackGRPOTrainer, recorder: Recorder, display: Display, checkpoint: Path | None) -> None:
    with _graceful_interrupt(recorder):
        done = steps_of(checkpoint) // recorder.settings.updates if checkpoint else 0
        display.start(recorder.settings, done)
        try:
            with quiet_about_tied_weights(trainer.model if checkpoint else None):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            display.stop()


def _trainer_arguments(settings: TrainSettings, folder: Path, task: TaskData, stop: int | None) -> KnapsackGRPOConfig:
    settings = dataclasses.replace(settings, feature_columns=_feature_columns(settings, task))
    checkpointing: dict[str, Any] = {_CHECKPOINTING: settings.gradient_checkpointing == "on"}
    return KnapsackGRPOConfig(
        output_dir=str(folder),
        **dataclasses.asdict(AllocationSettings.of(settings)),
        advantage=settings.chosen_advantage,
        weighting=settings.weighting,
        replay=settings.replay,
        skip_zero_advantages={"auto": None, "on": True, "off": False}[settings.skip_zero_advantages],
        log_metrics="all",
        log_allocations=True,
        log_samples=SAMPLED_PROMPTS,
        num_generations=settings.rollouts_per_prompt,
        **batch_arguments(settings),
        num_iterations=settings.num_iterations,
        max_steps=settings.steps * settings.updates,
        max_completion_length=task.max_completion_tokens,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        loss_type=settings.loss_type,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        beta=settings.kl_coefficient,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=max(settings.save_every, 1) * settings.updates,
        save_total_limit=2,
        report_to=settings.report_to,
        disable_tqdm=True,
        use_cpu=not accelerated(),
        bf16=in_bfloat16(settings),
        **checkpointing,
        **vllm_arguments(settings, stop),
    )


def _feature_columns(settings: TrainSettings, task: TaskData) -> str:
    """Return the columns by which prompts are alike.

    Raises:
        ValueError: the data set lacks one of them.
    """
    present = list(task.train[0])
    if settings.feature_columns == AUTO:
        known = settings.allocation == "knapsack" or settings.chosen_advantage == "posterior-mean"
        useful = known and settings.estimator_in_use == "bayes-filter"
        return GRADE if useful and GRADE in present else ""
    settings.check_columns(present)
    return settings.feature_columns


@contextmanager
def _graceful_interrupt(recorder: Recorder) -> Iterator[None]:
    """Let SIGTERM and the first SIGINT end the run after its step; a second SIGINT interrupts at once."""

    def handle(number: int, frame: Any) -> None:
        # A launcher may pass a SIGTERM on that has come from elsewhere too; who will not wait sends SIGKILL.
        if recorder.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        recorder.interrupted = True
        logger.warning("interrupted: finishing the step and saving; interrupt again to stop at once")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _report(folder: Path) -> Path | None:
    try:
        return write_report(folder)
    except ImportError as error:
        logger.warning("no report was written: %s", error)
        return None


def _card(folder: Path) -> None:
    try:
        write_card(folder)
    except OSError as error:
        logger.warning("no model card was written: %s", error)


def _no_card(*_: Any, **__: Any) -> None:
    """Do nothing, in place of TRL's draft, which does not know the base model and calls it None."""
