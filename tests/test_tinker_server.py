"""tinker-cookbook's own trainer with the recipes of docs/engines.md, on SkyRL's Tinker server: ``make test-tinker``.

The server runs on JAX and the CPU, with a tiny Llama of random weights. An answer is one token, and each prompt accepts
more of them than the one before.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from test_engines import MEAN, logged, planner_of, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # those of the engines are not ours
    pytest.mark.skipif(importlib.util.find_spec("skyrl") is None, reason="SkyRL is not installed: make test-tinker"),
]

TOKENS = 64
STEPS = 12
PROMPTS = {f"p{k}": 1 << k for k in range(6)}
"""How many of the tokens each prompt accepts."""

# `uv run` starts the server, which looks for that in the command line and starts its engine in the same way.
PROJECT = """
[project]
name = "server"
version = "0"
requires-python = ">=3.12"

[project.optional-dependencies]
tinker = []
jax = []
"""


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"<{k}>": k for k in range(TOKENS)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<0>", pad_token="<0>").save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            eos_token_id=0,
            bos_token_id=0,
            pad_token_id=0,
        )
    )
    # Neither is trained. Logits of stock random weights are within 1 of each other, whatever is learned before.
    model.model.embed_tokens.weight.data *= 30
    model.lm_head.weight.data *= 4
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address and the model of a running server."""
    folder = tmp_path_factory.mktemp("server")
    make_model(folder / "model")
    (folder / "pyproject.toml").write_text(PROJECT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = Path(sys.prefix)
    command = [
        environment / "bin" / "uv",
        "run",
        "--active",
        "--no-sync",
        "--offline",
        "--frozen",
        "-m",
        "skyrl.tinker.api",
    ]
    options = {
        "base-model": folder / "model",
        "backend": "jax",
        "backend-config": json.dumps({"max_lora_adapters": 8, "max_lora_rank": 8, "sample_max_num_sequences": 64}),
        "checkpoints-base": folder / "checkpoints",
        "database-url": f"sqlite:///{folder}/server.db",
        "host": "127.0.0.1",
        "port": port,
    }
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    variables = {"JAX_PLATFORMS": "cpu", "VIRTUAL_ENV": str(environment)}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with (folder / "server.log").open("wb") as log:
        running = subprocess.Popen(
            [*map(str, command)],
            cwd=folder,
            env={**os.environ, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert running.poll() is None, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{address}/api/v1/healthz", timeout=10):
                    break
            except OSError:
                time.sleep(0.2)
        yield SimpleNamespace(address=address, model=folder / "model")
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


@pytest.fixture
def trained(server, tmp_path, monkeypatch):
    """Train with the recipe of one or two rounds, and return the rows of the log."""
    pytest.importorskip("tinker_cookbook")
    import chz
    import tinker
    from tinker_cookbook.rl import train
    from tinker_cookbook.rl.problem_env import ProblemGroupBuilder
    from tinker_cookbook.rl.types import Env, RLDataset, RLDatasetBuilder, StepResult

    monkeypatch.setenv("TINKER_API_KEY", "tml-none")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    page = recipe("tinker_cookbook")

    class Problem(Env):
        def __init__(self, name):
            self.name = name

        async def initial_observation(self):
            number = [*PROMPTS].index(self.name)
            return tinker.ModelInput.from_ints([20 + number, 1, 20 + number, 2]), []

        async def step(self, action, *, extra=None):
            return StepResult(float(action[0] < PROMPTS[self.name]), True, tinker.ModelInput.from_ints([]), [])

    class Problems(RLDataset):
        def get_batch(self, index):
            return [ProblemGroupBuilder(lambda name=name: Problem(name), MEAN, name) for name in PROMPTS]

        def __len__(self):
            return STEPS

    def run(rounds, **options):
        planner = planner_of(vars(page), tmp_path, rounds)
        kind = page.TwoRoundDataset if rounds == 2 else page.KnapsackDataset

        @chz.chz
        class Builder(RLDatasetBuilder):
            async def __call__(self):
                return kind(Problems(), planner, lambda builder: builder.dataset_name), None

        config = train.Config(
            base_url=server.address,
            model_name=str(server.model),
            dataset_builder=Builder(),
            recipe_name="knapsack",
            learning_rate=1e-2,
            max_tokens=1,
            lora_rank=8,
            eval_every=0,
            save_every=0,
            log_path=str(tmp_path / "log"),
            rollout_error_tolerance=page.TwoRounds() if rounds == 2 else None,
            **options,
        )
        asyncio.run(train.main(config))
        planner.learn()
        assert not planner.session.allocator.failures
        return logged(tmp_path)

    return run


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "minibatches"])
def test_the_cookbooks_trainer_learns_on_groups_of_planned_sizes(trained, rounds, stream, capsys):
    from tinker_cookbook.rl.train import StreamMinibatchConfig

    streamed = {"stream_minibatch_config": StreamMinibatchConfig(groups_per_batch=len(PROMPTS), num_minibatches=2)}
    rows = trained(rounds, **streamed if stream else {})
    assert len(rows) == STEPS
    for row in rows:
        assert sorted(row["prompt_ids"]) == [*PROMPTS]  # in the order in which groups end
        assert row["counts"] == row["arrived"]
        assert sum(row["counts"]) == MEAN * len(PROMPTS)
    assert len({n for row in rows for n in row["counts"]}) > 2
    successes = [sum(row["successes"]) for row in rows]
    untrained = MEAN * sum(PROMPTS.values()) / TOKENS  # of a step, with one round
    early, late = sum(successes[:4]), sum(successes[-4:])
    with capsys.disabled():
        print(
            f"\n{rounds=} {stream=} successes by step: {successes}, of the first four {early}, of the last four {late}"
        )
    assert late > 2 * untrained * 4


def test_asynchronous_training_in_two_rounds_is_refused(trained):
    from tinker_cookbook.rl.train import AsyncConfig

    asynchronous = AsyncConfig(max_steps_off_policy=1, groups_per_batch=len(PROMPTS))
    with pytest.raises(RuntimeError, match="two rounds need synchronous training"):
        trained(2, async_config=asynchronous)
