"""``/metrics`` for Prometheus and ``/healthz``, read from the coordinator's state at each scrape.

The page has no login: it listens on the loopback interface unless the operator says otherwise, and shows no names of
files, tokens or data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weft.common.errors import PortTaken
from weft.common.protocol import Status, WorkerState

StartResponse = Callable[..., Any]


class StatusCollector(Collector):
    """The coordinator's status as metrics."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Metrics of this moment."""
        status = self._status()
        yield from _module_metrics(status)
        yield from _run_metrics(status)
        yield from _worker_metrics(status)

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the names come with the values."""
        return ()


def _module_metrics(status: Status) -> Iterator[Metric]:
    labels = ["run", "module"]
    version = GaugeMetricFamily("weft_module_version", "Newest published version.", labels=labels)
    state = GaugeMetricFamily(
        "weft_round_state", "1 for the state that the round is in.", labels=[*labels, "state"]
    )
    updates = GaugeMetricFamily("weft_round_updates", "Updates accepted in the round.", labels=labels)
    heldout = GaugeMetricFamily("weft_module_heldout_loss", "Held-out loss, nats.", labels=labels)
    for run in status.runs:
        for module in run.modules:
            key = [run.run_id, module.module]
            version.add_metric(key, module.version)
            state.add_metric([*key, module.round.state.name.lower()], 1)
            updates.add_metric(key, module.round.num_updates)
            if module.heldout_losses:
                heldout.add_metric(key, module.heldout_losses[-1].loss)
    yield from (version, state, updates, heldout)


def _run_metrics(status: Status) -> Iterator[Metric]:
    up = CounterMetricFamily("weft_update_bytes", "Bytes of accepted updates.", labels=["run"])
    down = CounterMetricFamily("weft_sent_bytes", "Bytes of bases and versions sent.", labels=["run"])
    finished = GaugeMetricFamily(
        "weft_run_finished", "1 when the run has had all its rounds.", labels=["run"]
    )
    for run in status.runs:
        up.add_metric([run.run_id], run.bytes_up)
        down.add_metric([run.run_id], run.bytes_down)
        finished.add_metric([run.run_id], run.finished)
    yield from (up, down, finished)


def _worker_metrics(status: Status) -> Iterator[Metric]:
    count = GaugeMetricFamily("weft_workers", "Workers by state.", labels=["state"])
    for state in WorkerState:
        count.add_metric([state.name.lower()], sum(worker.state is state for worker in status.workers))
    speed = GaugeMetricFamily("weft_worker_tokens_per_second", "Measured speed.", labels=["worker"])
    for worker in status.workers:
        if worker.tokens_per_s:
            speed.add_metric([worker.worker_id], worker.tokens_per_s)
    yield from (count, speed)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


class MetricsServer:
    """Serves both pages in a thread of its own until closed."""

    def __init__(self, host: str, port: int, status: Callable[[], Status]) -> None:
        registry = CollectorRegistry()
        registry.register(StatusCollector(status))
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/metrics":
                return metrics(environ, start_response)  # type: ignore[no-any-return]
            known = environ["PATH_INFO"] == "/healthz"
            start_response(
                "200 OK" if known else "404 Not Found", [("Content-Type", "text/plain; charset=utf-8")]
            )
            return [b"ok\n" if known else b"/metrics or /healthz\n"]

        try:
            self._server: WSGIServer = make_server(host, port, app, handler_class=_QuietHandler)
        except OSError as error:
            hint = "choose another with --http HOST:PORT, or --http off"
            raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
