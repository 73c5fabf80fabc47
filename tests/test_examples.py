"""The examples run: each as a reader would run it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from knapsack_rl import KnapsackAllocator
from knapsack_rl.offline.reward_logs import read_reward_log

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *flags, folder):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps(output):
    return re.findall(r"^step (\d+)  reward ([\d.]+) .*effective gradient ratio ([\d.]+)", output, re.MULTILINE)


@pytest.mark.slow
def test_your_own_loop_learns(tmp_path):
    found = steps(run("own_loop.py", "--steps", 60, folder=tmp_path))
    assert [int(step) for step, _, _ in found] == list(range(1, 61))
    rewards = [float(reward) for _, reward, _ in found]
    ratios = [float(ratio) for _, _, ratio in found]
    # The first steps know nothing of their prompts; later ones spend more where it teaches.
    assert sum(ratios[-20:]) > sum(ratios[:10]) * 2
    assert min(rewards) > 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--stock"]])
def test_the_trl_script_trains_with_and_without_the_knapsack(tmp_path, flags):
    found = steps(run("trl_script.py", "--steps", 2, *flags, folder=tmp_path))
    assert [int(step) for step, _, _ in found] == [1, 2]
    assert all(0 < float(reward) < 1 for _, reward, _ in found)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "allocator.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    pattern = r"^(\w+): +a mixed group for ([\d.]+) of the prompts and ([\d.]+) of the rollouts$"
    shares = {name: (float(one), float(two)) for name, one, two in re.findall(pattern, text, re.MULTILINE)}
    rates = np.random.default_rng(0).beta(0.4, 0.8, size=64)
    by_definition = np.mean(1 - rates**8 - (1 - rates) ** 8)
    assert shares["uniform"] == pytest.approx((by_definition, by_definition), abs=6e-4)
    prompts, rollouts = shares["knapsack"]
    assert prompts > by_definition - 0.03  # what the text says: about as many prompts,
    assert rollouts > by_definition + 0.1  # and far more rollouts


def test_the_notebook_ships_without_outputs_and_its_code_compiles():
    notebook = json.loads((EXAMPLES / "allocator.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 4
    for cell in code:
        assert cell["outputs"] == []
        compile("".join(cell["source"]), cell["id"], "exec")


# -- A fake OpenAI-compatible endpoint ---------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """Answers chat completions: a prompt "p of 4" is solved in p of 4 completions, one after the other."""

    def __init__(self, largest_n=100):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.largest_n, self.lock = [], largest_n, threading.Lock()
        self.served = Counter()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or body["model"] != "served":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b'{"error": "no such model"}')
            return
        prompt = body["messages"][-1]["content"]
        of_four = int(prompt.partition(" ")[0])
        choices = []
        with self.server.lock:
            self.server.asked.append((prompt, body["n"], body["temperature"], self.headers["Authorization"]))
            for _ in range(min(body["n"], self.server.largest_n)):
                right = self.server.served[prompt] % 4 < of_four
                self.server.served[prompt] += 1
                choices.append({"message": {"role": "assistant", "content": f"#### {7 if right else 8}"}})
        answer = json.dumps({"choices": choices, "usage": {"completion_tokens": 3 * len(choices)}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def serve():
    servers = []

    def start(**settings):
        server = Endpoint(**settings)
        threading.Thread(
            target=server.serve_forever, args=(0.01,), daemon=True
        ).start()  # looks often: shutdown waits for it
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def collect(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    spec = importlib.util.spec_from_file_location("collect_rollouts", EXAMPLES / "collect_rollouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{k} of 4, prompt {k}", "answer": "7", "prompt_id": f"p{k}"} for k in range(5)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(server, *flags):
        words = [str(prompts), str(tmp_path / "rollouts.jsonl"), "--url", server.url, "--model", "served"]
        found = module.collect(module.parser().parse_args([*words, "--budget", "40", *flags]))
        lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
        return found, lines

    return call


@pytest.mark.parametrize("flags", [[], ["--largest-n", "3"], ["--single-requests"]])
def test_rollouts_are_collected_as_the_knapsack_gives_them(collect, serve, flags, capsys):
    server = serve()
    allocator, rows = collect(server, "--rounds", "3", *flags)
    reference = KnapsackAllocator()
    ids = [f"p{k}" for k in range(5)]
    served = Counter()
    for step in (1, 2, 3):
        counts = dict(zip(ids, reference.allocate(ids, 40).counts, strict=True))
        mine = [row for row in rows if row["step"] == step]
        assert Counter(row["prompt_id"] for row in mine) == counts
        for key in ids:
            expected = [float((served[key] + k) % 4 < int(key[1])) for k in range(counts[key])]
            assert sorted(row["reward"] for row in mine if row["prompt_id"] == key) == sorted(expected)
            served[key] += int(counts[key])
        reference.observe([row["prompt_id"] for row in mine], [row["reward"] for row in mine])
    assert len(rows) == 120 == sum(n for _, n, _, _ in server.asked)
    largest = {"--largest-n": 3, "--single-requests": 1}.get((flags or [""])[0], 32)
    assert max(n for _, n, _, _ in server.asked) <= largest
    assert {row["tokens"] for row in rows} == {3}
    assert "round 3: 40 rollouts of 5 prompts" in capsys.readouterr().out
    found, expected = (
        {name: number for name, number in one.metrics().items() if name != "allocation_seconds"}
        for one in (allocator, reference)
    )
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_second_collection_knows_what_the_first_one_saw(collect, serve, tmp_path):
    server = serve()
    collect(server)
    _, rows = collect(server)
    later = Counter(row["prompt_id"] for row in rows[40:])
    assert later["p0"] != later["p2"]  # the first round gave all of them 8
    assert Counter(row["prompt_id"] for row in rows[:40]) == dict.fromkeys(later, 8)
    assert read_reward_log(tmp_path / "rollouts.jsonl") is not None


def test_the_key_is_sent(collect, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    server = serve()
    collect(server)
    assert {key for _, _, _, key in server.asked} == {"Bearer abc"}


def test_an_endpoint_that_ignores_n_or_refuses_says_so(collect, serve):
    with pytest.raises(OSError, match="asked for n=8 completions and gave 1; try --single-requests"):
        collect(serve(largest_n=1))
    with pytest.raises(OSError, match=r"answered 404: .*no such model"):
        collect(serve(), "--model", "other")
    server = serve()
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"could not be reached: .*is the server up"):
        collect(server)
