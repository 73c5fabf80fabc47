"""Measure the effect of the order of requests under verl's dispatch: makespan over its lower bound. Needs verl.

Dispatch is verl's code: the batch is cut into pieces for the agent-loop workers, each worker starts its prompts in the
order of its rows, and verl's load balancer routes each request to the replica with the fewest requests in flight. The
engine is simulated in virtual time: a replica runs `slots` requests at once (vLLM's `max_num_seqs`), one token of each
per tick, and takes waiting requests in the order of arrival or priority. Its speed does not depend on the load.

Lengths are drawn as in `bench_balance.py` and capped at 4,096 tokens; predictions use one earlier visit to most
prompts. Group sizes are ragged, mean 8.
"""

import argparse
import asyncio
import heapq
import random
import selectors
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import transfer_queue
from numpy.typing import NDArray
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, agent_loop_tq
from verl.utils import tensordict_utils
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from bench_balance import BETWEEN_SIGMA, MEDIAN_TOKENS, NEW_SHARE, WITHIN_SIGMA, ragged_counts
from knapsack_rl.estimation.lengths import predict_work
from knapsack_rl.verl.manager import COUNT_FIELD, longest_first

CAP = 4096.0
SENDING = 0.1
"""Ticks that a worker needs to send a request; the workers send at the same time."""
PROMPTS, REPLICAS, WORKERS = 256, 32, 8
WAYS = ("as drawn (stock verl)", "longest predicted first", "longest predicted first + priority")


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now = 0.0
        clock = self

        class Jump(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                clock.now += timeout or 0.0
                return super().select(0)

        super().__init__(Jump())

    def time(self) -> float:
        """Return virtual seconds since the start."""
        return self.now


class Replica:
    """An engine that runs a number of requests at once and takes waiting ones by priority, then arrival."""

    def __init__(self, slots: int) -> None:
        self.free, self.arrived = slots, 0
        self.waiting: list[tuple[int, int, asyncio.Event]] = []

    async def generate(self, tokens: float, priority: int) -> None:
        """Wait for a slot, then for the tokens."""
        if not self.free:
            turn = asyncio.Event()
            self.arrived += 1
            heapq.heappush(self.waiting, (priority, self.arrived, turn))
            await turn.wait()
        else:
            self.free -= 1
        await asyncio.sleep(tokens)
        if self.waiting:
            heapq.heappop(self.waiting)[2].set()
        else:
            self.free += 1


class Worker:
    """verl's agent-loop worker without its Ray actor; its agent loop asks the balancer and a replica."""

    def __init__(self, balancer: GlobalRequestLoadBalancer, lengths: list[NDArray[np.float64]]) -> None:
        self.inner = object.__new__(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
        rollout = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "calculate_log_probs": False, "n": 8}
        rollout["agent"] = {"default_agent_loop": "single_turn_agent"}
        self.inner.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
        self.inner.background_tasks = set()
        self.inner._run_agent_loop = self.roll
        self.balancer, self.lengths, self.pieces, self.sent = balancer, lengths, [], 0
        self.generate_sequences = SimpleNamespace(remote=self.pieces.append)

    async def roll(self, *_: Any, session_id: int, index: int, uid: str, priority: int = 0, **__: Any) -> None:
        """Generate one rollout, routed by verl's balancer as verl's client does."""
        self.sent += 1
        await asyncio.sleep(self.sent * SENDING)
        name, replica = self.balancer.acquire_server(f"{uid}_{session_id}")
        await replica.generate(float(self.lengths[index][session_id]), priority)
        self.balancer.release_server(name)

    async def everything(self) -> None:
        """Send all requests of this worker and wait for them."""
        for piece in self.pieces:
            await self.inner.generate_sequences(piece)
        await asyncio.gather(*self.inner.background_tasks)


def makespan(
    way: str, counts: NDArray[np.int64], lengths: list[NDArray[np.float64]], predicted: Any, slots: int
) -> float:
    """Return the virtual time until the last rollout is finished."""
    prompts = tensordict_utils.get_tensordict(
        {"index": np.arange(PROMPTS).astype(object), "uid": np.array([f"u{k}" for k in range(PROMPTS)], dtype=object)},
        {"global_steps": 1},
    )
    tensordict_utils.assign_non_tensor_stack(prompts, COUNT_FIELD, counts.tolist())
    if way.endswith("priority"):
        rank = np.empty(PROMPTS, np.int64)
        rank[np.argsort(-predicted, kind="stable")] = np.arange(PROMPTS)
        tensordict_utils.assign_non_tensor_stack(prompts, "priority", rank.tolist())
    if way != WAYS[0]:
        order = longest_first(predicted, WORKERS)
        prompts = tensordict_utils.index_select_tensor_dict(prompts, order.tolist())
    balancer = GlobalRequestLoadBalancer({f"replica {k}": Replica(slots) for k in range(REPLICAS)})
    manager = object.__new__(AgentLoopManagerTQ)
    manager.agent_loop_workers = [Worker(balancer, lengths) for _ in range(WORKERS)]
    manager.generate_sequences(prompts)
    loop = VirtualTime()
    try:

        async def everything() -> None:
            await asyncio.gather(*(worker.everything() for worker in manager.agent_loop_workers))

        loop.run_until_complete(everything())
        return loop.now
    finally:
        loop.close()


def one_step(seed: int, slots: int) -> dict[str, float]:
    """Return the makespan over its lower bound of each way, for one simulated step."""
    rng = np.random.default_rng(seed)
    random.seed(seed)  # verl breaks ties between replicas by it
    typical = MEDIAN_TOKENS * rng.lognormal(0.0, BETWEEN_SIGMA, PROMPTS)

    def drawn(counts: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        return [
            np.minimum(mean * rng.lognormal(0.0, WITHIN_SIGMA, n), CAP) for mean, n in zip(typical, counts, strict=True)
        ]

    seen = drawn(ragged_counts(rng, PROMPTS) * (rng.random(PROMPTS) >= NEW_SHARE))
    predicted = predict_work(
        [len(group) for group in seen], [group.sum() for group in seen], [(group**2).sum() for group in seen]
    )
    counts = ragged_counts(rng, PROMPTS)
    lengths = drawn(counts)
    everything = np.concatenate(lengths)
    bound = max(everything.max(), everything.sum() / (REPLICAS * slots))
    return {way: makespan(way, counts, lengths, predicted, slots) / bound for way in WAYS}


def run(seeds: Iterable[int], slots: int) -> dict[str, NDArray[np.float64]]:
    """Return the makespan over its lower bound by way, a figure for each seed."""
    agent_loop_tq.ray.get = lambda references: references
    transfer_queue.async_kv_put = _nothing
    steps = [one_step(seed, slots) for seed in seeds]
    return {way: np.array([step[way] for step in steps]) for way in WAYS}


async def _nothing(**_: Any) -> None:
    """Ignore the status of prompts, which is not used here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="simulated steps, seeds 0 to SEEDS - 1 (10)")
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[4, 16, 32, 256], help="requests a replica runs at once"
    )
    arguments = parser.parse_args(argv)
    print(
        f"makespan / lower bound, mean (min to max) of {arguments.seeds} seeds: {PROMPTS} prompts x 8 rollouts on "
        f"average, {REPLICAS} replicas, {WORKERS} agent-loop workers"
    )
    for slots in arguments.slots:
        print(f"{slots} requests at once on a replica")
        for way, ratios in run(range(arguments.seeds), slots).items():
            print(f"  {way:<38}{ratios.mean():>7.3f} ({ratios.min():.3f} to {ratios.max():.3f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
