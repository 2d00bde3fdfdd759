"""What the loss refuses, and what it says of numbers that are none."""
import math

import pytest
import torch
from torch.testing import assert_close

from sdpo_nb.loss import certificate, dpo_loss, reward_accuracy


@pytest.mark.parametrize("f", [lambda g, ref: dpo_loss(g, ref, 0.1), reward_accuracy])
@pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((3,), (3, 1)), ((3,), (1,)), ((2,), (3,))])
def test_unequal_shapes_are_refused(f, shapes):
    with pytest.raises(ValueError, match="shape.*must be equal"): f(*map(torch.zeros, shapes))


def test_accuracy_is_fp32_whatever_the_gammas_and_keeps_nan():
    gammas = torch.tensor([math.nan, 2., -2., 0., math.inf, -math.inf, -0.0])
    for g in (gammas, gammas.double(), gammas.bfloat16()):
        assert_close(reward_accuracy(g), torch.tensor([math.nan, 1, 0, 0.5, 1, 0, 0.5]), equal_nan=True)
    assert reward_accuracy(torch.zeros(2), torch.tensor([math.nan, -1.])).isnan().tolist() == [True, False]
    assert reward_accuracy(torch.zeros(3, 3), torch.ones(3, 3)).shape == (3, 3)


def test_the_certificate_survives_losses_of_any_size():
    underflow = dpo_loss(torch.tensor([2000.]), torch.tensor([0.]), 0.1).item()
    assert underflow == 0
    assert 0 < certificate(underflow, 0., 0.1) < 2000           # the loss of a zero would certify infinity
    assert certificate(5000., 0., 0.1) == -50_000
    with pytest.raises(ValueError, match="negative"): certificate(-0.1, 0., 0.1)
