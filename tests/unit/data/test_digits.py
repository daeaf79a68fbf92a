"""The digits: scikit-learn's scans, divided as scikit-learn divides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ormo_rpc.data import Digits, digits


def test_the_digits_are_divided_once_and_for_all_with_equal_shares_of_every_class() -> None:
    torch.manual_seed(0)
    first = Digits().load()
    torch.manual_seed(1)
    np.random.default_rng(1)
    again = Digits().load()
    assert (len(first.train), len(first.test), first.input_shape, first.num_classes) == (1437, 360, (1, 8, 8), 10)
    for one, other in [(first.train, again.train), (first.test, again.test)]:
        everything = torch.arange(len(one))
        inputs, labels = one.batch(everything, None)
        assert torch.equal(inputs, other.batch(everything, None)[0])
        assert inputs.shape == (len(one), 1, 8, 8)
        assert labels.bincount().float().div(len(one)).sub(0.1).abs().max() < 0.005  # the ten digits are about a tenth each


@pytest.mark.slow
@pytest.mark.parametrize("scans", [digits.SCANS, "no/such/file"], ids=["file", "library"])
def test_the_digits_are_divided_as_scikit_learn_divides_them(scans: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    monkeypatch.setattr(digits, "SCANS", scans)
    everything, labels = load_digits(return_X_y=True)
    parts = train_test_split(everything, labels, test_size=360, random_state=0, stratify=labels)
    data = Digits().load()
    for half, x, y in ((data.train, parts[0], parts[2]), (data.test, parts[1], parts[3])):
        inputs, targets = half.batch(torch.arange(len(half)), None)
        assert torch.equal(targets, torch.as_tensor(y))
        torch.testing.assert_close((inputs * 0.3760 + 0.3053).flatten(1) * 16, torch.as_tensor(x).float(), rtol=0, atol=1e-5)


def test_the_digits_are_scikit_learns_scans_normalised() -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    known = {(tuple(scan), int(label)) for scan, label in zip(scans.tolist(), labels, strict=True)}
    data = Digits().load()
    seen: list[tuple[tuple[float, ...], int]] = []
    for half in (data.train, data.test):
        inputs, targets = half.batch(torch.arange(len(half)), None)
        pixels = ((inputs.double() * 0.3760 + 0.3053) * 16).round().flatten(1)
        seen += [(tuple(scan), label) for scan, label in zip(pixels.tolist(), targets.tolist(), strict=True)]
    assert set(seen) == known
    assert len(seen) == 1797
    assert (scans / 16).mean() == pytest.approx(0.3053, abs=1e-4)
    assert (scans / 16).std() == pytest.approx(0.3760, abs=1e-4)
