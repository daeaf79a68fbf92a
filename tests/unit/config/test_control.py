"""The carrier of the control plane that a configuration leads to, and those that cannot be had."""

from __future__ import annotations

import pytest

from ormo_rpc.composing import compose
from ormo_rpc.control import torch_rpc
from ormo_rpc.errors import ConfigError

LACKING = "torch was built without torch.distributed.rpc"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "control", "without_rpc"),
    [
        ([], "rpc", "socket"),
        (["transport=gloo"], "rpc", "socket"),
        (["transport=tcp"], "socket", "socket"),
        (["transport=tcp", "runtime.control=rpc"], "rpc", None),
        (["runtime.control=socket"], "socket", "socket"),
        (["transport=rpc"], "rpc", None),
    ],
)
def test_control_is_by_rpc_unless_the_transport_avoids_it_or_torch_has_none(
    overrides: list[str], control: str, without_rpc: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(overrides)
    assert (config.control, config.lacks_rpc) == (control, False)
    config.refuse_unavailable()
    monkeypatch.setattr(torch_rpc, "unavailable", lambda: LACKING)
    if without_rpc is None:
        with pytest.raises(
            ConfigError, match=rf"\A(runtime\.control: got rpc, expected|transport: got rpc, which) .*: {LACKING}\Z"
        ):
            config.refuse_unavailable()
    else:
        config.refuse_unavailable()
        assert config.control == without_rpc
        assert config.lacks_rpc == (control == "rpc"), "it is said where torch is the reason"


def test_a_transport_that_needs_agents_is_refused_without_them() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["transport=rpc", "runtime.control=socket"])
    assert str(caught.value) == (
        "runtime.control: got socket, expected rpc, or another transport: transport=rpc needs the agents that rpc starts"
    )


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "server.device: got cpu, expected cuda or cuda:N with transport={}, or take transport=auto"),
        (["server.device=cuda", "worker.device=cpu"], "worker.device: got cpu, expected cuda or cuda:N with transport={}, "),
        (
            ["server.device=cuda", "compression=topk"],
            "compression: got topk, which is unpacked on the CPU, expected none with ",
        ),
    ],
    ids=["server", "worker", "compression"],
)
def test_a_transport_between_gpus_is_refused_where_a_side_or_the_unpacking_is_on_the_cpu(
    transport: str, overrides: list[str], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"transport={transport}", *overrides]).refuse_unavailable()
    assert str(caught.value).startswith(text.format(transport))
