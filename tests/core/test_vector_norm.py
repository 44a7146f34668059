"""A length c of singular vectors: the same ΔW, directions that turn 1/c times as fast, a regulariser that keeps c."""

from __future__ import annotations

import pytest
import torch

from adalora.core.allocator import Allocator
from adalora.core.errors import ConfigError
from adalora.core.orthogonality import penalty
from adalora.core.settings import Settings
from adalora.core.triplets import Triplets

C = 0.4


def made(vector_norm: float, kind: str = "squared") -> Allocator:
    torch.manual_seed(3)
    triplets = []
    for k, (d_out, d_in, rank) in enumerate(((6, 8, 3), (8, 5, 2))):
        t = Triplets.create(f"m{k}", d_out, d_in, rank, gain=2.0 / vector_norm**2)
        with torch.no_grad():
            t.p.mul_(vector_norm)
            t.q.mul_(vector_norm)
            t.lam.copy_(torch.randn(rank))
        triplets.append(t)
    settings = Settings(target_rank=1, total_step=50, vector_norm=vector_norm, orthogonality=kind)  # type: ignore[arg-type]
    return Allocator(triplets, settings)


@pytest.mark.parametrize("kind", ["squared", "frobenius"])
def test_the_regulariser_is_that_of_the_vectors_over_their_length(kind: str) -> None:
    """R(X/c) is the same number for c·X, and its closed form is what autograd finds."""
    ours, plain = made(C, kind), made(1.0, kind)
    for t in (*ours.triplets, *plain.triplets):
        with torch.no_grad():
            t.p.mul_(1.3)  # away from where R is 0 and its norm has no slope
            t.q.mul_(0.8)
    assert ours.penalty().item() == pytest.approx(plain.penalty().item(), rel=1e-5)
    assert ours.orthogonality_error() == pytest.approx(plain.orthogonality_error(), rel=1e-5)
    expected = torch.autograd.grad(ours.penalty(), [w for t in ours.triplets for w in (t.p, t.q)])
    for t in ours.triplets:
        t.lam.grad = torch.zeros_like(t.lam)
    ours.before_step()
    found = [w.grad for t in ours.triplets for w in (t.p, t.q)]
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_updates_are_the_same_and_directions_turn_faster() -> None:
    ours, plain = made(C), made(1.0)
    for a, b in zip(ours.triplets, plain.triplets, strict=True):
        torch.testing.assert_close(a.delta(), b.delta())
        torch.testing.assert_close(a.p, C * b.p)
    turned = []
    for allocator in (ours, plain):
        t = allocator.triplets[0]
        before = torch.nn.functional.normalize(t.p.detach()[:, 0], dim=0)
        torch.manual_seed(0)
        target = torch.randn(6, 8)
        (t.delta() - target).square().sum().backward()
        torch.optim.Adam([t.p], 1e-3).step()
        after = torch.nn.functional.normalize(t.p.detach()[:, 0], dim=0)
        turned.append((after - before).norm().item())
    assert turned[0] / turned[1] == pytest.approx(1 / C, rel=0.02)  # the sine of a small angle


def test_a_start_has_vectors_of_that_length() -> None:
    t = Triplets.create("m", 8, 6, 3)
    t.reset("orthonormal", C)
    for rows in (t.p.mT, t.q):
        torch.testing.assert_close(rows @ rows.mT, C**2 * torch.eye(3), atol=1e-6, rtol=1e-5)
    assert penalty([t], vector_norm=C).item() < 1e-10


@pytest.mark.parametrize("length", [0.0, -1.0, float("inf"), float("nan"), "long", None, True])
def test_no_length_is_an_error(length: float) -> None:
    with pytest.raises(ConfigError, match="vector_norm"):
        Settings(target_rank=1, vector_norm=length)
