"""How many processes run the tests, and the models that many of them open."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.hub.config import PullConfig
from danlu.hub.pull import pull

MOST_WORKERS = 4
"""Each may take three gigabytes, with the servers that it starts."""

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores have tests of their own

# A shell has what it starts in the background ignore Ctrl-C, and all that a test starts would, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core; none where files are asked for by name: they are done before others would have begun."""
    if not all(Path(argument).is_dir() for argument in config.args):
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pulled(name: str) -> Path:
    """The folder that `danlu pull NAME` gives.

    Without a package index the tests that need it are skipped, but in CI they fail: a check that is never made proves
    nothing.
    """
    try:
        return pull(PullConfig(source=name))
    except DanluError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{name} cannot be fetched ({error})")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Q4_1 GGUF file."""
    return next(pulled("smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a folder in the layout of sentence-transformers."""
    return pulled("minilm")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are random, so greedy answers are babble, and never end by themselves: stop tokens have logit 0."""
    import torch  # here, so that tests of other things start fast

    from danlu.models.load import save_model
    from danlu.tokenizer.train import train_on
    from random_lm import random_lm

    texts = [f"def f{i}(x):\n    return x + {i}  # 丹炉 refines text\n" for i in range(200)]
    tokenizer = train_on(texts, 320, 2)
    model = random_lm(320, context=4096, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=32)
    with torch.no_grad():
        model.embed.weight[list(tokenizer.stop_ids)] = 0
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder, tokenizer)
    return folder
