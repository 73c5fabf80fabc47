"""Knapsack RL in your own training loop: plain PyTorch, no trainer.

    python examples/own_loop.py --steps 20

Trains the small model that ships with the package on generated additions. Knapsack RL is four calls here: plan, expand,
observe and group_advantages; the rest is any policy-gradient loop.
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knapsack_rl import AllocationSettings, Session, group_advantages
from knapsack_rl.tasks import MAX_COMPLETION_TOKENS, accuracy_reward, base_model_path, make_splits


def main() -> None:
    """Train and print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16, help="prompts in a step")
    parser.add_argument("--rollouts", type=int, default=8, help="mean rollouts per prompt")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(base_model_path(), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base_model_path())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    problems = make_splits(train=256, held_out=1).train
    session = Session(AllocationSettings(value="likelihood-0.5", max_rollouts=64))

    for step in range(1, options.steps + 1):
        batch = random.sample(problems, options.prompts)
        ids = [problem.prompt_id for problem in batch]

        # 1. How many rollouts each prompt gets; the sum is always the budget.
        plan = session.plan(ids, options.rollouts)
        group = plan.expand()  # position in the batch of each rollout's prompt

        # 2. Generate and score.
        rows = [batch[k] for k in group]
        tokens = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True, return_token_type_ids=False)
        model.eval()
        with torch.no_grad():
            output = model.generate(
                **tokens,
                max_new_tokens=MAX_COMPLETION_TOKENS,
                do_sample=True,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )
        completion = output[:, tokens["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(completion, skip_special_tokens=True)
        rewards = accuracy_reward(texts, [row.answer for row in rows])

        # 3. Learn from the outcomes, and compare them with what was expected of each prompt before.
        learned = session.observe(plan, group, rewards, step=step, expected=True)
        found = group_advantages(group, rewards, advantage="posterior-mean", baseline=learned.baseline)
        advantages = torch.as_tensor(found, dtype=torch.float32)

        # 4. One policy-gradient update over all tokens, those after the end of an answer left out.
        model.train()
        ended = (completion == tokenizer.eos_token_id).cumsum(1)
        counted = (ended - (completion == tokenizer.eos_token_id).long()) == 0
        mask = torch.cat([tokens["attention_mask"], torch.ones_like(completion)], dim=1)
        logits = model(input_ids=output, attention_mask=mask).logits[:, :-1]
        log_probabilities = torch.log_softmax(logits.float(), -1).gather(-1, output[:, 1:, None])[..., 0]
        log_probabilities = log_probabilities[:, -completion.shape[1] :]
        loss = -(advantages[:, None] * log_probabilities * counted).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        metrics = learned.metrics
        print(
            f"step {step}  reward {sum(rewards) / len(rewards):.3f}  loss {loss.item():+.4f}  effective gradient ratio "
            f"{metrics['effective_gradient_ratio']:.2f} (prompts {metrics['effective_prompt_ratio']:.2f})  largest "
            f"budget {metrics['budget_max']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
