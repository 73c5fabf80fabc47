"""Run verl's own ``main_ppo`` on the CPU, two training workers, as a user would: in a separate process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_harness import material

TESTS = Path(__file__).parent.parent
PROMPTS, MEAN = 8, 4
"""Prompts of a step and mean rollouts of a prompt."""


def launch_line(folder: Path, model: Path, train: Sequence[Path], steps: int, *more: str) -> list[str]:
    """The overrides of a launch that works without the plug-in, and more."""
    files = ",".join(str(path) for path in train)
    return [
        f"data.train_files=[{files}]",
        f"data.val_files={train[0]}",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=24",
        "data.max_response_length=4",
        "data.dataloader_num_workers=0",
        "data.shuffle=False",
        "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "++actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=float32",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.rollout.name=hf",
        f"actor_rollout_ref.rollout.n={MEAN}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.rollout.free_cache_engine=False",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={TESTS / 'verl_harness' / 'material.py'}",
        "reward.custom_reward_function.name=compute_score",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=2",
        "trainer.nnodes=1",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=1",
        "trainer.total_epochs=100",
        f"trainer.total_training_steps={steps}",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={folder}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "transfer_queue.backend.SimpleStorage.total_storage_size=2000",
        "ray_kwargs.ray_init.num_cpus=16",
        "++ray_kwargs.ray_init.num_gpus=2",
        "++ray_kwargs.ray_init.include_dashboard=False",
        *more,
    ]


def environment(folder: Path) -> dict[str, str]:
    """Of verl and of all processes that Ray starts for it."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {
        "PYTHONPATH": path,
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "verl_harness.cpu",
        "VERL_FILE_LOGGER_PATH": str(folder / f"metrics-{time.time_ns()}.jsonl"),
        "CUDA_VISIBLE_DEVICES": "0,1",  # Ray hands out as many places as it names
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",  # else one idle process for each of num_cpus
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",  # its 15 would let anything else on the machine go first
        "RAY_agent_register_timeout_ms": "120000",  # on a busy machine its imports take longer than the usual 15 s
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class Finished:
    """The output and files of a finished run."""

    folder: Path
    returncode: int
    output: str

    def recorded(self) -> list[dict[str, Any]]:
        """The lines of the recorder, one for each step."""
        return _lines(self.folder / "recorded.jsonl")

    def allocations(self) -> list[dict[str, Any]]:
        """The rows of the allocation log, one for each step."""
        return _lines(self.folder / "allocations.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of verl's file logger, by step."""
        files = sorted(self.folder.glob("metrics-*.jsonl"))  # one for each start
        return [line["data"] | {"step": line["step"]} for file in files for line in _lines(file)]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that a run may still write: its complete lines."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def run(
    folder: Path, model: Path, train: Sequence[Path], steps: int, *more: str, kill_after: int = 0, timeout: float = 1800
) -> Finished:
    """Run ``main_ppo`` to its end, or kill it, Ray and all, once so many steps are recorded.

    Raises:
        TimeoutError: it did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{int(time.time())}.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.main_ppo", *launch_line(folder, model, train, steps, *more)],
            env=environment(folder),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ray's processes belong to it, so that all end together
        )
        finished = Finished(folder, 0, "")
        deadline = time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            if kill_after and len(finished.recorded()) >= kill_after:
                break
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if time.monotonic() >= deadline:
        raise TimeoutError(f"verl did not end in {timeout} s:\n{log.read_text()[-6000:]}")
    return Finished(folder, process.returncode, log.read_text())


__all__ = ["MEAN", "PROMPTS", "Finished", "launch_line", "material", "run"]
