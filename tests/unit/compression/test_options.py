"""Options of compression and of the wire form, and every registered compression."""

from __future__ import annotations

from typing import Any

import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.options import parts
from tests.support.compression import COMPRESSIONS


def test_every_registered_compression_is_tested_here() -> None:
    assert {type(compression) for compression in COMPRESSIONS.values()} == set(parts("compression").values())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"compression": {"name": "gzip"}}, f"compression: got 'gzip', expected one of {', '.join(parts('compression'))}"),
        ({"compression": {"name": "topk", "ratio": 0}}, r"compression\.ratio: got 0\.0, expected a number in \(0, 1\]"),
        ({"compression": {"name": "powersgd", "rank": 0}}, r"compression\.rank: got 0, expected a whole number >= 1"),
        (
            {"compression": {"name": "none", "rank": 2}},
            r"compression\.rank: got an unknown key, expected one of error_feedback \(of none\)",
        ),
        ({"wire": {"dtype": "int8"}}, r"wire\.dtype: got 'int8', expected one of float32, bf16, fp16"),
        ({"wire": {"params": "fp16"}}, r"wire\.params: got 'fp16', expected one of float32, bf16"),
    ],
)
def test_options_of_compression_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A{said}\Z"):
        parse_config(values)


def test_the_summary_of_a_run_names_its_wire_form() -> None:
    def said(**values: Any) -> str:
        return parse_config(values).wire_form

    assert said() == said(transport="rpc") == "exact"
    assert said(wire={"dtype": "bf16", "params": "bf16"}) == "bf16 params=bf16"
    assert said(compression={"name": "topk", "ratio": 0.1, "error_feedback": False}) == "topk error_feedback=False ratio=0.1"
    assert said(compression={"name": "powersgd"}, wire={"dtype": "fp16"}) == "powersgd fp16"
