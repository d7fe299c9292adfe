"""Several processes that hold one base together find what one process finds, or say why not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import forked_python, rank_program
from tests.support.adapters import save_adapter
from tests.support.gguf_files import gguf_llama, write_gguf
from tests.support.tiny_models import draw_weights, save_tiny, tiny_model
from w2s_fast import Engine, Guide, RemoteBase
from w2s_fast.errors import InvalidRequest, UnsupportedModel

SIZE = 2
SECONDS = 60
Found: TypeAlias = list[dict[str, Any] | None]
RunRanks: TypeAlias = Callable[[str], Found]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "mixtral"):
        save_tiny(root / family, family, seed=3)
    save_biased(root / "llama", root / "biased")
    save_tiny(root / "tuned", "gpt2", seed=1)
    save_tiny(root / "untuned", "gpt2", seed=2)
    shutil.copytree(root / "untuned", root / "broken")
    (root / "broken" / "model.safetensors").write_bytes(b"no weights")
    return root


@pytest.fixture(scope="module")
def adapter(models: Path) -> Path:
    """Of the base, beside it."""
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    base.config._name_or_path = str(models / "llama")
    return save_adapter(base, models / "adapter")


def save_biased(llama: Path, folder: Path) -> None:
    """A Llama with biases, which are added once, on whichever ranks the products are made."""
    shutil.copytree(llama, folder)
    config = AutoConfig.from_pretrained(llama, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    draw_weights(model, seed=4, peak=2.0)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def run_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRanks]:
    """Runs a function of rank_program on all ranks: what each has found; None: it died."""
    server, python = forked_python.start(tmp_path_factory.mktemp("python"))

    def run(name: str) -> Found:
        folder = tmp_path_factory.mktemp(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(python), "-m", "tests.support.rank_program", name, str(models), str(folder)]
        started = [
            subprocess.Popen(command, cwd=forked_python.ROOT, env=environment(rank, port))
            for rank in range(SIZE)
        ]
        try:
            for process in started:
                process.wait(SECONDS)
        finally:
            for process in started:
                process.terminate()
        files = [folder / f"{rank}.json" for rank in range(SIZE)]
        return [json.loads(f.read_text()) if f.exists() else None for f in files]

    yield run
    server.kill()
    server.wait()


def environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun makes it."""
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": SIZE,
        "LOCAL_WORLD_SIZE": SIZE,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def assert_same(found: Any, wanted: Any) -> None:
    """Tokens are equal, and numbers but for their rounding."""
    if isinstance(wanted, list):
        assert isinstance(found, list) and len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert_same(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    else:
        assert found == wanted


def test_ranks_find_what_one_process_finds_in_every_family(
    run_ranks: RunRanks, models: Path
) -> None:
    first, second = run_ranks("families")
    assert first is not None and first == second  # to the last bit of every score
    for family, alone in rank_program.families(models).items():
        found = first[family]
        assert_same(found["searches"], alone["searches"])
        assert_same(found["log_probs"], alone["log_probs"])
        # Pages hold the keys and values of a rank's own heads; guides are whole.
        assert found["heads"] * SIZE == alone["heads"]
        assert found["heads_of_guide"] == alone["heads_of_guide"]


def test_ranks_do_all_that_one_process_does(run_ranks: RunRanks, models: Path) -> None:
    first, second = run_ranks("methods")
    assert first is not None and first == second
    alone = rank_program.methods(models)
    assert set(first) == set(alone)
    for what, found in first.items():
        assert_same(found, alone[what])
    assert first["again"] == first["first"] and first["hits"] > 0 and first["set aside"] > 0


def test_ranks_have_as_many_pages_as_the_one_with_least_memory(run_ranks: RunRanks) -> None:
    first, second = run_ranks("measured")
    assert first is not None and second is not None
    assert second["tokens"] < first["tokens"]
    assert first["room"] == second["room"] == -(-second["tokens"] // 16) * 16


def test_where_a_rank_dies_the_others_requests_end(run_ranks: RunRanks) -> None:
    first, second = run_ranks("killed")
    assert second is None and first is not None
    assert first["errors"] == ["RankFailure"] * 6
    assert "start all ranks anew" in first["next"]


def test_a_rank_that_fails_and_lives_on_keeps_nobody_waiting(run_ranks: RunRanks) -> None:
    first, second = run_ranks("interrupted")
    assert first is not None and second is not None
    assert first["first"].startswith("RankFailure: rank 0 of 2: the group of ranks is broken")
    assert second["first"].startswith("EngineFailure: MemoryError")
    for found in (first, second):
        assert found["then"].startswith("RankFailure")
    assert "MemoryError" in second["then"]


def test_ranks_that_are_asked_for_different_things_say_so(run_ranks: RunRanks) -> None:
    for found in run_ranks("apart"):
        assert found is not None
        assert "the same calls" in found["first"] and "the same calls" in found["then"]
        assert found["score"].startswith("RankFailure")
        assert found["async"].startswith(("RankFailure", "InvalidRequest: rank 1 leads"))


class TestLeading:
    """Rank 0 alone is asked, and the others do what it does."""

    def test_it_finds_what_one_process_finds(self, run_ranks: RunRanks, models: Path) -> None:
        first, second = run_ranks("led")
        assert first is not None and second is not None
        alone = rank_program.led(models)
        assert_same(first["answers"], json.loads(json.dumps(alone["answers"])))
        assert first["answers"][6].startswith("InvalidRequest")
        assert_same(first["after"], alone["after"])
        assert "leads already" in first["again"] and "where a rank leads" in first["weights"]
        assert first["left"].startswith("Aborted: the ranks are led no longer")
        # All of them hold the same, and one is asked.
        assert second["called"] == 0
        for what in ("pools", "counts", "after"):
            assert first[what] == second[what]
        assert first["counts"][2] == 2  # given up: what was closed, and what was left over

    def test_many_ask_behind_asyncio(self, run_ranks: RunRanks, models: Path) -> None:
        first, second = run_ranks("served")
        assert first is not None and second is not None
        assert "rank 1 leads; allowed: rank 0, and Engine.follow" in second["why"]
        assert_same(first["found"], rank_program.served(models)["found"])

    def test_where_a_rank_dies_all_requests_end(self, run_ranks: RunRanks) -> None:
        first, second = run_ranks("led_to_death")
        assert second is None and first is not None
        assert set(first["errors"]) == {"RankFailure"} and first["next"] == "RankFailure"
        assert not first["alive"]

    def test_it_may_have_nothing_to_do_for_long(self, run_ranks: RunRanks) -> None:
        first, second = run_ranks("idle")
        assert first is not None and first["found"] and second == {}

    def test_adapters_of_the_base_are_refused_on_all(
        self, run_ranks: RunRanks, adapter: Path
    ) -> None:
        for found in run_ranks("adapted"):
            assert found is not None and "an adapter of the base" in found["why"]
            assert found["why"].startswith("InvalidRequest")

    def test_others_that_do_not_follow_are_noticed(self, run_ranks: RunRanks) -> None:
        for found in run_ranks("not_followed"):
            assert found is not None and "the same calls" in found["why"]

    def test_a_rank_that_cannot_load_keeps_nobody_waiting(self, run_ranks: RunRanks) -> None:
        first, second = run_ranks("unread")
        assert first is not None and second is not None
        assert second["why"].startswith("UnsupportedModel")
        assert first["why"].startswith("RankFailure")


class TestRefusals:
    """What cannot be divided is refused before anybody waits for other ranks."""

    @pytest.fixture(autouse=True)
    def as_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in environment(0, 1).items():
            monkeypatch.setenv(name, value)

    def refused(self, base: Any, size: int = SIZE, **options: Any) -> str:
        with pytest.raises((InvalidRequest, UnsupportedModel)) as caught:
            Engine(base, device="cpu", tensor_parallel=size, **options)
        return str(caught.value)

    def test_models(self, models: Path) -> None:
        why = self.refused(models / "gpt2")
        assert "(gpt2) cannot be divided among 2 ranks" in why and "no tensor-parallel plan" in why
        assert "moe" in self.refused(models / "mixtral")
        assert "keys' heads" in self.refused(models / "phi3")
        assert "no such folder" in self.refused("./nowhere")

    def test_heads(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        why = self.refused(models / "llama", 4)
        assert "num_key_value_heads is 2; allowed: a multiple of 4" in why

    def test_what_is_not_a_path(self, models: Path) -> None:
        assert "allowed: its path or hub id" in self.refused(tiny_model("llama"))
        assert "remote" in self.refused(RemoteBase("http://127.0.0.1:1/v1", "m"))

    def test_quantised(self, models: Path, tmp_path: Path) -> None:
        config = json.loads((models / "llama" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "quantised" in self.refused(tmp_path)

    def test_compile(self, models: Path) -> None:
        assert "compile" in self.refused(models / "llama", compile=True)

    def test_gguf(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "base.gguf", gguf_llama())
        assert "GGUF" in self.refused(path)

    def test_adapters_as_the_base(self, adapter: Path) -> None:
        assert "allowed: a whole model" in self.refused(adapter)

    def test_numbers(self, models: Path) -> None:
        assert "tensor_parallel is 0" in self.refused(models / "llama", 0)
        assert "there are 2 ranks" in self.refused(models / "llama", 3)

    def test_an_environment_without_ranks(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RANK")
        why = self.refused(models / "llama", guides=Guide(models / "tuned", models / "untuned"))
        assert "RANK of the environment is not set" in why and "torchrun --nproc-per-node 2" in why
