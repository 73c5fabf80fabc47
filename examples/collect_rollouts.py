"""Collect rollouts from an OpenAI-compatible endpoint, as many per prompt as the knapsack allocates.

    python examples/collect_rollouts.py prompts.jsonl rollouts.jsonl --url http://localhost:8000/v1 --model MODEL \\
        --budget 512 --rounds 3

prompts.jsonl has the columns prompt, answer (a number) and prompt_id.

Works with any server that offers /chat/completions (vLLM, SGLang, llama.cpp, a hosted service). The number of rollouts
of a prompt is the request's n; with --single-requests, for servers that ignore n, it is the number of requests. The
rollouts, one JSON line each with prompt_id, completion, reward and step, can go to a trainer or to
`knapsack-rl replay`; the allocator's state is saved beside them and used again in the next run. Answers are compared as
numbers; the extra `math` is needed where they are not plain ones. If the endpoint needs a key, it is read from the
environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from knapsack_rl import KnapsackAllocator
from knapsack_rl.tasks import number_reward


def complete(url: str, model: str, prompt: str, count: int, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Completions of a prompt with their share of the tokens, in requests of at most ``--largest-n``.

    Raises:
        OSError: the endpoint refused or could not be reached; the message contains its answer.
    """
    found: list[tuple[str, int]] = []
    while len(found) < count:
        n = 1 if options.single_requests else min(count - len(found), options.largest_n)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "n": n,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=options.timeout) as answer:
                reply = json.load(answer)
        except urllib.error.HTTPError as error:
            raise OSError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
        except urllib.error.URLError as error:
            raise OSError(f"{url} could not be reached: {error.reason}; is the server up?") from error
        choices = reply["choices"]
        if len(choices) != n:
            raise OSError(f"{url} was asked for n={n} completions and gave {len(choices)}; try --single-requests")
        tokens = reply.get("usage", {}).get("completion_tokens", 0) // n
        found += [(choice["message"]["content"] or "", tokens) for choice in choices]
    return found


def collect(options: argparse.Namespace) -> KnapsackAllocator:
    """Collect ``--rounds`` rounds over all prompts; return the allocator."""
    prompts: dict[str, dict[str, Any]] = {}
    for line in options.prompts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompts[row["prompt_id"]] = row
    ids = list(prompts)
    state = options.rollouts.with_suffix(".npz")
    allocator = KnapsackAllocator.load(state) if state.exists() else KnapsackAllocator()
    with options.rollouts.open("a", encoding="utf-8") as file, ThreadPoolExecutor(options.workers) as workers:
        for number in range(1, options.rounds + 1):
            allocation = allocator.allocate(ids, options.budget)
            asked = [
                workers.submit(complete, options.url, options.model, prompts[key]["prompt"], int(count), options)
                for key, count in zip(ids, allocation.counts, strict=True)
            ]
            rows = []
            for key, future in zip(ids, asked, strict=True):
                answers = future.result()
                rewards = number_reward([text for text, _ in answers], [prompts[key]["answer"]] * len(answers))
                rows += [
                    {"step": number, "prompt_id": key, "completion": text, "reward": reward, "tokens": tokens}
                    for (text, tokens), reward in zip(answers, rewards, strict=True)
                ]
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            allocator.observe([row["prompt_id"] for row in rows], [row["reward"] for row in rows])
            allocator.save(state)
            metrics = allocator.metrics()
            print(
                f"round {number}: {len(rows)} rollouts of {len(ids)} prompts, "
                f"{allocation.counts.min()} to {allocation.counts.max()} each; "
                f"effective gradient ratio {metrics['effective_gradient_ratio']:.2f} "
                f"(prompts {metrics['effective_prompt_ratio']:.2f})",
                flush=True,
            )
    return allocator


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("prompts", type=Path, help="JSONL with prompt, answer (a number) and prompt_id")
    found.add_argument("rollouts", type=Path, help="JSONL file to append to")
    found.add_argument("--url", default="http://localhost:8000/v1")
    found.add_argument("--model", required=True)
    found.add_argument("--budget", type=int, required=True, help="rollouts of a round, over all prompts")
    found.add_argument("--rounds", type=int, default=1)
    found.add_argument("--workers", type=int, default=8, help="requests at a time")
    found.add_argument("--largest-n", type=int, default=32, help="most completions in a request")
    found.add_argument("--single-requests", action="store_true", help="one completion per request")
    found.add_argument("--temperature", type=float, default=1.0)
    found.add_argument("--max-tokens", type=int, default=512)
    found.add_argument("--timeout", type=float, default=600.0, help="seconds per request")
    return found


if __name__ == "__main__":
    collect(parser().parse_args())
