"""The lab: its gradient against TRL's, its beds against what they promise, and its dry run."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from transformers import AutoModelForCausalLM, TrainerCallback  # noqa: E402

import tiny  # noqa: E402
from experiments.accelerator import policy as policy_module  # noqa: E402
from experiments.accelerator.policy import Policy, Rollouts  # noqa: E402
from experiments.lab import __main__ as command  # noqa: E402
from experiments.lab import beds, registration, skills  # noqa: E402
from experiments.lab.run import QUICK, LabTrainer  # noqa: E402
from knapsack_rl.advantages import group_advantages  # noqa: E402
from knapsack_rl.tasks import base_model_path  # noqa: E402
from knapsack_rl.tasks.generated import Problem  # noqa: E402
from knapsack_rl.tasks.pretraining import success_rates  # noqa: E402
from knapsack_rl.trl import KnapsackGRPOTrainer  # noqa: E402

ROOT = Path(__file__).parent.parent

# -- The gradient ------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """The gradients of the last update, as the optimizer gets them, and the weights that it changed."""

    def __init__(self):
        self.found = self.weights = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(("passes", "iterations"), [(1, 1), (2, 1), (1, 2)])
def test_the_gradient_is_that_of_the_trl_trainer(tmp_path, passes, iterations):
    """TRL passes all rows, the lab those with an advantage; prompts and completions have several lengths."""
    gradients, batches = Gradients(), []
    allocator = tiny.informed_allocator()
    trainer = tiny.trainer(
        KnapsackGRPOTrainer,
        tmp_path,
        extra={"callbacks": [gradients], "allocator": allocator},
        per_device_train_batch_size=32 // passes,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        max_steps=iterations,
        num_iterations=iterations,
        epsilon=policy_module.CLIP_LOW,
        epsilon_high=policy_module.CLIP_HIGH,
        max_grad_norm=0.0,
        loss_type="dapo",
        skip_zero_advantages=False,
    )
    plain = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (batches.append(inputs), plain(model, inputs))[1]
    trainer.train()
    assert len(batches) == passes * iterations
    del batches[passes:]

    prompts, answers, advantages, lengths = [], [], [], []
    for batch in batches:
        for row in range(len(batch["advantages"])):
            prompts.append(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist())
            length = int(batch["completion_mask"][row].sum())
            answers.append(batch["completion_ids"][row, :length].tolist())
            lengths.append(length)
            advantages.append(float(batch["advantages"][row]))
    groups = ["".join(map(str, prompt)) for prompt in prompts]
    assert len(set(Counter(groups).values())) > 1  # ragged
    assert 0 < np.count_nonzero(advantages) < len(advantages)
    assert len(set(lengths)) > 1

    own = tiny.model()
    policy = Policy(own, prompts, [t == 1 for t in range(own.config.vocab_size)], max_tokens=5, learning_rate=1e-2)
    width = max(lengths)
    padded = torch.tensor([row + [0] * (width - len(row)) for row in answers])
    rewards = tiny.has_digit_five(tiny.tokenizer().batch_decode(answers))
    mine = group_advantages(groups, rewards)
    np.testing.assert_allclose(mine, advantages, rtol=1e-5)
    rollouts, weights = Rollouts(padded, torch.tensor(lengths)), torch.tensor(mine, dtype=torch.float32)
    with torch.no_grad():
        sampled_with = policy.log_probabilities(prompts, rollouts) if iterations > 1 else None
    own.load_state_dict(gradients.weights)
    rows, _ = policy.gradient(prompts, rollouts, weights, sampled_with)
    assert rows == np.count_nonzero(advantages)
    largest = max(float(gradient.abs().max()) for gradient in gradients.found.values())
    for (name, _), gradient in zip(own.named_parameters(), policy.gradients, strict=True):
        torch.testing.assert_close(gradient, gradients.found[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_two_updates_from_the_same_rollouts_keep_the_probabilities_at_sampling():
    """In passes of two rows, of which a third has no advantage."""
    trainers = [LabTrainer(replace(QUICK, arm="uniform", rows_per_pass=2), base_model_path(), "cpu") for _ in "ab"]
    rows = list(trainers[0].data.train)[:6]
    prompts = trainers[0].tokens_of(rows)
    rollouts, advantages = trainers[0].policy.sample(prompts), torch.tensor([5.0, 0.0, -3.0, 1.0, 0.0, 2.0])
    assert trainers[0].policy.update(prompts, rollouts, advantages, 2) == 8
    own = trainers[1].policy
    with torch.no_grad():
        sampled_with = own.log_probabilities(prompts, rollouts)
    for _ in range(2):
        assert own.gradient(prompts, rollouts, advantages, sampled_with)[0] == 4
        own.step()
    for one, other in zip(*(trainer.policy.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_rows_of_like_length_pass_together():
    trainer = LabTrainer(replace(QUICK, arm="uniform", rows_per_pass=3), base_model_path(), "cpu")
    rollouts, passed = Rollouts(torch.zeros(8, 6, dtype=torch.long), torch.tensor([6, 1, 5, 2, 4, 1, 3, 6])), []
    seen = trainer.policy.log_probabilities

    def looked_at(prompts, kept):
        passed.append((kept.lengths.tolist(), kept.tokens.shape[1]))
        return seen(prompts, kept)

    trainer.policy.log_probabilities = looked_at
    prompts = trainer.tokens_of(list(trainer.data.train)[:8])
    trainer.policy.gradient(prompts, rollouts, torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 0.0]))
    assert passed == [([1, 1, 2], 2), ([3, 4, 5], 5), ([6], 6)]


def test_prompts_wait_in_a_queue_where_the_arm_says_so():
    settings = replace(QUICK, arm="recommended-queue", rollouts_per_prompt=8)
    trainer = LabTrainer(settings, base_model_path(), "cpu")
    rates = trainer.success_rates(trainer.data.train)
    assert settings.size == (16, 4)
    counts = []
    for number, batch in zip(range(1, 13), trainer.batches(), strict=False):
        waited = [*dict.fromkeys([*trainer.queue.waiting, *(row["prompt_id"] for row in batch)])]
        plan = trainer.plan(batch)
        assert plan.counts.sum() == 64
        assert plan.ids == waited[: len(plan.ids)] and trainer.queue.waiting == waited[len(plan.ids) :]
        counts.append(len(plan.ids))
        group = plan.expand()
        rate_of = dict(zip([row["prompt_id"] for row in trainer.data.train], rates.tolist(), strict=True))
        rewards = np.random.default_rng(number).random(group.size) < [rate_of[plan.ids[place]] for place in group]
        trainer.session.observe(plan, group, rewards.astype(float), np.ones(group.size, int), number)
    assert len(set(counts)) > 1
    assert LabTrainer(replace(settings, arm="recommended-twice"), base_model_path(), "cpu").queue is None


# -- The beds ----------------------------------------------------------------------------------------------------------


def grade(name, row):
    return row["informative"] if name.startswith("skills") else row["digits"]


@pytest.mark.parametrize("name", beds.BEDS)
def test_prompts_are_drawn_alike_for_training_and_evaluation(name):
    task = beds.bed(name).data(2048, 512)
    train, held_out = ({row["prompt"] for row in part} for part in (task.train, task.held_out))
    assert (len(train), len(held_out)) == (2048, 512)
    assert not train & held_out
    shares = [Counter(grade(name, row) for row in part) for part in (task.train, task.held_out)]
    for one in set(shares[0]) | set(shares[1]):
        assert abs(shares[0][one] / 2048 - shares[1][one] / 512) < 2 / 512, one
    for row in (*task.train, *task.held_out):
        assert len(row["answer"]) < task.max_completion_tokens  # and the end


def test_an_unknown_bed_is_refused():
    with pytest.raises(ValueError, match=r"bed must be one of .*skills-dev, addition-dev, running-sums, got 'sofa'"):
        beds.bed("sofa")


def test_columns_of_the_skills_say_everything_nothing_or_what_is_wrong():
    task = skills.REPORTED.task(2048, 512)
    rows = [*task.train, *task.held_out]
    logit = np.array([skills.REPORTED.logits()[skills.parts_of(row["prompt"])[0]] for row in rows])

    def explained(column):
        """Share of the variance of the skills' logits that the means per value of a column explain."""
        names = np.array([row[column] for row in rows])
        means = {name: logit[names == name].mean() for name in set(names)}
        return np.var([means[name] for name in names]) / np.var(logit)

    assert explained("informative") == pytest.approx(1.0)
    assert explained("useless") < 2 * skills.REPORTED.count / len(rows)  # of chance alone: values over rows
    assert explained("misleading") == pytest.approx(0.0, abs=1e-3)
    pairs = {row["misleading"]: set() for row in rows}
    for row in rows:
        pairs[row["misleading"]].add(row["informative"])
    assert len(pairs) == skills.REPORTED.count // 2
    assert {len(pair) for pair in pairs.values()} == {2}


def test_the_targets_of_the_skills_are_their_success_rates():
    """The product of the chances of the right digits is the rate, the rest is even, and answers are drawn from it."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, skills.REPORTED.count, 4000), rng.integers(0, skills.QUESTIONS, 4000)
    tokens, targets = (part.numpy() for part in skills.REPORTED.batch(*chosen, rng))
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-5)
    assert set(targets[:, -1].argmax(-1)) == {1}  # the end
    prompt = skills.PROMPT_TOKENS
    right = np.take_along_axis(targets[:, :4], (skills.REPORTED.codes()[chosen[0]] + 2)[:, :, None], -1)[:, :, 0]
    rates = skills.REPORTED.target_rates(*chosen)
    np.testing.assert_allclose(right.prod(1), rates, rtol=1e-4)
    drawn = (tokens[:, prompt:] == skills.REPORTED.codes()[chosen[0]] + 2).all(1)
    assert abs(drawn.mean() - rates.mean()) < 5 * np.sqrt(np.mean(rates * (1 - rates)) / 4000)
    asked = skills.REPORTED.problem(int(chosen[0][0]), int(chosen[1][0]))
    from knapsack_rl.tasks.pretraining import VOCABULARY

    assert tokens[0, :prompt].tolist() == [VOCABULARY[character] for character in asked.prompt]
    assert rates.min() < 5e-4 < 0.85 < rates.max()


@pytest.mark.slow
def test_the_base_model_of_the_skills_has_the_rates_it_should(tmp_path):
    folder = beds.base_folder("skills", tmp_path, quick=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for rows in (skills.REPORTED.task(2048, 512).train, skills.REPORTED.task(2048, 512).held_out):
        found = success_rates(model, [Problem(row["prompt"], row["answer"], "", 0) for row in rows]).numpy()
        wanted = skills.REPORTED.target_rates(*np.array([skills.parts_of(row["prompt"]) for row in rows]).T)
        off = np.log(found / (1 - found)) - np.log(wanted / (1 - wanted))
        assert np.sqrt(np.mean(off**2)) < 0.5
        assert found.min() < 5e-4 < 0.85 < found.max()
    before = folder.joinpath("model.safetensors").stat().st_mtime_ns
    assert beds.base_folder("skills", tmp_path, quick=False) == folder
    assert folder.joinpath("model.safetensors").stat().st_mtime_ns == before  # made once


def test_accuracy_without_sampling_is_that_of_samples():
    trainer = LabTrainer(replace(QUICK, held_out_prompts=64), base_model_path(), "cpu")
    held_out = list(trainer.data.held_out)
    rates = trainer.success_rates(held_out)
    found = trainer.evaluate()
    assert found["held_out/accuracy"] == pytest.approx(rates.mean())
    again = held_out * 60
    rewards = trainer._score(again, trainer.policy.sample(trainer.tokens_of(again)))
    error = np.sqrt((rates * (1 - rates)).sum() / 60) / 64
    assert abs(np.mean(rewards) - rates.mean()) < 5 * error < 0.05


def test_the_arm_that_knows_the_rates_takes_the_optimum_for_them():
    """Against the marginal gains p (1 - p)^2 times the chance of another outcome, given out one by one."""
    trainer = LabTrainer(replace(QUICK, arm="known"), base_model_path(), "cpu")
    batch = next(trainer.batches())
    rates = trainer.success_rates(batch)
    counts = np.full(8, 2)
    value = lambda n: (1 - rates**n - (1 - rates) ** n) * rates * (1 - rates) ** 2  # noqa: E731
    for _ in range(4 * 8 - 16):
        gains = np.where(counts < 16, value(counts + 1) - value(counts), -1)
        counts[gains.argmax()] += 1
    assert trainer.plan(batch).counts.tolist() == counts.tolist()
    assert len(set(counts)) > 2
    trainer.step(batch, 1)
    assert trainer.rollouts == 32


def test_an_arm_that_needs_the_trl_trainer_is_refused():
    with pytest.raises(ValueError, match="has replay, which needs the TRL"):
        LabTrainer(replace(QUICK, arm="knapsack-replay"), base_model_path(), "cpu")


def test_weights_per_prompt_reach_the_loss():
    trainer = LabTrainer(replace(QUICK, arm="knapsack-per-prompt"), base_model_path(), "cpu")
    assert (trainer.settings.weighting, QUICK.weighting) == ("prompt", "auto")


# -- The command -------------------------------------------------------------------------------------------------------

REPORTED = ("addition", "skills", "running-sums")
SMALL = """
```yaml
beds: [addition, skills, running-sums]
arms: [uniform, uniform-2n]
seeds: [0, 1]
learning_rates: [0.0003, 0.0006, 0.001]
tuning_seed: 1000
steps: 400
```
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.md"
    path.write_text(SMALL)
    return path


def test_the_dry_run_makes_every_run_once_and_goes_on_where_it_stopped(small, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    small.write_text(SMALL.replace("0.0003, 0.0006, ", ""))
    flags = [str(small), "--rows", str(file), "--quick", "--workers", "1", "--bases", str(tmp_path)]
    assert command.main(flags) == 0
    lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["part"] for row in rows) == {"tuning": 3 * 2, "training": 3 * 2 * 2}
    assert all(row["quick"] for row in rows)
    for row in rows:
        settings, mean = row["settings"], {"uniform": 4, "uniform-2n": 8}[row["arm"]]
        assert row["finished"]
        assert row["evaluations"]["rollouts"] == [0, 2 * 8 * mean, 4 * 8 * mean]
        assert row["rows_updated"] == round(sum(r * 8 * mean for r in row["series"]["rollout_ratio"]))
        assert settings["seed"] == 1000 if row["part"] == "tuning" else settings["seed"] in (0, 1)
    assert len({row["base"] for row in rows}) == 3
    for name in REPORTED:
        before = {row["evaluations"]["accuracy"][0] for row in rows if row["settings"]["dataset"] == name}
        assert len(before) == 1  # of one base model, without noise
    assert [(row["seed"], row["settings"]["dataset"]) for row in rows[-6::2]] == [(1, name) for name in REPORTED]

    file.write_text("\n".join([*lines[:-2], lines[-2][:50]]))  # killed while it wrote
    capsys.readouterr()
    assert command.main(flags) == 0
    out, err = capsys.readouterr()
    assert out.count("training: ") == 2
    assert out.endswith("0 runs left\n")
    assert "is torn and passed over" in err
    assert command.main([*flags, "--report"]) == 0
    report = capsys.readouterr().out
    assert all(f"## {name}" in report for name in REPORTED)
    assert "uniform 2N" in report


def test_the_work_is_of_a_module_that_other_processes_import(tmp_path):
    """What a command defines itself is __main__, which a process that it starts does not find."""
    lab = command.Lab(tmp_path / "rows.jsonl", {}, 0.0, 2, {})
    assert lab.work.func.__module__ == "experiments.lab.run"
    assert pickle.loads(pickle.dumps(lab.work)).func is lab.work.func


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(small, tmp_path):
    text = SMALL.replace("0.0003, 0.0006, ", "").replace("uniform, ", "").replace(", skills, running-sums", "")
    small.write_text(text)
    one, two = (tmp_path / name for name in ("one.jsonl", "two.jsonl"))
    assert command.main([str(small), "--rows", str(one), "--quick", "--workers", "1"]) == 0
    words = [sys.executable, "-m", "experiments.lab", str(small), "--rows", str(two), "--quick", "--workers", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (one, two)]
    found = [{row["seed"]: row["evaluations"]["accuracy"] for row in part} for part in rows]
    assert set(found[0]) == set(found[1]) == {0, 1, 1000}
    for seed, accuracy in found[0].items():
        assert accuracy == pytest.approx(found[1][seed], abs=1e-6)


def test_rows_of_a_trial_do_not_stand_in_for_registered_runs(small, tmp_path):
    file = tmp_path / "rows.jsonl"
    settings = vars(registration.read(small).tuning(QUICK)[0])
    file.write_text("".join(json.dumps({"part": "tuning", "settings": settings, **mark}) + "\n"
                            for mark in ({"quick": True}, {"commit": "abc"})))  # fmt: skip
    for mark in ({"quick": True}, {"commit": "abc"}):
        assert command.Lab(file, {}, 0.0, 1, mark).rows("tuning") == [{"part": "tuning", "settings": settings, **mark}]


def test_what_does_not_fit_into_the_time_is_left(small, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    flags = [str(small), "--rows", str(file), "--quick", "--workers", "1", "--bases", str(tmp_path)]
    assert command.main([*flags, "--beds", "addition", "--seconds", "1e-9"]) == 1
    assert capsys.readouterr().out == "8 runs left\n"
    assert command.main([*flags, "--report"]) == 0
    assert "0 of 12 runs that choose the learning rates are there" in capsys.readouterr().out


def test_each_arm_gets_the_rate_that_was_best_for_it_on_the_bed(small):
    plan = registration.read(small)
    rows = [
        {"arm": one.arm, "settings": vars(one), "evaluations": {"rollouts": [0, 1, 2], "accuracy": [0, high, 0.1]}}
        for one, high in zip(plan.tuning(QUICK), [0.1, 0.3, 0.2, 0.9, 0.2, 0.3, *[0.5, 0.1, 0.2] * 4], strict=True)
    ]
    chosen = {(run.dataset, run.arm): run.learning_rate for run in plan.training(QUICK, rows)}
    assert chosen["addition", "uniform"] == 0.0006
    assert chosen["addition", "uniform-2n"] == 0.0003
    assert chosen["skills", "uniform"] == 0.0003
    runs = plan.training(QUICK, rows)
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6
    assert {run.steps for run in runs} == {400}


def test_a_registration_may_ask_for_equal_rollouts(small):
    assert not any(run.equal_rollouts for run in registration.read(small).tuning(QUICK))
    small.write_text(SMALL.replace("steps: 400", "steps: 400\nequal_rollouts: true"))
    plan = registration.read(small)
    rows = [
        {"arm": one.arm, "settings": vars(one), "evaluations": {"rollouts": [0, 1], "accuracy": [0, 1]}}
        for one in plan.tuning(QUICK)
    ]
    assert all(run.equal_rollouts for run in [*plan.tuning(QUICK), *plan.training(QUICK, rows)])


def test_rows_without_a_setting_that_was_added_since_are_still_those_of_their_runs(small, tmp_path):
    file, plan = tmp_path / "rows.jsonl", registration.read(small)
    (first, *_, last), old = plan.tuning(QUICK), {}
    for one in (first, replace(last, equal_rollouts=True)):
        old = {name: value for name, value in vars(one).items() if name != "equal_rollouts" or value}
        with file.open("a") as out:
            out.write(json.dumps({"part": "tuning", "quick": True, "settings": old}) + "\n")
    found = command.Lab(file, {}, 0.0, 1, {"quick": True}).of("tuning", plan.tuning(QUICK))
    assert [row["settings"]["arm"] for row in found] == [first.arm]


def test_registrations_are_whole_and_their_seeds_are_not_tuned_on():
    files = sorted(command.REGISTRATIONS.glob("*.md"))
    assert files
    for file in files:
        plan = registration.read(file)
        assert plan.tuning_seed not in plan.seeds
        for part in ("**Question.**", "**Measures.**", "**What would refute it.**", "**Expected.**"):
            assert part in file.read_text(), f"{file}: {part}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("uniform-2n", "unifrom", "arm must be one of .*got 'unifrom'"),
        ("skills, ", "sofa, ", "bed must be one of .*got 'sofa'"),
        ("[0, 1]", "[0, 0]", "seeds must name at least one, and none twice"),
        ("[0, 1]", "[0, 1000]", "tuning_seed 1000 must not be one of the seeds"),
        ("0.0003, 0.0006", "0.0006, 0.0003", "learning_rates must ascend"),
        ("0.0003", "3e-4", "such as 0.0006"),
        ("steps: 400", "step: 400", "exactly the keys beds, arms"),
        ("steps: 400", "steps: 0", "steps must be at least 1"),
        ("steps: 400", "steps: 400\nequal_rollouts: 1", "equal_rollouts must be true or false, got 1"),
        ("```yaml", "```", "must hold a ```yaml block"),
    ],
)
def test_a_registration_that_cannot_be_run_is_refused(small, tmp_path, capsys, old, new, message):
    small.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        registration.read(small)
    assert command.main([str(small), "--rows", str(tmp_path / "rows.jsonl")]) == 2
    assert "experiments.lab: " in capsys.readouterr().err


def test_a_registration_is_committed_before_its_runs(small, tmp_path, capsys):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    flags = [str(small), "--rows", str(tmp_path / "rows.jsonl")]
    git("init", "-q")
    assert command.main(flags) == 2
    assert "is not committed as it is" in capsys.readouterr().err
    git("add", "small.md")
    git("commit", "-q", "-m", "registered")
    assert registration.commit_of(small) == git("rev-parse", "HEAD")
    small.write_text(SMALL + "more\n")
    assert command.main(flags) == 2
    assert not (tmp_path / "rows.jsonl").exists()


def test_bad_flags_are_named(small, tmp_path, capsys):
    for more, message in (
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--beds", "sofa"], "--beds must be among the registered addition, skills, running-sums, got 'sofa'"),
        (["--arms", "paper,sofa"], "--arms must be among the registered"),
    ):
        assert command.main([str(small), "--rows", str(tmp_path / "rows.jsonl"), *more]) == 2
        assert message in capsys.readouterr().err
