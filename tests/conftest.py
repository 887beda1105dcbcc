"""Shared fixtures: a small text, a small configuration, a small exported model."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from moeyard.kernels.cpu import library
from moeyard.kernels.cpu.build import VARIANTS
from moeyard.serving.experts.reading.native import library as native_reads

library.load()  # built once, and before tests look at what programs print
native_reads.load()

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE / folder) for folder in ("moe", "serving", "training"))]
sys.path.append(str(HERE.parent / "benchmarks"))

TEXT = "".join(
    f"def function_{n}(a, b={n % 7}):\n    return [a * {n}, b ** {n % 5}, '{'xyz' * (n % 4)}']\n"
    for n in range(600)
)

CONFIG = {
    "seed": 3,
    "model": {
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 256,
        "moe": {
            "num_experts": 4,
            "d_expert": 16,
            "router": {"kind": "topk", "k": 2, "balance_loss": 0.01, "z_loss": 0.001},
        },
    },
    "data": {"tokenizer": "bytes"},
    "train": {
        "steps": 6,
        "sequence_length": 32,
        "batch_sequences": 8,
        "log_every": 1,
        "eval_sequences": 12,
    },
    "optimizer": {"lr": 0.003, "warmup_steps": 2},
    "checkpoint": {"every": 3, "keep": 2},
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def config_file(tmp_path_factory, text_file) -> Path:
    """A configuration whose run_dir must be overridden."""
    folder = tmp_path_factory.mktemp("config")
    values = {**CONFIG, "run_dir": str(folder / "unset")}
    values["data"] = {**CONFIG["data"], "source": str(text_file)}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A small model with a byte tokenizer."""
    from small_model import write_random_model

    path = tmp_path_factory.mktemp("model") / "small"
    write_random_model(path)
    return path


@pytest.fixture(params=list(VARIANTS))
def instruction_set(request):
    """Run a test on the C++ kernels of each instruction set that this processor has."""
    functions = library.load().functions
    assert functions is not None, "a test without kernels must be skipped before this"
    chosen = functions.moeyard_choose(request.param.encode()).decode()
    if chosen == request.param:
        yield
    functions.moeyard_choose(None)
    if chosen != request.param:
        pytest.skip(f"this processor has no {request.param}")


@pytest.fixture(params=["python", "native"])
def reading_path(request, monkeypatch):
    """Run a test with experts that Python reads, and with experts that C++ reads."""
    import reading_paths

    if request.param == "native" and native_reads.load() is None:
        pytest.skip("no C++ compiler")
    yield from reading_paths.use(request.param, monkeypatch)


@pytest.fixture
def reads_by_preadv(monkeypatch):
    """Let all reads go through ``os.preadv``, which a test may replace."""
    import reading_paths

    path = "python" if native_reads.load() is None else "native"
    yield from reading_paths.use(path, monkeypatch)


@pytest.fixture
def reads_by_parts(monkeypatch):
    """Let all experts be read by ``ModelFolder.expert_reads``, which a test may replace."""
    from moeyard.serving.experts.tiers.disk import DiskTier

    monkeypatch.setattr(DiskTier, "straight", lambda *_: None)


@pytest.fixture
def make_queue(reading_path):
    """Return what makes a queue of reads on each path."""
    from moeyard.serving.experts.opening import queue_of

    return queue_of(native_reads.load())


@pytest.fixture
def no_gradients():
    """Run a test as inference does."""
    with torch.no_grad():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread, but two for kernels, which share the work out, and for servers, as they do.

    Set before the fixtures of modules, so that they compute as their tests do. With two threads,
    small tensors cost several times as much on a busy machine: every operation waits for a thread
    that may have no core.
    """
    folder = item.path.relative_to(HERE).parts[0]
    torch.set_num_threads(2 if folder in ("kernels", "serving") else 1)
