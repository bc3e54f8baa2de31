"""A Prometheus collector of an Endpoint's counters: extra `[prometheus]`.

Here: what the endpoint counts, as metrics, read anew at each scrape. Not here: counting (native), a server, a
registry, a thread: those are the user's, see docs/how-to/watch-in-production.md.

Invariant: no state of its own, and no label with a peer in it: backends, operations and errors are few and known,
peers are not. A scrape never raises because the endpoint has ended: it has nothing to tell then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from kvtransport.endpoint import Endpoint
from kvtransport.errors import ConnectionClosed, ForkedProcessError

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as e:
    raise ImportError(
        "kvtransport.integrations.prometheus needs prometheus-client: pip install 'kvtransport[prometheus]'"
    ) from e

_OK: Final = "ok"
_REFUSED: Final = ": refused: "

_Operations = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
_Cell = tuple[str, str, str, Mapping[str, Any]]


class KVTransportCollector(Collector):
    """The metrics of one Endpoint, for a registry of yours: `registry.register(KVTransportCollector(endpoint))`.

    kvtransport_transfer_duration_seconds{backend,op,outcome}: a histogram, from the post to the end; op is "send",
    "recv", "message"; outcome is "ok" or the name of the error's class.
    kvtransport_transfer_bytes_total{backend,op}: bytes moved; of transfers that failed, what had arrived.
    kvtransport_transfer_errors_total{code}: transfers that failed, by the name of the error's class.
    kvtransport_path_info{backend,refused}: 1 for each backend that some open connection uses ("false") or that was
    refused for one ("true").
    kvtransport_grants_expired_total: grants whose time was over before they were read.

    A second endpoint of a process needs a registry of its own.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now; no samples once the endpoint is closed, or in a forked child."""
        try:
            cells = list(_cells(self._endpoint.engine.operations()))
            paths = _paths(self._endpoint)
            expired = _expired_grants(self._endpoint)
        except (ConnectionClosed, ForkedProcessError):
            return self.describe()
        return iter((_durations(cells), _nbytes(cells), _errors(cells), _path_info(paths), _expired(expired)))

    def describe(self) -> Iterator[Metric]:
        """Return the metrics without samples: their names, for the registry."""
        return iter((_durations(()), _nbytes(()), _errors(()), _path_info(()), _expired(None)))


# --- what the endpoint tells -------------------------------------------------------------------------------------


def _cells(operations: _Operations) -> Iterator[_Cell]:
    """Flatten what `Endpoint.stats()["operations"]` has."""
    for backend, ops in operations.items():
        for op, outcomes in ops.items():
            for outcome, cell in outcomes.items():
                yield backend, op, outcome, cell


def _paths(endpoint: Endpoint) -> set[tuple[str, bool]]:
    """Return (backend, whether it was refused) of the ways of all open connections."""
    connections = endpoint.connections()
    told = {line for connection in connections for line in endpoint.paths(connection) if _REFUSED in line}
    refused = {(name, True) for line in told for name in line.partition(_REFUSED)[0].split(", ")}
    return refused | {(connection.backend, False) for connection in connections}


def _expired_grants(endpoint: Endpoint) -> int:
    """Return how many grants have expired unread; 0 from an engine without grants.

    From the engine, as the operations: `Endpoint.stats()` would ask each connection for more than is wanted, 0.4 ms
    of the scrape's one with 100 of them.
    """
    counts = getattr(endpoint.engine, "grants", None)
    return 0 if counts is None else int(counts()["expired"])


# --- metrics -----------------------------------------------------------------------------------------------------


def _durations(cells: Iterable[_Cell]) -> Metric:
    metric = HistogramMetricFamily(
        "kvtransport_transfer_duration_seconds",
        "Time from a transfer's post to its end.",
        labels=["backend", "op", "outcome"],
    )
    for backend, op, outcome, cell in cells:
        seconds = cell["seconds"]
        bounds = [*map(str, seconds["bounds"]), "+Inf"]
        buckets = list(zip(bounds, accumulate(seconds["counts"]), strict=True))
        metric.add_metric([backend, op, outcome], buckets, seconds["sum"])
    return metric


def _nbytes(cells: Iterable[_Cell]) -> Metric:
    total: Counter[tuple[str, str]] = Counter()
    for backend, op, _, cell in cells:
        total[backend, op] += cell["nbytes"]
    metric = CounterMetricFamily(
        "kvtransport_transfer_bytes", "Bytes that transfers have moved.", labels=["backend", "op"]
    )
    for labels, nbytes in total.items():
        metric.add_metric(labels, nbytes)
    return metric


def _errors(cells: Iterable[_Cell]) -> Metric:
    total: Counter[str] = Counter()
    for _, _, outcome, cell in cells:
        if outcome != _OK:
            total[outcome] += cell["count"]
    metric = CounterMetricFamily(
        "kvtransport_transfer_errors", "Transfers that failed, by the class of their error.", labels=["code"]
    )
    for code, count in total.items():
        metric.add_metric([code], count)
    return metric


def _path_info(paths: Iterable[tuple[str, bool]]) -> Metric:
    metric = GaugeMetricFamily(
        "kvtransport_path_info",
        "1 for each backend that an open connection uses, or that was refused for one.",
        labels=["backend", "refused"],
    )
    for backend, refused in sorted(paths):
        metric.add_metric([backend, str(refused).lower()], 1)
    return metric


def _expired(count: int | None) -> Metric:
    return CounterMetricFamily(
        "kvtransport_grants_expired", "Grants that expired before they were read.", value=count
    )
