"""A parameter server and two workers in one process, without a network: ``python examples/in_process.py``.

The loss is half the squared distance to a point. Worker 1 is three times slower than worker 0, so its gradients are late; the
server (OrMo) applies each of them at once, with the momentum that it would have had in time.
"""

import torch

from ormo_rpc import Push, Reply, build_server

TARGET = torch.tensor([3.0, -1.0])
SECONDS = {0: 1, 1: 3}  # that a worker takes for a gradient


def main() -> None:
    """Train for 60 gradients and print what happened."""
    server = build_server(
        algorithm="ormo", scheduler="async", params=torch.zeros(2), num_workers=2, lr=0.05, momentum=0.5, total_tickets=60
    )
    due: list[tuple[int, Reply]] = [(SECONDS[reply.worker], reply) for reply in server.start()]  # when each worker is done
    pushed = {0: 0, 1: 0}
    while due:
        now, reply = min(due, key=lambda entry: entry[0])
        due.remove((now, reply))
        assert reply.ticket is not None
        delay = server.iteration - reply.stamp  # gradients that were applied since this worker got its parameters
        gradient = reply.params - TARGET
        replies = server.receive(Push(worker=reply.worker, ticket=reply.ticket, stamp=reply.stamp, grad=gradient))
        due += [(now + SECONDS[each.worker], each) for each in replies if each.ticket is not None]  # no ticket: no more work
        pushed[reply.worker] += 1
        if server.iteration % 10 == 0:
            distance = (server.params - TARGET).norm().item()
            print(f"second {now:2}  iteration {server.iteration:2}  delay {delay}  distance to the target {distance:.4f}")
    print(f"{server.status.value}: worker 0 computed {pushed[0]} gradients, worker 1 {pushed[1]}")


if __name__ == "__main__":
    main()
