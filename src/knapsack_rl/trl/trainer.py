"""The trainer: TRL's GRPO with group sizes chosen by the allocator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather, gather_object
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from knapsack_rl.advantages import OVER_MEAN
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.estimation.grid import check_posterior
from knapsack_rl.groups import GroupOutcomes, of_outcomes, outcomes_by_position
from knapsack_rl.ids import numbered
from knapsack_rl.metrics import select_metrics
from knapsack_rl.offline.earlier import earlier_rates
from knapsack_rl.plan import Plan
from knapsack_rl.runs.files import STATE_FILE
from knapsack_rl.runs.samples import SampleStore
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings
from knapsack_rl.trl.advantages import ragged_advantages
from knapsack_rl.trl.checkpoints import (
    SaveSamples,
    WarnOfSplitGenerations,
    begin_checkpoint,
    finished_epochs,
    log_changed_data,
    newest_checkpoint,
    newest_state,
)
from knapsack_rl.trl.config import check_settings, setting, without_effect
from knapsack_rl.trl.data_checks import check_dataset, prompt_keys
from knapsack_rl.trl.deadline import can_interrupt
from knapsack_rl.trl.drawn import Drawn, draw
from knapsack_rl.trl.generated import Generated
from knapsack_rl.trl.identity import BrokenGroupError, Identity, Row
from knapsack_rl.trl.internals import check_internals, model_tokens, one_completion_per_row
from knapsack_rl.trl.prefill import prompts_once
from knapsack_rl.trl.replay import REPLAY_FILE, SuccessBuffer, check_replay, mix_in
from knapsack_rl.trl.rewards import check_awaited, watched
from knapsack_rl.trl.skipping import Skipping, why_inexact
from knapsack_rl.trl.step import Scored, Step
from knapsack_rl.trl.two_rounds import check_two_rounds, generate_in_two_rounds
from knapsack_rl.trl.updates import ALL_ROWS, UpdateTrainer


class KnapsackGRPOTrainer(UpdateTrainer):
    """``GRPOTrainer`` with rollouts per prompt allocated by the knapsack.

    Takes the arguments of ``GRPOTrainer``; ``args`` may be a plain ``GRPOConfig`` (the defaults of
    :class:`KnapsackGRPOConfig` apply).

    Args:
        *args: as ``GRPOTrainer``.
        allocator: an allocator to use instead of the one that the configuration describes, for example with another
            success function or estimator.
        **kwargs: as ``GRPOTrainer``.

    Raises:
        ValueError: the configuration cannot work: bounds that exclude ``num_generations``, ``seed`` in
            ``generation_kwargs``, ids that name several prompts or are neither strings nor whole numbers, images
            without ids, a world size that differs from the launcher's.
        RuntimeError: the internals of this TRL release are not the ones that the trainer needs.
    """

    def __init__(self, *args: Any, allocator: KnapsackAllocator | None = None, **kwargs: Any) -> None:
        check_internals()
        super().__init__(*args, **kwargs)
        settings = check_settings(self.args)
        self._check_run()
        self.session = Session(
            settings,
            allocator,
            folder=Path(str(self.args.output_dir)),
            log_allocations=self._setting("log_allocations") and self.accelerator.is_main_process,
            rewards=[self._setting("outcome_reward")] if self._setting("outcome_reward") else self.reward_func_names,
            says=self.accelerator.is_main_process,
            earlier=earlier_rates(settings.prior) if settings.prior else None,
        )
        if self._setting("advantage") == "posterior-mean":
            check_posterior(self.allocator.estimator)
        self.reward_funcs = [
            function
            if isinstance(function, (str, torch.nn.Module))  # a reward model; TRL has loaded the named ones
            else watched(function, name, self._setting("prompt_id_column"), self._setting("reward_timeout"))
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        check_awaited(self.reward_funcs, self.reward_func_names, getattr(self, "async_loop", None))
        self._scored: Scored | None = None
        self._model_tokens: list[int] = []
        self._epochs_finished = 0
        self._samples: SampleStore | None = None
        self.replay = SuccessBuffer(self._setting("replay")) if self._setting("replay") else None
        # Without a data set TRL makes one of equal rows, and the environment chooses the tasks.
        given = kwargs.get("train_dataset", args[3] if len(args) > 3 else None)
        no_data = given is None and getattr(self, "environment_factories", None) is not None
        self.identity = None if no_data else self._make_identity()
        self._identified = False
        self.skipping = self._make_skipping()
        self._prompts_once = self._shares_prefill()
        if self.accelerator.is_main_process:
            for reason in without_effect(self.args, self.allocator, None if no_data else self.train_dataset):
                self.session.warn_once(reason, reason)
        if getattr(self, "vllm_generation", None) is not None:
            served: Any = self.vllm_generation
            served.generate = one_completion_per_row(served.generate, lambda: self._training)
        self.add_callback(WarnOfSplitGenerations(self.num_iterations))
        if self._setting("log_samples") and self.accelerator.is_main_process:
            self._samples = SampleStore(self._setting("log_samples"))
            self.add_callback(SaveSamples(self._samples))

    def _setting(self, name: str) -> Any:
        return setting(self.args, name)

    @property
    def allocator(self) -> KnapsackAllocator:
        """The allocator of the run."""
        return self.session.allocator

    def _check_run(self) -> None:
        """Check the settings that depend on the reward functions and processes, which only exist now."""
        outcome = self._setting("outcome_reward")
        if outcome is not None and outcome not in self.reward_func_names:
            raise ValueError(f"outcome_reward must name a reward function {self.reward_func_names}, got {outcome!r}")
        if self._setting("reward_timeout") is not None and not can_interrupt():
            raise ValueError("reward_timeout needs signals: train in the main thread, and not on Windows")
        if self._setting("replay"):
            check_replay(self)
        if self._setting("rounds") == 2:
            check_two_rounds(self)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise ValueError(
                f"the launcher started {launched} processes but training runs on {self.accelerator.num_processes}; "
                "on CPUs use torchrun --nproc_per_node"
            )

    def _make_identity(self) -> Identity | None:
        """Check the data set; return what tells its prompts apart, None where nothing has to."""
        column, data = self._setting("prompt_id_column"), self._visible_data
        features = self.session.settings.columns
        present: Any = data.column_names
        if present is not None:
            self.session.settings.check_columns(present)
        if self.session.settings.allocation == "uniform":
            if self._setting("log_allocations") or self._setting("log_samples"):
                return Identity(column, features=features)
            columns: Any = data.column_names
            return Identity(column, hashed=False) if columns is None or column in columns else None
        several = self.accelerator.num_processes > 1
        proven = check_dataset(data, column, gather_object if several else None)
        return Identity(column, proven=proven, features=features)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of features where unused columns are removed."""
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns
        kept += [name for name in AllocationSettings.of(self.args).columns if name not in kept]

    def _make_skipping(self) -> Skipping | None:
        """Return how rows without a gradient are left out, None if all rows are trained on."""
        wanted = self._setting("skip_zero_advantages")
        if wanted is False or (wanted is None and self.session.settings.allocation == "uniform"):
            return None
        reason = why_inexact(self)
        if reason is None:
            return Skipping.of(self)
        self.session.warn_once("skipping", ALL_ROWS % reason)
        return None

    def _shares_prefill(self) -> bool:
        """Return whether prompts are prefilled once: where wanted, generated here, and where no process waits."""
        wanted = self._setting("share_prefill") and self.session.settings.allocation != "uniform"
        elsewhere = self.use_vllm or getattr(self, "use_transformers_continuous_batching", False)
        whole = self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return wanted and not elsewhere and whole

    @property
    def _visible_data(self) -> Any:
        """The data set as reward functions see it."""
        data: Any = self.train_dataset
        if not self.args.remove_unused_columns or data.column_names is None:
            return data
        self._set_signature_columns_if_needed()
        return data.select_columns([name for name in data.column_names if name in (self._signature_columns or [])])

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._training:
            return super()._generate_and_score_completions(inputs)
        drawn = self._draw(inputs)
        if drawn is not None and self.session.settings.rounds == 2:
            step, self._scored, output = generate_in_two_rounds(self, drawn)
        else:
            rows, step = self._plan_step(inputs, drawn)
            output = self._generate_rows(rows, step)
        self._finish_step(step, output)
        return output

    def _generate_rows(self, rows: list[dict[str, Any]], step: Step) -> dict[str, Any]:
        """Let TRL generate and score the rows; its advantages are replaced where groups are ragged."""
        mean = self._mean
        if step.ragged and step.group_R.size % mean:  # TRL reshapes to (-1, mean): let it see groups of one
            self.num_generations = 1
        try:
            return super()._generate_and_score_completions(rows)
        finally:
            self.num_generations = mean

    def _generate(self, prompts: Any) -> Any:
        generated = super()._generate(prompts)
        self._model_tokens = model_tokens(generated)
        return generated

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._training and self._prompts_once):
            return super()._generate_single_turn(*args, **kwargs)
        with prompts_once(self.accelerator.unwrap_model(self.model_wrapped)):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # Not from the masks of the batch: on request TRL blanks the rows of truncated answers.
        tokens, self._model_tokens = self._model_tokens or [len(ids) for ids in completion_ids_list], []
        lengths = torch.tensor(tokens, device=rewards_per_func.device)
        self._scored = Scored(
            matrix=rewards_per_func.detach().double().cpu().numpy(),
            lengths=gather(lengths).cpu().numpy(),
            prompts=prompts,
            completions=completions,
            answers=[row.get("answer") for row in inputs],
        )
        if self._training:
            self.generated.add(self._scored.lengths)
        return rewards_per_func

    @property
    def _mean(self) -> int:
        """Mean rollouts per prompt."""
        size: Any = self.num_generations
        return size

    @property
    def _generation(self) -> int:
        """Number of the current generation, from 1; an update may take several, or several updates may share one."""
        args: Any = self.args
        accumulation = args.gradient_accumulation_steps
        batches = self.state.global_step * accumulation + self._step % accumulation
        return batches // (args.steps_per_generation * self.num_iterations) + 1

    # -- before generation ------------------------------------------------------------------------------------------

    def _plan_step(self, inputs: list[Row], drawn: Drawn | None) -> tuple[list[Row], Step]:
        """Allocate over the prompts of all processes; return this process's rows and the step."""
        mean = self._mean
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if drawn is None:
            plan = self.session.plan_unidentified(len(inputs) * processes // mean, mean)
            return inputs, Step(plan, plan.expand(), ragged=False)
        distinct, block_prompt = numbered(drawn.keys)
        stock_R = np.repeat(block_prompt, mean)
        plan = self._agree_on(self._plan(drawn))
        group_R = plan.expand()
        if self.session.settings.allocation == "uniform" or np.array_equal(group_R, stock_R):
            return inputs, Step(plan, stock_R, ragged=False)  # exactly the stock step: same rows, same order
        if len(distinct) < len(drawn.keys):
            self.session.warn_once(
                "duplicates", "a batch holds the same prompt more than once; its rollouts form one group"
            )
        return drawn.bring(plan.ids, group_R, rank, processes, gather_object), Step(plan, group_R, ragged=True)

    def _draw(self, inputs: list[Row]) -> Drawn | None:
        """Return the prompts that the data loader drew, None where they cannot be told apart and need not be."""
        if self.identity is None:
            return None
        uniform = self.session.settings.allocation == "uniform"
        try:
            drawn = draw(
                inputs,
                self._mean,
                self.identity,
                rank=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                gather=gather_object,
                warn=self._note_clash,
            )
        except BrokenGroupError:
            if not uniform:
                raise
            return None
        except ValueError as error:
            if uniform:
                return None
            if not self._identified:
                raise
            self.allocator.failures["identification"] += 1
            self.session.warn_once("identity", f"{error}; every prompt of the batch gets num_generations rollouts")
            return None
        self._identified = True
        return drawn

    def _note_clash(self, text: str) -> None:
        """Refuse an id that names several prompts in the first batch; later they are kept apart."""
        if not self._identified:
            raise ValueError(text)
        self.session.warn_once("clash", f"{text}. They are kept apart, the later ones with a hash behind the id")

    def _plan(self, drawn: Drawn) -> Plan:
        """Return the plan for the prompts of the batch."""
        args: Any = self.args
        multiple = self.accelerator.num_processes * args.steps_per_generation
        return self.session.plan(drawn.keys, self._mean, multiple=multiple, features=drawn.features)

    def _agree_on(self, plan: Plan) -> Plan:
        """Return the main process's plan everywhere, so that differences between machines cannot split a group."""
        decision = [plan]
        broadcast_object_list(decision)
        return decision[0]

    # -- after scoring ----------------------------------------------------------------------------------------------

    def _finish_step(self, step: Step, output: dict[str, Any]) -> None:
        """Replace advantages where groups are ragged or another kind is asked for, record outcomes, log."""
        scored = self._take_scored(step.group_R.size)
        infinite = bool(np.isinf(scored.matrix).any())
        if infinite:
            self.session.warn_once("infinite", "a reward function returned an infinite value; the rollout is unscored")
        total = scored.total(self._weights)
        learned = self.session.observe(
            step.plan,
            step.group_R,
            self._outcome(scored),
            scored.lengths,
            step=self._generation,
            expected=self._setting("advantage") == "posterior-mean",
        )
        rewarded = outcomes_by_position(step.group_R, total, len(step.plan.ids))
        over_mean = self._setting("advantage") in OVER_MEAN
        trained = of_outcomes(learned.groups) if over_mean else rewarded
        mixed = self._mix_in(step, learned.groups, trained.rewards_R, output)
        broken = infinite and self.session.settings.allocation != "uniform"
        if step.ragged or mixed is not None or over_mean or broken:
            replaced = trained if mixed is None else outcomes_by_position(step.group_R, mixed, len(step.plan.ids))
            self._replace_advantages(step, scored, replaced, output, learned.expected)
        self._add_metrics(step, learned.metrics, rewarded, scored.lengths)
        if (samples := self._samples) is not None and step.plan.identified:
            generation, ids = self._generation, step.plan.ids
            self.session.survive("sampling", lambda: scored.add_to(samples, ids, learned.groups, generation))

    def _take_scored(self, rows: int) -> Scored:
        """Return what was scored last, of this number of rows over all processes."""
        scored, self._scored = self._scored, None
        expected = (rows, len(self.reward_func_names))
        if scored is None or scored.matrix.shape != expected:
            got = None if scored is None else scored.matrix.shape
            raise RuntimeError(
                f"expected rewards of shape {expected}, got {got}; "
                "a subclass may override _calculate_rewards without calling super()"
            )
        return scored

    @property
    def _weights(self) -> FloatArray:
        return self.reward_weights.double().cpu().numpy()

    @property
    def _aggregation(self) -> str:
        return getattr(self, "multi_objective_aggregation", "sum_then_normalize")  # TRL 1.9 has no choice

    def _replace_advantages(
        self,
        step: Step,
        scored: Scored,
        trained: GroupOutcomes,
        output: dict[str, Any],
        expected: FloatArray,
    ) -> None:
        advantage = self._setting("advantage")
        advantages = ragged_advantages(
            trained,
            scored.finite,
            self._weights,
            scale=self.scale_rewards,
            aggregation=self._aggregation,
            weighting=self._setting("weighting"),
            advantage=advantage,
            baseline=trained.by_outcome(expected) if advantage == "posterior-mean" else None,
        )
        old = output["advantages"]
        local = old.shape[0]
        start = self.accelerator.process_index * local
        mine = torch.as_tensor(advantages[start : start + local], dtype=old.dtype, device=old.device)
        if mine.shape != old.shape:
            raise RuntimeError(
                f"TRL computed advantages of shape {tuple(old.shape)}, the groups give {tuple(mine.shape)}"
            )
        output["advantages"] = mine
        logged: Any = self._logs.get("advantages")
        if logged is not None:
            for _ in range(min(len(logged), advantages.size)):
                logged.pop()
            in_log = advantages if step.generated_R is None else advantages[np.argsort(step.generated_R)]
            logged.extend(in_log.tolist())
        zero_std = self._metrics["train"].get("frac_reward_zero_std")
        if zero_std and self.scale_rewards != "batch" and self._aggregation == "sum_then_normalize":
            zero_std[-1] = float(1.0 - trained.effective[trained.group_R].mean())

    def _mix_in(
        self, step: Step, groups: GroupOutcomes, total: FloatArray, output: dict[str, Any]
    ) -> FloatArray | None:
        """Return the training rewards with stored successes in place of failures; None if there are none."""
        if self.replay is None or not step.plan.identified:
            return None
        trained, figures = mix_in(self.replay, self, step, groups, total, output)
        for name, number in figures.items():
            self._metrics["train"][name].append(number)
        return trained if figures["replay/mixed_in"] else None

    def _outcome(self, scored: Scored) -> FloatArray:
        """Return the (R,) reward of the named function, or by default the (R, F) parts of the training reward."""
        name = self._setting("outcome_reward")
        if name is None:
            return scored.finite * self._weights
        return scored.finite[:, self.reward_func_names.index(name)]

    def _add_metrics(self, step: Step, learned: dict[str, float], trained: GroupOutcomes, lengths: IntArray) -> None:
        numbers = dict(learned)
        if self.accelerator.num_processes > 1:
            work = lengths.reshape(self.accelerator.num_processes, -1).sum(axis=1)
            numbers["process_imbalance"] = float(work.max() / max(work.mean(), 1))
        by_prompt = trained.mean_reward[~np.isnan(trained.mean_reward)]
        numbers["reward_per_prompt"] = float(by_prompt.mean()) if by_prompt.size else float("nan")
        for name, number in select_metrics(numbers, self._setting("log_metrics")).items():
            self._metrics["train"][f"knapsack/{name}"].append(number)

    # -- resume -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GRPOTrainer.train``; resuming also restores the allocator.

        ``True`` takes the newest complete checkpoint, whichever trainer wrote it, and warns of newer incomplete ones.
        With a checkpoint of the stock trainer the allocator continues from the newest older state beside it, or else
        with what it knows, with a warning. The order of prompts continues where it was, in every epoch; TRL alone would
        start again with the order of the first one.

        Raises:
            ValueError: there is no complete checkpoint, or its state is damaged or of other settings.
        """
        if resume_from_checkpoint is True:  # without any checkpoint the parent raises
            newest = newest_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = True if newest is None else str(newest)
        self._epochs_finished = 0
        if resume_from_checkpoint and isinstance(resume_from_checkpoint, (str, os.PathLike)):
            folder = Path(resume_from_checkpoint)
            self._epochs_finished = finished_epochs(folder)
            self.restore_progress(folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_finished):
            next(iter(sampler), None)  # draws an epoch's order, as at its start
        return sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            # In a hyperparameter search the trainer's folder is one below output_dir.
            root = Path(self._get_output_dir(trial=trial))
            begin_checkpoint(root / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.save_progress)
        super()._save_checkpoint(model, trial)

    def save_progress(self, checkpoint: Path) -> None:
        """Write the state of the run into a checkpoint.

        Raises:
            OSError: a file cannot be written.
        """
        self.generated.save(checkpoint)
        if self.replay is not None:
            self.replay.save(checkpoint / REPLAY_FILE)
        self.session.save(checkpoint)

    def restore_progress(self, checkpoint: Path) -> None:
        """Load what :meth:`save_progress` wrote; :meth:`train` does this when it resumes.

        If the data set has changed, estimates of all prompts are kept, also of those that were removed, and the numbers
        of known, new and removed prompts are logged.

        Raises:
            ValueError: the state is damaged or belongs to another estimator.
        """
        state = newest_state(checkpoint)
        if state is None or state.parent != checkpoint:
            start = "with what it knows" if state is None else f"from that of {state.parent.name}"
            self.session.warn_once("no state", f"{checkpoint} has no {STATE_FILE}: the allocator continues {start}")
        if state is not None:
            self.session.restore(state)
            present = None if self.identity is None else prompt_keys(self._visible_data, self.identity)
            if present is not None:
                log_changed_data(self.allocator.tracker.prompt_ids, present)
        self.generated = Generated.load(checkpoint)
        if self.replay is not None and (checkpoint / REPLAY_FILE).exists():
            self.replay.load(checkpoint / REPLAY_FILE)
