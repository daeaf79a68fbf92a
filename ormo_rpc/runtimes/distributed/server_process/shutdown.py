"""The end of a run: stop the server, write its last state, let the workers leave, write the summary."""

from __future__ import annotations

import time
from typing import Any

from ormo_rpc.messages import Reply
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.watchdog import Watchdog
from ormo_rpc.runtimes.distributed.worker_devices import WorkerDevices
from ormo_rpc.runtimes.session import Session
from ormo_rpc.server.parameter_server import ParameterServer, Status

FLUSH_SECONDS = 0.1
"""The interval at which records are written while workers leave."""


def shut_down(
    session: Session,
    service: Service,
    watchdog: Watchdog,
    devices: WorkerDevices,
    *,
    status: dict[str, str],
    timeout_seconds: float,
) -> dict[str, Any]:
    """End the run, and return the summary.

    Args:
        session: The session of the run.
        service: The service.
        watchdog: Over the workers.
        devices: What workers compute on.
        status: Status and reason of a run that is ended from outside, whose workers are not waited for; empty for a run that
            has ended by itself. Where it has done so before, they do not count.
        timeout_seconds: Time to wait for workers to leave; then they are left to their launcher.

    Raises:
        RuntimeError: a push was applied half-way, so the state is not written.
    """
    state = dict[str, Any]()

    def stop(server: ParameterServer) -> list[Reply]:
        state.update(server.state_dict())  # in one step with the stop: every applied push is in the checkpoint
        return server.stop()

    service.change(stop)
    ended_from_outside = bool(status) and state["status"] == Status.running.value
    check_state(service)
    watchdog.write_processes()  # a short run may be over before the first check of the watchdog
    watchdog.write_evictions(wait=False)
    session.flush()  # begins the last evaluation, beside the checkpoint and the workers' leaving
    session.write_checkpoint(state)
    service.release_shutdown()  # not before: should this process die while it writes, the workers are needed again
    if not status:
        deadline = time.monotonic() + timeout_seconds
        while service.memberships and time.monotonic() < deadline:
            session.flush()
            service.changed.wait(FLUSH_SECONDS)
            service.changed.clear()
    transports = {str(worker): transport for worker, transport in sorted(service.transports.items())}
    connections = {"control": watchdog.control, "transports": transports, "start": watchdog.start}
    records = {**connections, **watchdog.memory, **devices.summary_entries(service.transports), "evictions": service.evictions}
    return session.close(state, wait=not status, **records, **(status if ended_from_outside else {}))


def check_state(service: Service) -> None:
    """Refuse to continue with, or to write, a state to which a push was applied half-way.

    Raises:
        RuntimeError: there is such a push.
    """
    cause = service.failure
    if cause is not None:
        raise RuntimeError(f"a push could not be applied: {type(cause).__name__}: {cause}") from cause
