"""A stand-in of vLLM's server: the one endpoint that TRL's rollout loop calls, and what a run with it needs."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import tiny

RATES = (0.0, 0.5, 1.0)
"""Success rate of prompt k: entry k modulo 3."""

SUCCESS, FAILURE = "5", "4"


def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    made.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "=",
        "fields": {"content": {"close": "<eos>"}},
    }
    return made


def dataset(prompts: int) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{k}"}], "prompt_id": f"p{k}", "rate": RATES[k % 3]}
            for k in range(prompts)
        ]
    )


def is_right(completions: list[Any], rate: list[float], **_: Any) -> list[float]:
    """Success if the answer has the digit; the columns must be as long as the group."""
    assert len(rate) == len(completions)
    assert len(set(rate)) == 1
    return [float(SUCCESS in completion[0]["content"]) for completion in completions]


def is_short(completions: list[Any], **_: Any) -> list[float]:
    return [-0.01 * len(completion[0]["content"]) for completion in completions]


class Served:
    """Requests per prompt, and the answers: successes with the prompt's rate, failures longer than successes."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._words = tokenizer()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert request["n"] == 1
        prompt = int(self._words.decode(request["prompt"]).rstrip("="))
        with self._lock:
            visit = self.requests[prompt]
            self.requests[prompt] += 1
        dice = np.random.default_rng((prompt, visit))
        right = dice.random() < RATES[prompt % 3]
        time.sleep(float(dice.random()) * 0.01)
        ids = self._words.encode((SUCCESS if right else FAILURE * 3) + "<eos>", add_special_tokens=False)
        return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}]}


@contextmanager
def rollout_server() -> Iterator[tuple[str, Served]]:
    """Serve ``/v1/completions`` on a free port of this machine; yields the address and what was served."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # the name that http.server calls
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = self.path == "/v1/completions"
            reply = json.dumps(served.answer(body) if found else {}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
