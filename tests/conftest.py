"""What several folders of tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run as numpy programs. It looks at this when it is imported, which transformers does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so; the processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from tests.caches import Dumped
    from tests.rollouts import Rollouts
    from tests.s3 import Proxy
    from tests.teachers.serving import Serving
    from tests.train_ranks import Nursery


# Half a minute and more: begun last they would be what all other processes wait for.
LONGEST = (
    "real/test_end_to_end.py",
    "engines/test_bucket.py",
    "store/test_bucket_writer.py",
    "real/test_demo.py",
    "teachers/test_server_dump.py",
    "engines/test_local.py",
    "cli/test_commands.py",
    "real/test_gradient.py",
    "test_distill_ranks.py",
    "real/test_audit.py",
    "teachers/test_server_rollouts.py",
    "kernels/test_triton.py",
    "teachers/test_compiled.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the rest as they come."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """What is imported by now lives to the end: full garbage collections, which benchmarks ask for, pass it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    """A tiny teacher and caches of it; read only."""
    from tests.caches import dump_tiny

    return dump_tiny(tmp_path_factory.mktemp("dumped"))


@pytest.fixture(scope="session")
def unsteady_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dropout makes every step depend on the state of the random number generator."""
    from tests.caches import student_yaml

    return student_yaml(tmp_path_factory.mktemp("student") / "student.yaml", attention_dropout=0.2)


@pytest.fixture(scope="session")
def rollout_caches(tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    """Caches of prompts with completions; read only."""
    from tests.rollouts import make_rollouts

    return make_rollouts(tmp_path_factory.mktemp("rollouts"))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts processes that train, in milliseconds."""
    from tests.train_ranks import Nursery

    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread, so that sums are taken in one order whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that `server` runs."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def running(served_model: Path) -> Iterator[Serving]:
    """A language model behind HTTP, in a process of its own."""
    from tests.teachers.serving import serving

    with serving(served_model) as server:
        yield server


@pytest.fixture
def server(running: Serving, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """It, as vLLM behaves by default, and an environment without a key or a proxy before it."""
    monkeypatch.delenv("LOGITCACHE_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running.set(reset=True)
    return running


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a real S3 server, moto's, in a process of its own."""
    from tests.s3 import s3_server

    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The server behind a proxy that can fail, with all that is needed to reach it in the environment."""
    from tests.s3 import proxied

    with proxied(s3_port) as proxy:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        environment = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "an-access-key-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret-access-key",
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
            "NO_PROXY": "127.0.0.1",
            "LOGITCACHE_LOCAL_DIR": str(tmp_path / "local"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield proxy
