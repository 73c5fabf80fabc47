"""One training run: from settings to a run folder with metrics, allocations, model, allocator state and report."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback

from knapsack_rl.report import write_report
from knapsack_rl.runfiles import (
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    complete_checkpoints,
    steps_of,
)
from knapsack_rl.tasks import base_model_path
from knapsack_rl.training.data import TaskData, load_task
from knapsack_rl.training.policies import make_allocator, make_rounds
from knapsack_rl.training.recorder import Display, Recorder, all_done
from knapsack_rl.training.settings import TrainSettings
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer
from knapsack_rl.trl.generated import Generated
from knapsack_rl.trl.rounds import RoundsGRPOTrainer

logger = logging.getLogger(__name__)

SHIPPED_MODEL = "arithmetic-base"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

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


def train(
    settings: TrainSettings, folder: Path, display: Display, *, resume: bool = False, report: bool = True
) -> Outcome:
    """Train as the settings say and write the run folder.

    SIGINT (Ctrl-C) finishes the step, saves a checkpoint and ends the run so that it can be resumed; a second one
    interrupts at once.

    Args:
        settings: the run's settings.
        folder: run folder; made if missing.
        display: where progress goes.
        resume: go on from the folder's newest complete checkpoint.
        report: write the report page at the end.

    Raises:
        FileExistsError: the folder already holds a run and ``resume`` is not asked for.
        FileNotFoundError: ``resume`` is asked for and there is no complete checkpoint.
    """
    checkpoint = _prepare_folder(settings, folder, resume=resume)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = load_task(settings)
    name = model_path(settings)
    # A run may have been stopped after its last checkpoint and before its end.
    trained = checkpoint is not None and all_done(
        settings, steps_of(checkpoint) // settings.updates_per_step, Generated.load(checkpoint)
    )
    if trained:
        name = str(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if not torch.cuda.is_available() else "auto")
    recorder = Recorder(settings, folder, task, tokenizer, display)
    allocator = make_allocator(settings)
    kind: type[KnapsackGRPOTrainer] = KnapsackGRPOTrainer
    rule: dict[str, Any] = {}
    if settings.in_rounds:
        ids = [row["prompt_id"] for row in task.train]
        kind, rule = RoundsGRPOTrainer, {"rounds": make_rounds(settings, ids, allocator)}
    trainer = kind(
        model=model,
        args=_trainer_arguments(settings, folder, task),
        allocator=allocator,
        **rule,
        reward_funcs=[task.reward],
        train_dataset=Dataset.from_list(list(task.train)),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if trained and checkpoint is not None:
        trainer.restore_allocator(checkpoint)
        trainer.state.global_step = steps_of(checkpoint)
    else:
        _run(trainer, recorder, display, checkpoint)
    steps = trainer.state.global_step // settings.updates_per_step
    finished = all_done(settings, steps, trainer.generated)
    if finished:
        trainer.save_model(str(folder / MODEL_FOLDER))
    trainer.allocator.save(folder / "allocator.npz")
    return Outcome(folder, finished, steps, _report(folder) if report else None)


def model_path(settings: TrainSettings) -> str:
    """Folder or name of the model that a run starts from."""
    return str(base_model_path()) if settings.model == SHIPPED_MODEL else settings.model


def _run(trainer: KnapsackGRPOTrainer, recorder: Recorder, display: Display, checkpoint: Path | None) -> None:
    with _graceful_interrupt(recorder):
        done = steps_of(checkpoint) // recorder.settings.updates_per_step if checkpoint else 0
        display.start(recorder.settings, done)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            display.stop()


def _prepare_folder(settings: TrainSettings, folder: Path, *, resume: bool) -> Path | None:
    """Write the settings, or find the checkpoint to go on from."""
    if resume:
        complete = complete_checkpoints(folder)
        if not complete:
            raise FileNotFoundError(f"{folder} holds no complete checkpoint to resume from")
        return complete[-1]
    if (folder / METRICS_FILE).exists():
        raise FileExistsError(f"{folder} already holds a run; resume it, delete it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
    return None


def _trainer_arguments(settings: TrainSettings, folder: Path, task: TaskData) -> KnapsackGRPOConfig:
    accelerated = torch.cuda.is_available()
    return KnapsackGRPOConfig(
        output_dir=str(folder),
        allocation="uniform" if settings.allocation == "uniform" else "knapsack",
        min_rollouts=settings.min_rollouts,
        max_rollouts=settings.max_rollouts,
        weighting=settings.weighting,
        replay=settings.replay,
        log_allocations=True,
        num_generations=settings.rollouts_per_prompt,
        per_device_train_batch_size=settings.budget // settings.updates_per_step,
        steps_per_generation=settings.updates_per_step,
        gradient_accumulation_steps=1,
        max_steps=settings.steps * settings.updates_per_step,
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
        save_steps=max(settings.save_every, 1) * settings.updates_per_step,
        save_total_limit=2,
        report_to=settings.report_to,
        disable_tqdm=True,
        use_cpu=not accelerated,
        bf16=accelerated,
        gradient_checkpointing=False,
    )


@contextmanager
def _graceful_interrupt(recorder: Recorder) -> Iterator[None]:
    """Let the first SIGINT end the run after its step; a second one interrupts at once."""

    def handle(number: int, frame: Any) -> None:
        if recorder.interrupted:
            raise KeyboardInterrupt
        recorder.interrupted = True
        logger.warning("interrupted: finishing the step and saving; interrupt again to stop at once")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _report(folder: Path) -> Path | None:
    try:
        return write_report(folder)
    except ImportError as error:
        logger.warning("no report was written: %s", error)
        return None
