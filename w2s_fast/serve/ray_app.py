"""The server as an application on Ray Serve: replicas of an engine behind thin processes in front.

``serve deploy`` and ``serve run`` find :func:`build` as ``w2s_fast.serve.ray_app:build``.
"""

from __future__ import annotations

import asyncio
import logging
import logging.config
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import PlacementGroup
from starlette.types import ASGIApp

from w2s_fast import Engine
from w2s_fast.serve.app import build_app
from w2s_fast.serve.carried import Asked, Head, answered
from w2s_fast.serve.middleware import Guard
from w2s_fast.serve.ray_config import RayConfig
from w2s_fast.serve.ray_front import Forwarder, OneId
from w2s_fast.serve.run import log_config
from w2s_fast.serve.service import Service
from w2s_fast.serve.settings import ServerSettings

log = logging.getLogger("w2s_fast.serve")

_ROUTER = "w2s_fast.serve.ray_router.PrefixRouter"
_FAILED = 70  # exit code of a process that cannot go on
_MOST_IN_FRONT = 10_000  # requests that a process in front holds; replicas' limits count


class Replica:
    """One engine, and the application of ``w2s-fast serve`` around it."""

    async def __init__(self, config: RayConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        logging.config.dictConfig(log_config())
        placement = ray.util.get_current_placement_group()  # of threads nobody knows it
        engine = await asyncio.to_thread(self._load, config, placement)
        self._app = build_app(engine, config.settings, config.defaults)
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def answer(self, asked: Asked) -> AsyncIterator[Head | bytes]:
        """The application's answer to one request of HTTP: its head, and its body in pieces."""
        async for piece in answered(self._app, asked):
            if isinstance(piece, Head) and piece.status >= 500 and self._has_failed:
                # Ended, it is as any that dies: who asked asks another one, nobody else comes here,
                # and Serve puts a new one in its place.
                self._end("its engine has failed")
            yield piece

    async def metrics(self) -> tuple[str, str]:
        """Which replica this is, and what it tells Prometheus."""
        return serve.get_replica_context().replica_tag, self._service.metrics.render().decode()

    def check_health(self) -> None:
        """Serve puts another replica in the place of one whose engine has failed."""
        if not self._service.alive:
            raise RuntimeError("the engine has failed")

    def _load(self, config: RayConfig, placement: PlacementGroup | None) -> Engine:
        if config.tensor_parallel == 1:
            return config.load()
        from w2s_fast.ray import RankGroup

        assert placement is not None  # it was made with this replica: see `build`
        resources = placement.bundle_specs[-1]
        self._group = RankGroup(config.load, config.tensor_parallel, resources, placement=placement)
        # Rank 0 would notice by itself only when it is asked next; and in the middle of a pass, on
        # GPUs, after minutes.
        self._group.watch(self._end)
        return self._group.engine

    @property
    def _has_failed(self) -> bool:
        return not self._service.alive and not self._service.gate.draining

    def _end(self, why: str) -> None:
        log.error("the replica ends", extra={"why": why})
        os._exit(_FAILED)

    @property
    def _service(self) -> Service:
        found: Service = self._app.state.service
        return found

    async def __del__(self) -> None:
        """Called by Serve when the replica holds no request any more, or its time is over."""
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)
            if hasattr(self, "_group"):
                await asyncio.to_thread(self._group.close)


class Front:
    """Takes requests in, as HTTP has them, and has replicas answer."""

    def __init__(self, replicas: DeploymentHandle, settings: ServerSettings) -> None:
        logging.config.dictConfig(log_config())
        self._replicas = replicas
        self._settings = settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        seconds = self._settings.limits.seconds
        return OneId(Guard(Forwarder(self._replicas, seconds), self._settings))


def build(config: RayConfig | Mapping[str, Any]) -> Application:
    """The application, for ``serve.run``; ``serve deploy`` calls it with ``args`` of its file.

    Args:
        config: or a mapping of its fields.

    Raises:
        ValueError: pydantic's, or InvalidRequest: says which field is wrong, and what is allowed.
    """
    if not isinstance(config, RayConfig):
        config = RayConfig.model_validate(dict(config))
    settings = config.settings
    autoscaling = None
    if config.max_replicas is not None:
        autoscaling = {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests or config.places,
        }
    placement: dict[str, Any] = {}
    if config.tensor_parallel > 1:
        rank = {name: n for name, n in (("CPU", config.num_cpus), ("GPU", config.gpus)) if n}
        placement["placement_group_bundles"] = [rank] * config.tensor_parallel
        placement["placement_group_strategy"] = config.placement_strategy
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=None if autoscaling else config.num_replicas,
        autoscaling_config=autoscaling,
        max_ongoing_requests=config.most_ongoing,
        max_queued_requests=config.max_queue,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,
            request_router_kwargs={"most_ahead": max(1, config.places // 2)},
        ),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.gpus},
        **placement,
        graceful_shutdown_timeout_s=config.drain,
        graceful_shutdown_wait_loop_s=0.2,
        max_surge_percent=config.max_surge_percent,
        health_check_period_s=config.health_check_seconds,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        num_replicas=config.front_replicas,
        max_ongoing_requests=_MOST_IN_FRONT,
        ray_actor_options={"num_cpus": config.front_cpus},
        graceful_shutdown_timeout_s=config.drain + 1,
        graceful_shutdown_wait_loop_s=0.2,
        max_surge_percent=100,
        health_check_period_s=config.health_check_seconds,
    )
    return front.bind(replicas.bind(config), settings)
