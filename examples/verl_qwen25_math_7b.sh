#!/usr/bin/env bash
# The setting of the Knapsack RL paper on verl: Qwen2.5-Math-7B, DAPO-Math-17K, 256 prompts x 8 rollouts, N_up = 128.
#
#   bash examples/verl_qwen25_math_7b.sh prepare DOWNLOADED.parquet    once: keep one row per prompt
#   bash examples/verl_qwen25_math_7b.sh [more overrides]              train; the same command resumes
#
# Needs pip install "knapsack-rl[verl]" and an inference engine (vLLM) on every node, and a Ray cluster if NODES > 1.
# Not run by this project's tests, which train a tiny model; the overrides are checked by `knapsack-rl verl-args`.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-Math-7B}
DATA=${DATA:-data/dapo_math_17k_unique.parquet}
VALIDATION=${VALIDATION:-$DATA}
RUN=${RUN:-runs/qwen25_math_7b_knapsack}
NODES=${NODES:-1}
GPUS=${GPUS:-8}

if [[ "${1:-}" == prepare ]]; then
    # The published file contains each prompt about a hundred times: keep the first row of each.
    mkdir -p "$(dirname "$DATA")"
    exec python - "$2" "$DATA" <<'PYTHON'
import sys

from pyarrow import parquet

table = parquet.read_table(sys.argv[1])
first = {}
for row, messages in enumerate(table.column("prompt").to_pylist()):
    first.setdefault(repr(messages), row)
parquet.write_table(table.take(list(first.values())), sys.argv[2])
print(f"{table.num_rows} rows, {len(first)} prompts: {sys.argv[2]}")
PYTHON
fi

LAUNCH=(
    data.train_files="$DATA"
    data.val_files="$VALIDATION"
    data.train_batch_size=256
    data.max_prompt_length=2048
    data.max_response_length=4096
    data.filter_overlong_prompts=True
    algorithm.adv_estimator=grpo
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.grad_clip=1.0
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=12288
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=12288
    trainer.n_gpus_per_node="$GPUS"
    trainer.nnodes="$NODES"
    trainer.total_training_steps=1000
    trainer.save_freq=20
    trainer.test_freq=20
    trainer.val_before_train=False
    trainer.project_name=knapsack-rl
    trainer.experiment_name="$(basename "$RUN")"
    trainer.default_local_dir="$RUN"
    'trainer.logger=[console,file]'
)

# Checks the launch and prints the overrides of the plug-in. VERL_ARGS="--allocation uniform" is the baseline,
# VERL_ARGS="--allocation paper" the paper's rule.
# shellcheck disable=SC2086 # VERL_ARGS are several words
LINE=$(knapsack-rl verl-args --one-line --max-rollouts 128 ${VERL_ARGS:-} "${LAUNCH[@]}" "$@")
read -ra SWITCHES <<<"$LINE"

exec python -m verl.trainer.main_ppo "${LAUNCH[@]}" "${SWITCHES[@]}" "$@"
