"""docs/cluster.md on a cluster of two nodes: its commands, while clients ask all the time."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml

from tests.ray.conftest import OBJECT_STORE, ROOT
from w2s_fast.serve.ray_config import RayConfig

PAGE = (ROOT / "docs" / "cluster.md").read_text()
FILE = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())
SMALL = {"num_cpus": 0.1, "num_gpus": 0}


def commands() -> list[str]:
    """Lines of the page's blocks that a shell reads."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    read = [block for language, block in blocks if not language]
    return [line.split("  #")[0].strip() for block in read for line in block.splitlines()]


def scripts() -> Path:
    """Where ``ray`` and ``serve`` lie: beside Python, or beside a Ray that lies elsewhere."""
    import ray

    beside = Path(sys.executable).parent
    return beside if (beside / "serve").exists() else Path(ray.__file__).parents[1] / "bin"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def until(what: Callable[[], bool], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.3)


def test_the_file_is_an_application_s() -> None:
    (application,) = FILE["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == ("w2s_fast.serve.ray_app", "build")
    config = RayConfig.model_validate(application["args"])
    assert config.settings.name == "base"
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(FILE)
    # Numbers that follow from others are those that the code would choose.
    replica = application["deployments"][0]
    assert replica["max_ongoing_requests"] == config.most_ongoing
    assert replica["autoscaling_config"]["target_ongoing_requests"] == config.places


def test_every_command_is_tried_or_known() -> None:
    """What is tried below, and by tests of `generate`; `ray start` is what Cluster does."""
    known = ("pip install", "ray start --", "serve deploy deploy/ray-serve.yaml", "serve status")
    known += (
        "serve shutdown",
        "curl localhost:8000/ready",
        "export RAY_ADDRESS",
        "w2s-fast generate --ray",
    )
    assert len(commands()) >= 10
    for command in commands():
        assert command.startswith(known), command
    told = subprocess.run(
        [sys.executable, str(scripts() / "ray"), "start", "--help"], capture_output=True, text=True
    ).stdout
    for command in commands():
        if command.startswith("ray start"):
            assert all(word in told for word in command.split() if word.startswith("--"))


class Clients:
    """Ask one after the other, until they are told to stop; each answer has to be one."""

    def __init__(self, url: str) -> None:
        self.names: set[str] = set()
        self.answered = 0
        self.errors: list[Exception] = []
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(3)]

    def _ask(self, number: int) -> None:
        client = openai.OpenAI(base_url=self._url, api_key="-", max_retries=0, timeout=240)
        while not self._over.is_set():
            try:
                if number:
                    found = client.completions.create(model="w2s", prompt="The film", seed=1)
                    self.names.add(found.choices[0].text)
                else:
                    asked = client.completions.create(
                        model="w2s", prompt="The film", seed=1, stream=True
                    )
                    self.names.add("".join(piece.choices[0].text for piece in asked))
                self.answered += 1
            except Exception as error:
                self.errors.append(error)
            time.sleep(0.1)

    @contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()


@pytest.mark.cluster
def test_a_cluster_is_deployed_scaled_and_upgraded_and_no_request_is_lost(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    dashboard = free_port()
    node = {"num_cpus": 2, "object_store_memory": OBJECT_STORE}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "include_dashboard": True, "dashboard_port": dashboard},
    )
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    environment["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{dashboard}"

    def command(*words: str) -> str:
        found = subprocess.run(
            [sys.executable, str(scripts() / words[0]), *words[1:]],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    def status() -> Any:
        told = yaml.safe_load(command("serve", "status"))
        return told["applications"].get("w2s-fast", {})

    def running() -> int:
        states = status()["deployments"]["Replica"]["replica_states"]
        return int(states.get("RUNNING", 0))

    port = free_port()
    file = {**FILE, "proxy_location": "HeadOnly"}  # two nodes here have one host
    file["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = file["applications"]
    search = {"beam_width": 2, "successors": 2, "max_new_tokens": 8}
    small = {"device": "cpu", "kv_cache_tokens": 8192, "max_rows": 64, "search": search}
    replica, front = application["deployments"]
    application["args"] = {**small, "name": "w2s", "health_check_seconds": 1.0, "drain": 60}
    replica["ray_actor_options"], front["ray_actor_options"] = SMALL, {"num_cpus": 0.1}
    replica["autoscaling_config"] |= {"max_replicas": 1}
    written = tmp_path / "deploy" / "ray-serve.yaml"
    written.parent.mkdir()

    def deploy() -> None:
        written.write_text(yaml.safe_dump(file))
        command("serve", "deploy", "deploy/ray-serve.yaml")

    try:
        cluster.add_node(**node)
        assert "2 node" in command("ray", "status") or "node_" in command("ray", "status")
        deploy()
        until(lambda: status().get("status") == "RUNNING")
        url = f"http://127.0.0.1:{port}"
        assert httpx2.get(f"{url}/ready", timeout=60).status_code == 200
        clients = Clients(f"{url}/v1")
        with clients.asking():
            until(lambda: clients.answered > 5)
            # Scale: engines that run go on.
            replica["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
            deploy()
            until(lambda: running() == 2)
            assert len(clients.names) == 1
            # Upgrade: another answer to the same question.
            application["args"]["search"] = {**search, "temperature": 0.0}
            deploy()
            until(lambda: len(clients.names) == 2)
            until(lambda: status()["status"] == "RUNNING" and running() == 2)
            answered = clients.answered
            until(lambda: clients.answered > answered + 5)
        assert not clients.errors, clients.errors[0]
        command("serve", "shutdown", "-y")
        until(lambda: not status())
    finally:
        cluster.shutdown()
