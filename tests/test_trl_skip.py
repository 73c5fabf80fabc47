"""Rows without a gradient are left out of the updates, and the gradient stays that of all rows."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

import tiny
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.skipping import Skipping, has_gradient
from test_trl import OFF_POLICY

ACCUMULATED = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}
SEQUENCE = {"importance_sampling_level": "sequence"}
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")

CASES = {
    "default": {},
    "scale batch": {"scale_rewards": "batch"},
    "scale none": {"scale_rewards": "none"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "over the mean": {"advantage": "group-mean"},
    "over the posterior mean": {"advantage": "posterior-mean"},
    "one row at a time": {"gradient_accumulation_steps": 16, "per_device_train_batch_size": 1},
    "several generations per update": {"steps_per_generation": 2} | ACCUMULATED,
    "several updates per generation": {"steps_per_generation": 8} | ACCUMULATED,
    "neither divides the other": {
        "steps_per_generation": 6,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 4,
    },
    "a last update of fewer batches": {
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 4,
        "prompts": 6,
        "max_steps": 4,
    },
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "off-policy mask": OFF_POLICY | {"off_policy_mask_threshold": 0.001},
    "two-sided clipping": OFF_POLICY | {"delta": 1.5},
    "truncated answers masked": {"mask_truncated_completions": True} | ACCUMULATED,
    "padded to a multiple": {"pad_to_multiple_of": 4} | ACCUMULATED,
    "replay": {"replay": 2, "max_steps": 6},
    "tokens": {"budget_unit": "tokens"} | ACCUMULATED,
    "two rounds": {"rounds": 2} | ACCUMULATED,
    **{f"{loss}": ACCUMULATED | {"loss_type": loss} for loss in LOSSES},
    **{f"{loss}, off-policy": OFF_POLICY | {"loss_type": loss} for loss in LOSSES},
    **{f"{loss}, sequence": OFF_POLICY | SEQUENCE | {"loss_type": loss} for loss in LOSSES},
}


class Compared(KnapsackGRPOTrainer):
    """Computes the gradient of every update by the stock trainer's loss of all rows too.

    Attributes:
        differences: per update, the distance of the two gradients over the norm of the stock one.
        norms: per update, the norm of the stock gradient.
        rows: per micro-batch, the rows of the stock trainer and those trained on.
    """

    def __init__(self, *args, **kwargs):
        self.differences, self.norms, self.losses, self.rows = [], [], [], []
        self._window = []
        super().__init__(*args, **kwargs)

    def _regroup(self, skipping):
        self._stock = list(self._buffered_inputs)
        super()._regroup(skipping)

    def compute_loss(self, model, inputs, *args, **kwargs):
        stock = self._stock[self._step % len(self._stock)]
        self._window.append(stock)
        self.rows.append((len(stock["advantages"]), len(inputs.get("advantages", ()))))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        self._losses = [*getattr(self, "_losses", []), float(super().training_step(model, *args, **kwargs).detach())]
        if self.accelerator.sync_gradients:
            parameters = list(self.model.parameters())
            inner = self.accelerator.unwrap_model(model)
            losses = [GRPOTrainer.compute_loss(self, inner, stock) for stock in self._window]
            gradients = torch.autograd.grad(sum(losses), parameters)
            wanted = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            got = torch.cat([p.grad.flatten() for p in parameters])
            self.norms.append(float(wanted.norm()))
            self.differences.append(float((got - wanted).norm()) / max(self.norms[-1], 1e-9))
            self.losses.append((sum(self._losses), sum(float(loss.detach()) for loss in losses)))
            self._window, self._losses = [], []
        return torch.zeros(())


def train(folder, *, prompts=24, extra=None, **settings):
    """Train in double precision; the learning rate is high, so that ratios of later updates leave 1."""
    unit = settings.get("budget_unit", "rollouts")
    kind = "bayes-filter" if settings.get("advantage") == "posterior-mean" else "beta"
    informed = None if settings.get("rounds") == 2 else tiny.informed_allocator(prompts, kind, budget_unit=unit)
    made = {"model": tiny.model().double(), "allocator": informed}
    settings = {"learning_rate": 3e-2, "temperature": 1.3} | settings
    trainer = tiny.trainer(Compared, folder, data=tiny.dataset(prompts), extra=made | (extra or {}), **settings)
    trainer.train()
    return trainer


@pytest.mark.trl_range
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_without_rows_of_advantage_0_is_that_of_all_rows(case, tmp_path):
    trainer = train(tmp_path, **CASES[case])
    assert len(trainer.norms) == trainer.state.global_step > 1
    assert min(trainer.norms) > 1e-3
    assert max(trainer.differences) <= 1e-6
    for got, wanted in trainer.losses:
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # TRL computes it in single precision
    every, some = np.sum(trainer.rows, axis=0)
    assert some < every
    skipped = [row["knapsack/rows_skipped"] for row in trainer.state.log_history if "knapsack/rows_skipped" in row]
    assert 0 < np.mean(skipped) < 1


LONG = ("dapo", "few answers succeed")


@pytest.mark.parametrize(("steps", "cases"), [(4, ()), pytest.param(100, LONG, marks=pytest.mark.slow)])
def test_two_processes_stay_in_step_and_train_as_with_all_rows(steps, cases, tmp_path):
    ranks = tiny.on_two_processes("skip_worker.py", tmp_path, str(steps), *cases)
    for case, first in ranks[0].items():
        second = ranks[1][case]
        assert len(first["norms"]) == steps
        assert max(first["differences"]) <= 1e-6, case
        assert [some for _, some in first["rows"]] == [some for _, some in second["rows"]], case
        assert sum(some for _, some in first["rows"]) < sum(every for every, _ in first["rows"]), case
        assert first["fingerprint"] == second["fingerprint"], case
        assert first["apart"] <= 1e-5 < 1e-4 < first["moved"], case


# -- the micro-batches ------------------------------------------------------------------------------------------------


def make_batches(lengths, advantages, slots, *, prompts=None, width=None):
    """Micro-batches as TRL makes them: token ids count the rows, prompts are padded on the left."""
    rows, width = len(lengths), width or max(lengths)
    prompts = prompts or [2] * rows
    batch = {
        "prompt_ids": torch.zeros(rows, max(prompts), dtype=torch.long),
        "prompt_mask": torch.zeros(rows, max(prompts), dtype=torch.long),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long),
        "completion_mask": torch.zeros(rows, width, dtype=torch.long),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": torch.arange(rows * width, dtype=torch.float64).reshape(rows, width),
    }
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        batch["prompt_mask"][row, max(prompts) - prompt :] = 1
        batch["prompt_ids"][row, max(prompts) - prompt :] = row + 1
        batch["completion_mask"][row, :length] = 1
        batch["completion_ids"][row, :length] = row + 1
    size = rows // slots
    total = torch.tensor(sum(lengths))
    return [
        {name: value[k * size : (k + 1) * size] for name, value in batch.items()} | {"num_items_in_batch": total}
        for k in range(slots)
    ]


def weights_by_row(batches, normaliser):
    """What TRL multiplies the sum over a row's tokens by, up to a constant, from the definition of each loss."""
    found = {}
    for batch in batches:
        if not batch:
            continue
        divided_by = {
            "rows": len(batch["advantages"]),
            "tokens": max(int(batch["completion_mask"].sum()), 1),
            "generation": 1,
        }[normaliser]
        for ids, advantage in zip(batch["prompt_ids"], batch["advantages"].tolist(), strict=True):
            found[int(ids.max())] = advantage / divided_by
    return {row: weight for row, weight in found.items() if weight}


@st.composite
def generations(draw):
    """Micro-batches of several processes, and how they are put together."""
    group = draw(st.integers(1, 4))
    slots = group * draw(st.integers(1, 3))
    rows = slots * draw(st.integers(1, 4))
    processes = draw(st.integers(1, 3))
    numbers = st.lists(st.integers(1, 6), min_size=rows, max_size=rows)
    signs = st.lists(st.sampled_from([0.0, 0.0, 0.5, -2.0]), min_size=rows, max_size=rows)
    batches = [
        make_batches(draw(numbers), draw(signs), slots, prompts=draw(numbers), width=8) for _ in range(processes)
    ]
    return batches, Skipping(
        draw(st.sampled_from(["rows", "tokens", "generation"])),
        group,
        multiple=draw(st.integers(1, 4)),
        in_step=draw(st.booleans()),
    )


@given(generations())
def test_every_row_keeps_its_weight_and_processes_stay_in_step(drawn):
    processes, skipping = drawn
    asked = []
    for batches in processes:
        skipping.regroup(batches, lambda numbers: asked.append(numbers) or numbers)
    most = np.max(asked, axis=0).tolist()
    shapes = []
    for batches in processes:
        found, skipped = skipping.regroup(batches, lambda _: most)
        assert len(found) == len(batches)
        before, after = (weights_by_row(some, skipping.normaliser) for some in (batches, found))
        assert before.keys() == after.keys()
        for row, weight in before.items():
            assert after[row] == pytest.approx(weight, rel=1e-12)
        trained = sum(len(batch["advantages"]) for batch in found if batch)
        assert skipped == pytest.approx(1 - trained / sum(len(batch["advantages"]) for batch in batches))
        shapes.append([len(batch["advantages"]) if batch else 0 for batch in found])
        for first in range(0, len(batches), skipping.group):
            members = {
                int(ids.max()) for batch in batches[first : first + skipping.group] for ids in batch["prompt_ids"]
            }
            together = found[first : first + skipping.group]
            assert {int(ids.max()) for batch in together if batch for ids in batch["prompt_ids"]} <= members
            assert together[-1], "gradients are averaged in the last backward pass of an update"
            assert not skipping.in_step or all(together)
        for batch in filter(None, found):
            for name, side in (("prompt", 0), ("completion", -1)):
                mask = batch[f"{name}_mask"]
                assert batch[f"{name}_ids"].shape == mask.shape
                padding = int((mask.sum(0) == 0).sum())
                assert padding < skipping.multiple or mask.shape[1] in (6, 8)
                assert padding == 0 or mask[:, side].sum() == 0
            assert batch["old_per_token_logps"].shape == batch["completion_mask"].shape
    assert all(shape == shapes[0] for shape in shapes)


def test_rows_of_like_length_go_together_and_padding_is_cut():
    batches = make_batches([5, 1, 5, 1, 4, 2], [1.0, -1.0, 1.0, -1.0, 0.0, 0.0], 3, prompts=[3, 1, 3, 1, 4, 4])
    found, skipped = Skipping("rows", 3).regroup(batches, list)
    assert skipped == pytest.approx(1 / 3)
    assert found[0] == {}
    assert [batch["completion_ids"].tolist() for batch in found[1:]] == [[[2], [4]], [[1] * 5, [3] * 5]]
    assert [batch["prompt_ids"].tolist() for batch in found[1:]] == [[[2], [4]], [[1] * 3, [3] * 3]]
    assert found[1]["old_per_token_logps"].tolist() == [[5.0], [15.0]]


def test_a_row_without_a_token_in_the_loss_has_no_gradient():
    (batch,) = make_batches([3, 3, 3], [1.0, 1.0, -1.0], 1)
    batch["tool_mask"] = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert has_gradient(batch).tolist() == [True, False, True]


def test_an_update_without_any_gradient_trains_on_its_shortest_row():
    found, skipped = Skipping("rows", 2).regroup(make_batches([5, 2, 4, 3], [0.0] * 4, 2), list)
    assert found[0] == {}
    assert found[1]["completion_ids"].tolist() == [[2, 2]]
    assert skipped == 0.75


# -- where it is exact ------------------------------------------------------------------------------------------------

INEXACT = [
    ("beta", {"beta": 0.1}),
    ("entropy", {"entropy_coef": 0.01}),
    ("entropy", {"use_adaptive_entropy": True}),
    ("quantile", {"top_entropy_quantile": 0.2}),
]


@pytest.mark.parametrize(("case", "settings"), INEXACT)
def test_all_rows_are_trained_on_where_others_have_a_gradient_and_the_log_says_why(case, settings, tmp_path, caplog):
    tiny.model().save_pretrained(tmp_path / "model")  # TRL loads the reference from it
    extra = {"model": str(tmp_path / "model")}
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, max_steps=2, extra=extra, **settings)
        trainer.train()
    assert trainer.skipping is None
    said = [record.getMessage() for record in caplog.records if "advantage 0 are trained on" in record.getMessage()]
    assert len(said) == 1
    assert case in said[0]
    assert not any("knapsack/rows_skipped" in row for row in trainer.state.log_history)


def test_a_batch_with_other_tensors_keeps_all_rows(tmp_path, caplog):
    class Imaged(KnapsackGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"pixel_values": torch.zeros(len(inputs), 3)} if self._training else output

        def compute_loss(self, model, inputs, *args, **kwargs):
            assert len(inputs.pop("pixel_values")) == 16
            return super().compute_loss(model, inputs, *args, **kwargs)

    with caplog.at_level(logging.WARNING):
        tiny.trainer(Imaged, tmp_path, max_steps=2).train()
    assert sum("pixel_values" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("allocation", "given", "skips"), [
    ("knapsack", None, True),
    ("knapsack", False, False),
    ("uniform", None, False),
    ("uniform", True, True),
])  # fmt: skip
def test_uniform_allocation_skips_on_request_only(allocation, given, skips, tmp_path):
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, allocation=allocation, skip_zero_advantages=given)
    assert (trainer.skipping is not None) == skips


def test_padding_is_cut_where_positions_are_relative(tmp_path):
    def sides(config, **settings):
        model = tiny.model()
        trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, extra={"model": model}, **settings)
        model.config.rope_parameters = config
        return Skipping.of(trainer).cut

    assert sides({"rope_type": "default", "rope_theta": 1e4}) == ("left", "right")
    assert sides({"rope_type": "dynamic", "factor": 2.0}) == ()
    assert sides(None) == ("right",)  # learned positions count from the left edge
    assert sides({"rope_type": "default"}, loss_type="luspo") == ("left",)


def test_the_seconds_of_a_step_are_logged_by_part(tmp_path):
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, max_steps=4, num_iterations=2, log_metrics="core")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "step_time" in row]
    for row, generated in zip(rows, (True, False, True, False), strict=True):
        parts = [row.get(f"knapsack/{part}_seconds", 0.0) for part in ("generation", "scoring", "update")]
        assert ("knapsack/generation_seconds" in row) == ("knapsack/scoring_seconds" in row) == generated
        assert 0 < parts[-1] <= sum(parts) <= row["step_time"] + 1e-3
