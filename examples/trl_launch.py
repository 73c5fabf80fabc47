"""A TRL launch from a file of configs/trl: a data set by name, the trainer, everything else as TRL's parser reads it.

    accelerate launch --config_file configs/ddp.yaml --num_processes 8 \
        examples/trl_launch.py --config configs/trl/qwen2.5-1.5b.yaml

Flags after the file override it. The same line again resumes from the newest checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser

from knapsack_rl.tasks.data import DataRequest
from knapsack_rl.tasks.registry import load_data
from knapsack_rl.training.data import for_tokenizer
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer


@dataclass
class DataArguments:
    """The data set: see docs/real-models.md for the names."""

    dataset: str = field(metadata={"help": "Name of a data set."})
    train_prompts: int = field(metadata={"help": "Prompts to train on."})
    dataset_path: str = field(default="", metadata={"help": "File or folder to read instead of the hub."})


def main(arguments: list[str] | None = None) -> KnapsackGRPOTrainer:
    """Train."""
    parser = TrlParser((DataArguments, KnapsackGRPOConfig, ModelConfig))
    data, args, model = parser.parse_args_and_config(arguments)
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    request = DataRequest(
        dataset=data.dataset,
        path=data.dataset_path,
        train_prompts=data.train_prompts,
        held_out_prompts=0,
        features=tuple(args.columns),
    )
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left")
    task = for_tokenizer(load_data(request), tokenizer, "auto")
    trainer = KnapsackGRPOTrainer(
        model=model.model_name_or_path,
        processing_class=tokenizer,
        reward_funcs=task.reward,
        args=args,
        train_dataset=Dataset.from_list(list(task.train)),
    )
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))
    return trainer


if __name__ == "__main__":
    main()
