"""Language modelling: the next token at each place of a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from typing_extensions import override

from ormo_rpc.data import DataSet
from ormo_rpc.data.collate import target_key
from ormo_rpc.options import at_least_one, option, positive, register
from ormo_rpc.tasks import cross_entropy
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.batches import call_model, inputs_of, logits_of, targets_of
from ormo_rpc.tasks.metrics import LOSS, Sums, TaskMetric

TOKENS, MASK = "input_ids", "attention_mask"


@register("language_modelling")
@dataclass(frozen=True, kw_only=True)
class LanguageModelling(Task):
    """Cross entropy of the next token, a mean over the tokens that count; logits (B, T, V), or an output that has ``logits``.

    A batch is one of

    * token numbers (B, T): each token is predicted from those before it; -100 is padding, for which the model gets 0;
    * a pair (inputs, targets): target (b, t) is what the logits (b, t) predict, so it is shifted already;
    * a mapping, as transformers take it: ``labels`` lie where their tokens are and are shifted here; without labels they are
      ``input_ids``, where ``attention_mask`` is not 0.
    """

    ignore_index: int = option(
        cross_entropy.IGNORED,
        "token number, as a target, that does not count, such as that of the padding",
        valid=cross_entropy.is_class_number,
        expected=cross_entropy.CLASS_NUMBER,
    )
    shift: bool | None = option(
        None, "targets lie where their tokens are, and are those of the places before; default: unless the batch is a pair"
    )
    vocabulary: int | None = option(
        None,
        "tokens that there are, where the model is to be told as num_classes",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    bytes_per_token: float | None = option(
        None, "bytes of text in a token, for the metric bits_per_byte", valid=positive, expected="a finite number > 0"
    )

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        perplexity = TaskMetric("perplexity", "exp(loss)", higher_is_better=False, form=".2f", bar="perplexity")
        if self.bytes_per_token is None:
            return LOSS, perplexity
        return LOSS, perplexity, TaskMetric("bits_per_byte", "loss in bits, for each byte of text", higher_is_better=False)

    @override
    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        return call_model(model, _with(batch, 0) if isinstance(batch, torch.Tensor) else inputs_of(batch))

    @override
    def targets(self, batch: Any) -> torch.Tensor:
        targets = self._labels(batch)
        return targets[:, 1:] if self._shifts(batch) else targets

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return cross_entropy.mean_loss(*self._flat(output, batch), self.ignore_index)

    @override
    def count(self, batch: Any) -> int:
        return cross_entropy.count(self.targets(batch), self.ignore_index)

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        return {"loss": cross_entropy.loss_sum(*self._flat(output, batch), self.ignore_index)}

    @override
    def scored(self, output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._flat(output, batch)

    @override
    def means(self, sums: Mapping[str, Sums]) -> Mapping[str, float]:
        loss = sums["loss"].mean()
        means = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # the largest float is about exp(709)
        if self.bytes_per_token is not None:
            means["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return means

    @override
    def outputs(self, data: DataSet) -> int:
        return self.vocabulary or super().outputs(data)

    @override
    def guessing_loss(self, data: DataSet) -> float:
        return math.log(max(1, self.outputs(data)))

    @override
    def check_batch(self, batch: Any) -> None:
        if isinstance(batch, Mapping):
            named = cast("Mapping[str, Any]", batch)
            if target_key(named) is None and TOKENS not in named:
                raise ValueError(f"the batch has the keys {', '.join(named)}, expected labels or {TOKENS} among them")
        elif not isinstance(batch, torch.Tensor):
            super().check_batch(batch)
        labels: Any = self._labels(batch)
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() != 2:
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"the targets are {got}, expected token numbers (B, T)")
        if self._shifts(batch) and labels.shape[1] < 2:
            raise ValueError(
                f"the sequences have {labels.shape[1]} token, expected two at least: each is predicted from others"
            )

    @override
    def check(self, output: Any, batch: Any) -> None:
        logits = logits_of(output)
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"the output is of type {kind}, expected logits (B, T, V), or an object that has logits")
        places = tuple(self._labels(batch).shape)
        if logits.dim() != 3 or tuple(logits.shape[:2]) != places:
            swapped = logits.dim() == 3 and (logits.shape[0], logits.shape[2]) == places
            hint = "; tokens come before classes: output.transpose(1, 2)" if swapped else ""
            raise ValueError(f"the output {tuple(logits.shape)} does not fit tokens {places}, expected (B, T, V){hint}")
        cross_entropy.check_classes(*self._flat(output, batch), self.ignore_index)

    def _labels(self, batch: Any) -> torch.Tensor:
        """The targets in the places of their tokens."""
        if isinstance(batch, torch.Tensor):
            return _with(batch, self.ignore_index)
        if not isinstance(batch, Mapping) or target_key(cast("Mapping[str, Any]", batch)) is not None:
            return targets_of(batch)
        tokens, mask = batch[TOKENS], cast("Mapping[str, Any]", batch).get(MASK)
        return tokens if mask is None else tokens.long().masked_fill(mask == 0, self.ignore_index)  # uint8 has no -100

    def _shifts(self, batch: Any) -> bool:
        return isinstance(batch, (torch.Tensor, Mapping)) if self.shift is None else self.shift

    def _flat(self, output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, shape (B T, V), and targets, shape (B T,)."""
        logits, targets = logits_of(output), self.targets(batch)
        if self._shifts(batch):
            logits = logits[:, :-1]
        return logits.flatten(0, 1), targets.flatten()


def _with(tokens: torch.Tensor, padding: int) -> torch.Tensor:
    """Return tokens with another padding than that of `ormo_rpc.data.Pad`."""
    return tokens.masked_fill(tokens == cross_entropy.IGNORED, padding) if tokens.dtype.is_signed else tokens
