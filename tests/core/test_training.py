"""The training loop: it learns, it resumes to the same result, it says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.training import fit


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def loss_at(self, step: int) -> Tensor:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return ((x @ (self.slope - torch.tensor([1.0, -2.0, 0.5]))) ** 2).mean()


def test_it_learns_and_leaves_frozen_parameters_alone() -> None:
    model, seen = Line(), []
    losses = fit(model, model.loss_at, 300, 0.05, progress=lambda done, total, what: seen.append((done, total)))
    assert torch.allclose(model.slope, torch.tensor([1.0, -2.0, 0.5]), atol=0.05)
    assert losses[-1] < 0.01 < losses[0]
    assert float(model.frozen) == 1
    assert seen[-1] == (300, 300)


def test_a_run_that_is_cut_off_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole, part = Line(), Line()
    expected = fit(whole, whole.loss_at, 50, 0.05)
    state = tmp_path / "state.pt"

    def cut(done: int, total: int, what: str) -> None:
        if done == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(part, part.loss_at, 50, 0.05, state, keep_every=10, progress=cut)
    again = Line()
    assert fit(again, again.loss_at, 50, 0.05, state, keep_every=10) == expected
    assert torch.equal(again.slope, whole.slope)
    assert not state.exists()


def test_clear_errors() -> None:
    model = Line()
    with pytest.raises(InputError, match="steps: 0"):
        fit(model, model.loss_at, 0, 0.1)
    with pytest.raises(NumericalError, match="loss is nan at step 0"):
        fit(model, lambda step: model.slope.sum() * float("nan"), 3, 0.1)
    with pytest.raises(InputError, match="nothing to train"):
        fit(model.requires_grad_(False), model.loss_at, 3, 0.1)
