"""A rollout engine of Hugging Face's generate loop, behind verl's interface of an asynchronous server.

Sampling is seeded by the weights' version, the prompt and how often it was asked, so that two runs of the same
configuration generate the same groups, in whatever order requests arrive.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


class HFServer:
    """Holds a copy of the model and generates one request after the other."""

    def __init__(self, model_path: str, response_length: int) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()
        self.response_length, self.version = response_length, -1
        self.asked: Counter[str] = Counter()

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        prompt = [int(token) for token in prompt_ids]
        greedy = sampling_params.get("temperature", 1.0) == 0
        key = f"{self.version} {greedy} {prompt}"
        digest = hashlib.sha256(f"{key} {self.asked[key]}".encode()).digest()
        self.asked[key] += 1
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        tokens, log_probs = [], []
        with torch.no_grad():
            for _ in range(self.response_length):
                logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1].double()
                distribution = torch.log_softmax(logits, -1)
                token = (
                    int(logits.argmax())
                    if greedy
                    else int(torch.multinomial(distribution.exp(), 1, generator=generator))
                )
                tokens.append(token)
                log_probs.append(float(distribution[token]))
                if token == self.model.config.eos_token_id:
                    break
        return TokenOutput(
            token_ids=tokens, log_probs=log_probs, stop_reason="completed", extra_fields={"global_steps": self.version}
        )

    async def load(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        found = self.model.load_state_dict(weights, strict=False)
        missing = set(found.missing_keys) - {"lm_head.weight"}
        if missing or found.unexpected_keys:
            raise ValueError(f"weights do not fit: missing {missing}, unexpected {found.unexpected_keys}")
        self.version = -1 if version is None else version
        self.asked.clear()

    async def nothing(self, *_: Any, **__: Any) -> None:
        """Memory is not shared with training, so there is nothing to free or wait for."""

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = nothing
    release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


class HFReplica(RolloutReplica):
    """One server for each replica."""

    async def launch_servers(self) -> None:
        path = self.model_config.path
        server = (
            ray.remote(HFServer)
            .options(name=f"hf_server_{self.replica_rank}", num_cpus=0, max_concurrency=256)
            .remote(str(path), self.config.response_length)
        )
        self.servers = [server]
        self._server_handle, self._server_address = server, f"hf-{self.replica_rank}"


class ServerAdapter(BaseRollout):
    """Lives in a training worker and sends its weights to the server of its replica."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank, size = torch.distributed.get_rank(), self.config.tensor_model_parallel_size
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.leads = rank % size == 0

    async def resume(self, tags: list[str]) -> None:
        """Nothing was freed."""

    async def release(self) -> None:
        """Nothing to free."""

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        # Every rank draws the weights: gathering them is a collective.
        full = {name: tensor.detach().cpu().float().clone() for name, tensor in weights}
        if self.leads:
            await ray.get_actor(f"hf_server_{self.replica_rank}").load.remote(full, global_steps)
