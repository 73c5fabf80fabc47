"""A TRL script with Knapsack RL: another trainer class, another configuration class, nothing else.

    python examples/trl_script.py --steps 10
    torchrun --nproc_per_node 2 examples/trl_script.py --steps 10

With --stock it runs TRL's own trainer.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from knapsack_rl.tasks import accuracy_reward, base_model_path, make_splits, to_rows
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer


def main() -> None:
    """Train, then print the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stock", action="store_true", help="TRL's own trainer")
    parser.add_argument("--output", default="trl-script")
    options = parser.parse_args()

    config_class, trainer_class = KnapsackGRPOConfig, KnapsackGRPOTrainer
    if options.stock:
        config_class, trainer_class = GRPOConfig, GRPOTrainer

    accelerated = torch.cuda.is_available()
    config = config_class(
        output_dir=options.output,
        num_generations=8,  # the mean number of rollouts per prompt
        per_device_train_batch_size=64,
        max_completion_length=6,
        max_steps=options.steps,
        learning_rate=6e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not accelerated,
        bf16=accelerated,
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(base_model_path()),
        processing_class=AutoTokenizer.from_pretrained(base_model_path(), padding_side="left"),
        reward_funcs=accuracy_reward,
        args=config,
        train_dataset=Dataset.from_list(to_rows(make_splits(train=256).train)),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        for row in trainer.state.log_history:
            if "reward" in row:
                ratio = row.get("knapsack/effective_gradient_ratio", 1 - row["frac_reward_zero_std"])
                print(f"step {row['step']}  reward {row['reward']:.3f}  effective gradient ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
