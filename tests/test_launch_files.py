"""Launch files of configs/trl: their lines through the parsers of accelerate and TRL, and their script on the CPU."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from trl import ModelConfig, TrlParser

import tiny
from knapsack_rl.tasks.data import DataRequest
from knapsack_rl.trl import KnapsackGRPOConfig

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "trl").glob("*.yaml"))
ROLLOUTS = 512 * 4


def script():
    spec = importlib.util.spec_from_file_location("trl_launch", ROOT / "examples" / "trl_launch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


def lines(file):
    """Commands in the comments of a file: deeper indentation continues a command."""
    text = re.sub(r"\n#     (?=\S)", " ", file.read_text())
    return [shlex.split(line) for line in re.findall(r"^#   (accelerate launch .*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_launch_lines_are_understood_by_accelerate_and_trl(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    worlds = []
    for line in lines(file):
        given = launch_command_parser().parse_args(line[2:])
        assert Path(given.training_script).is_file()
        kind = load_config_from_file(given.config_file).distributed_type
        assert kind == {"qwen2.5-1.5b": "MULTI_GPU", "qwen2.5-7b": "FSDP"}[file.stem]
        parser = TrlParser((script().DataArguments, KnapsackGRPOConfig, ModelConfig))
        # Without an accelerator TRL takes bfloat16 for a CPU only.
        data, args, model = parser.parse_args_and_config([*given.training_script_args, "--use_cpu", "true"])
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * given.num_processes == ROLLOUTS
        assert (args.num_generations, args.num_iterations) == (4, 2)
        assert args.max_steps % 2 == args.save_steps % 2 == 0  # a checkpoint between two updates would generate anew
        assert (args.advantage, args.chosen_value(), args.columns) == (
            "posterior-mean",
            "likelihood-0.5",
            ["level", "type"],
        )
        assert args.use_vllm and args.vllm_mode == "colocate" and args.bf16
        assert model.model_name_or_path.startswith("Qwen/Qwen2.5-")
        DataRequest(dataset=data.dataset, train_prompts=data.train_prompts, held_out_prompts=0)
        worlds.append((given.num_machines or 1, given.num_processes))
    assert worlds == [(1, 8), (8, 64)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_unknown_key_is_refused(file, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text() + "max_rolouts: 3\n")
    parser = TrlParser((script().DataArguments, KnapsackGRPOConfig, ModelConfig))
    with pytest.raises(ValueError, match="max_rolouts"):
        parser.parse_args_and_config(["--config", str(wrong), "--use_cpu", "true"])


def test_the_script_trains_a_tiny_model_with_the_settings_of_a_file(tmp_path):
    model = tmp_path / "model"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f'{{"prompt": "{k}+1=", "answer": "{k + 1}", "level": {k % 2}}}\n' for k in range(8)))
    changed = {
        "model_name_or_path": model, "dataset": data, "train_prompts": 8, "feature_columns": "level",
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_completion_length": 4, "max_steps": 4,
        "use_vllm": "false", "bf16": "false", "use_cpu": "true", "gradient_checkpointing": "false",
        "output_dir": tmp_path / "run", "save_steps": 2, "disable_tqdm": "true",
    }  # fmt: skip
    flags = [str(part) for name, value in changed.items() for part in (f"--{name}", value)]
    assert script().main(["--config", str(FILES[0]), *flags]).state.global_step == 4
    assert script().main(["--config", str(FILES[0]), *flags, "--max_steps", "6"]).state.global_step == 6  # goes on
    rows = [json.loads(line) for line in (tmp_path / "run" / "allocations.jsonl").read_text().splitlines()]
    assert [sum(row["counts"]) for row in rows] == [32, 32, 32]
