"""Momentum look-ahead for asynchronous local steps."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._mla import MomentumLookAhead
from ormo_rpc.options import register


@register("mla")
@dataclass(kw_only=True)
class MLA(MomentumLookAhead):
    """MLA: each worker takes H local steps of SGD from where the server's momentum will lead.

    Recursion, for a push ``G``, the start minus the end of H local steps, at once when it comes:
    ``m <- mu m + (1 - mu) G; w <- w - gamma (G + mu m)``, with ``mu`` the momentum and ``gamma = outer_lr``. A worker is sent
    ``w - gamma mu m`` (with ``look_ahead=false``: ``w``). So after T pushes
    ``w = w_0 - gamma sum_s (1 + mu (1 - mu^(T-s))) G_s``, s from 0: a push weighs ``gamma`` at once and ``gamma (1 + mu)`` in
    the end, and ``y = w - gamma mu^2 / (1 - mu) m`` takes ``gamma (1 + mu) G`` with each. With ``mu = 0`` this is asynchronous
    local SGD, ``w <- w - gamma G``. Nothing divides by K: K pushes move ``w`` by their sum.

    The local steps have the learning rate of the ticket's issue. ``eta`` is inside of the momentum, in ``G``;
    `MomentumLookAhead` says what happens where it changes. K is not used, so it may change. Memory: ``w, m``, two vectors of D;
    the worker needs two more, three with ``local_momentum``.

    Source: the momentum look-ahead that arXiv 2606.00271 compares with and builds on; ``gamma = 0.7`` is DiLoCo's
        (arXiv 2311.08105). Departure: local steps are SGD, with a momentum or without, instead of AdamW.
    """
