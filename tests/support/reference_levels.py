"""Reference implementations of algorithms with regions. The legend is that of `tests.support.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.reference import Reference, Values
from tests.support.reference_batching import ended, scale_of_moves
from tests.support.schedule import Step


def delayed(pushes: Sequence[Tensor], N: int, beta: float, *, closed: bool = False) -> tuple[Tensor | float, Tensor | float]:
    """Return how far delayed Nesterov with a rate of N goes with these pushes, and its momentum; `closed` with a last round.

    ``sum d + N beta (m_1 + ... + m_r)``, and ``m_r = sum of beta^(r-j) mean_j`` over the rounds j.
    """
    rounds = [list(pushes[first : first + N]) for first in range(0, len(pushes), N)]
    if rounds and len(rounds[-1]) < N and not closed:
        rounds.pop()
    means = [sum(members) / N for members in rounds]
    momenta = [sum(beta ** (r - j) * means[j] for j in range(r + 1)) for r in range(len(rounds))]
    return sum(pushes) + N * beta * sum(momenta), momenta[-1] if momenta else 0.0


def open_round(pushes: Sequence[Tensor], N: int, done: bool) -> Sequence[Tensor]:
    """Return the pushes of a round that is not over."""
    return [] if done else pushes[len(pushes) - len(pushes) % N :]


class HALoS(Reference):
    """Every region's moves and the global ones as sums over all pushes; a merge is a mean of two."""

    def state(self, history: Sequence[Step]) -> Values:
        get = self.options.get
        R, J, a = get("regions", 2), get("exchange", 12), get("merge_weight", 0.25)
        l, N, beta = get("region_lr", 0.2), get("region_period", 4), get("region_momentum", 0.9)  # noqa: E741 - its name
        L, N_g, beta_g = get("global_lr", 0.15), get("global_period", 2), get("global_momentum", 0.5)
        zero = torch.zeros_like(self.start)
        pushed: dict[int, list[Tensor]] = {r: [] for r in range(R)}
        merged = dict.fromkeys(range(R), self.start)
        sent_at = dict.fromkeys(range(R), zero)
        unsent = dict.fromkeys(range(R), 0)
        sent: list[Tensor] = []

        def moved(r: int, *, closed: bool = False) -> Tensor:
            return zero + l * delayed(pushed[r], N, beta, closed=closed)[0]

        def exchange(r: int, *, closed: bool = False) -> None:
            sent.append(moved(r, closed=closed) - sent_at[r])
            w = self.start - L * delayed(sent, N_g, beta_g)[0]
            merged[r] = (1 - a) * (merged[r] - sent[-1]) + a * w
            sent_at[r], unsent[r] = moved(r, closed=closed), 0

        for gradient in self.gradients(history):
            r = gradient.worker % R
            pushed[r].append(gradient.value_D)
            unsent[r] += 1
            if unsent[r] == J:
                exchange(r)
        done = ended(history)
        areas = range(R)
        if get("region_workers"):  # what regions send is all that there is
            sent, areas = [gradient.value_D for gradient in self.gradients(history)], range(0)
        for r in areas if done else ():
            if unsent[r] or len(pushed[r]) % N:
                exchange(r, closed=True)
        moved_w, m_w = delayed(sent, N_g, beta_g, closed=done)
        open_w = open_round(sent, N_g, done)
        found: Values = {"w": self.start - L * moved_w, "m": zero + m_w, "collected": sum(open_w, zero), "count": len(open_w)}
        for r in areas:
            open_r = open_round(pushed[r], N, done)
            found |= {
                f"region_th/{r}": merged[r] - (moved(r, closed=done) - sent_at[r]),
                f"region_merged/{r}": merged[r],
                f"region_m/{r}": zero + delayed(pushed[r], N, beta, closed=done)[1],
                f"region_collected/{r}": sum(open_r, zero),
                f"region_unsent/{r}": unsent[r],
            }
        return found

    def scale(self, history: Sequence[Step]) -> float:
        return 10 * scale_of_moves(self.start, history)


class HierMo(Reference):
    """The plain loop over calls, with the list of ends of each edge's round; who holds a ticket is read from the replies."""

    def state(self, history: Sequence[Step]) -> Values:
        get = self.options.get
        R, pi, gamma_a = get("regions", 2), get("edge_rounds", 2), get("edge_momentum", 0.05)
        w, zero = self.start, torch.zeros_like(self.start)
        x, y, mean = (dict.fromkeys(range(R), self.start) for _ in range(3))
        moves: dict[int, list[Tensor]] = {e: [] for e in range(R)}
        rounds: dict[int, list[int]] = {e: [] for e in range(R)}
        busy, waiting, known = set[int](), set[int](), set[int]()

        def end_round(e: int) -> None:
            if moves[e]:
                by_x, by_y = (torch.stack([move.chunk(2)[part] for move in moves[e]]).mean(0) for part in (0, 1))
                former, mean[e] = mean[e], x[e] - by_x
                x[e], y[e] = (1 + gamma_a) * mean[e] - gamma_a * former, y[e] - by_y
                rounds[e].append(len(moves[e]))
                moves[e] = []

        def cloud() -> Tensor:
            pushes = {e: sum(rounds[e]) for e in range(R)}
            total = sum(pushes.values())
            if not total:
                return w
            x_c, y_c = (sum((pushes[e] / total * of[e] for e in range(R)), zero) for of in (x, y))
            for e in range(R):
                x[e], y[e], rounds[e] = x_c, y_c, []
                mean[e] = mean[e] if pushes[e] else x_c
            waiting.clear()
            return x_c

        for position, step in enumerate(history):
            if step.push is not None:
                moves[step.worker % R].append(step.push.grad)
                waiting.add(step.worker)
            if step.kind == "leave":
                known.discard(step.worker)
                waiting.discard(step.worker)
            if step.kind == "join" and len(rounds[step.worker % R]) == pi:
                known.add(step.worker)
                waiting.add(step.worker)
            busy.discard(step.worker)
            for e in range(R):
                if len(rounds[e]) < pi and all(worker % R != e for worker in busy):
                    end_round(e)
                    if len(rounds[e]) < pi:
                        waiting -= {worker for worker in waiting if worker % R == e}
            if step.push is not None and all(len(rounds[worker % R]) == pi for worker in known):
                w = cloud()
            if ended(history[: position + 1]) or (known and known == waiting):
                for e in range(R):
                    end_round(e)
                w = cloud()
            busy |= {reply.worker for reply in step.replies if reply.ticket is not None}
            known |= busy
        sums = {e: torch.stack(moves[e]).sum(0) if moves[e] else torch.cat([zero, zero]) for e in range(R)}
        found: Values = {"w": w}
        for e in range(R):
            moved_x, moved_y = sums[e].chunk(2)
            found |= {f"x/{e}": x[e], f"y/{e}": y[e], f"mean/{e}": mean[e], f"rounds/{e}": len(rounds[e])}
            found |= {f"moved_x/{e}": moved_x, f"moved_y/{e}": moved_y, f"arrived/{e}": len(moves[e])}
        return found

    def scale(self, history: Sequence[Step]) -> float:
        return 10 * scale_of_moves(self.start, history) / (1 - self.options.get("edge_momentum", 0.05))
