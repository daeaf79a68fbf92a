"""The user's own model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ormo_rpc.models.base import ModelSection
from ormo_rpc.options import instantiate as target
from ormo_rpc.options import option


@dataclass(frozen=True, kw_only=True)
class CustomSection(ModelSection):
    """The module that ``_target_(**kwargs)`` returns; ``input_shape`` and ``num_classes`` are passed if it takes them.

    Its forward pass must not write to its trainable parameters, as ``nn.Embedding`` with ``max_norm`` does: they are views of
    what the server has handed out, which others read, and may be the server's own memory. In a simulation that would corrupt
    the server; over shared memory the system kills the worker; elsewhere the gradient is taken at other parameters than those
    of its stamp.
    """

    name: str = option("custom", "your own")
    _target_: str = option(
        "",
        "dotted path of a torch module's class, or of a function that returns a module",
        valid=target.is_dotted_path,
        expected=target.DOTTED_PATH,
    )
    kwargs: dict[str, Any] = option({}, "keywords of that class or function")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Call the target.

        Raises:
            ValueError: when it cannot be called so, or returns no module; what it raises itself passes.
        """
        offered = {"input_shape": input_shape, "num_classes": num_classes}
        model = target.call(self.PATH, self._target_, self.kwargs, offered)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model._target_: {self._target_} returned {type(model).__name__}, expected a torch.nn.Module")
        return model
