"""The fused product against the plain expression: values, gradients, second derivatives, types, and who gets what."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from adalora.core.errors import StateError
from adalora.core.fused import Products, adapted_linear, add_update
from adalora.core.triplets import Triplets

from .toys import randn, random_triplets

ALPHA = 0.7
N, I, O, R = 5, 4, 6, 3  # noqa: E741 (tokens, d_in, d_out, rank)


def plain(x: Tensor, z: Tensor | None, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, bias) + ALPHA * F.linear(F.linear(x if z is None else z, a), b)


def parts(
    shape: tuple[int, ...], dtype: torch.dtype, *, dropout: bool, bias: bool, rank: int = R
) -> list[Tensor | None]:
    """x, z, W0, bias, A, B; W0 and the bias are constants."""
    x, z = (randn(*shape, I, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    a, b = randn(R, I, seed=3, dtype=dtype), randn(O, R, seed=4, dtype=dtype)
    w, c = randn(O, I, seed=5, dtype=dtype), randn(O, seed=6, dtype=dtype)
    return [x, z if dropout else None, w, c if bias else None, a.requires_grad_(), b.requires_grad_()]


def derivatives(call: Callable[..., Tensor], tensors: list[Tensor | None]) -> list[Tensor]:
    """The result, and the gradients of all that have one, for one fixed gradient of the result."""
    out = call(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, randn(*out.shape, seed=7).to(out))]


SHAPES: dict[str, tuple[int, ...]] = {
    "2-D": (N,),
    "3-D": (2, N),
    "one token": (),
    "empty batch": (0, N),
    "4-D": (2, 1, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(shape: tuple[int, ...], dropout: bool, bias: bool, dtype: torch.dtype) -> None:
    tensors = parts(shape, dtype, dropout=dropout, bias=bias)
    ours = derivatives(lambda x, z, w, c, a, b: adapted_linear(x, z, w, c, a, b, ALPHA), tensors)
    torch.testing.assert_close(ours, derivatives(plain, tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_of_a_product_made_elsewhere(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, _, w, c, a, b = parts(shape, dtype, dropout=False, bias=True)
    ours = derivatives(lambda x, a, b: add_update(F.linear(x, w, c), x, a, b, ALPHA), [x, a, b])
    theirs = derivatives(lambda x, a, b: plain(x, None, w, c, a, b), [x, a, b])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_base_product_is_left_as_it_was() -> None:
    x, _, w, c, a, b = parts((N,), torch.float64, dropout=False, bias=True)
    y = F.linear(x, w, c)
    before = y.detach().clone()
    add_update(y, x, a, b, ALPHA).sum().backward()
    assert torch.equal(y, before)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_inputs_need_not_be_contiguous(layout: str) -> None:
    x, _, w, c, a, b = parts((), torch.float64, dropout=False, bias=True)
    x = {
        "transposed": lambda: randn(N, 2, I, seed=8).transpose(0, 1),
        "strided": lambda: randn(2, N, 2 * I, seed=8)[..., ::2],
        "expanded": lambda: randn(1, 1, I, seed=8).expand(2, N, I),
    }[layout]()
    x = x.detach().requires_grad_()
    assert not x.is_contiguous()
    w = w.T.contiguous().T  # as of GPT-2's Conv1D
    ours = derivatives(lambda x, z, w, c, a, b: adapted_linear(x, z, w, c, a, b, ALPHA), [x, None, w, c, a, b])
    torch.testing.assert_close(ours, derivatives(plain, [x, None, w, c, a, b]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", ["x", "z", "a", "b", "x a", "z b", "a b", "x z a b"])
def test_only_what_needs_a_gradient_gets_one(trained: str) -> None:
    names = ("x", "z", "w", "c", "a", "b")
    tensors = parts((N,), torch.float64, dropout="z" in trained, bias=True)
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None:
            tensor.requires_grad_(name in trained.split())
    ours = derivatives(lambda x, z, w, c, a, b: adapted_linear(x, z, w, c, a, b, ALPHA), tensors)
    torch.testing.assert_close(ours, derivatives(plain, tensors), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dropout", [False, True])
def test_second_derivatives(dropout: bool) -> None:
    x, z, w, c, a, b = parts((2, 2), torch.float64, dropout=dropout, bias=True)
    wanted = [t for t in (x, z, a, b) if t is not None]

    def call(*tensors: Tensor) -> Tensor:
        *xz, a, b = tensors
        return adapted_linear(xz[0], xz[1] if dropout else None, w, c, a, b, ALPHA)

    assert torch.autograd.gradcheck(call, wanted)
    assert torch.autograd.gradgradcheck(call, wanted)
    assert torch.autograd.gradgradcheck(lambda y, x, a, b: add_update(y, x, a, b, ALPHA), [F.linear(x, w), x, a, b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["backward after autocast", "backward inside autocast"])
def test_autocast_computes_in_its_type(dtype: torch.dtype, inside: bool) -> None:
    """As autocast does to the plain expression: products in half precision, gradients in the parameters' type."""
    tensors = parts((2, 64), torch.float32, dropout=False, bias=True)

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            out = call(*tensors)
            if inside:
                return [out, *torch.autograd.grad(out.float().square().mean(), [tensors[k] for k in (0, 4, 5)])]
        return [out, *torch.autograd.grad(out.float().square().mean(), [tensors[k] for k in (0, 4, 5)])]

    ours, theirs = run(lambda x, z, w, c, a, b: adapted_linear(x, z, w, c, a, b, ALPHA)), run(plain)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs] == [dtype] + 3 * [torch.float32]
    for mine, other in zip(ours, theirs, strict=True):  # each rounds a few intermediate results in its own order
        assert (mine - other).norm() <= 4 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_on_a_base_in_half_precision(dtype: torch.dtype) -> None:
    x, _, w, c, a, b = parts((64,), torch.float32, dropout=False, bias=True)
    exact = derivatives(lambda x, a, b: plain(x, None, w, c, a, b), [x, a, b])
    half = x.detach().to(dtype).requires_grad_()
    ours = derivatives(lambda x, a, b: adapted_linear(x, None, w.to(dtype), c.to(dtype), a, b, ALPHA), [half, a, b])
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    for mine, other in zip(ours, exact, strict=True):
        assert (mine - other).norm() <= 4 * torch.finfo(dtype).eps * other.norm()


def test_double_precision_stays_under_autocast() -> None:
    tensors = parts((N,), torch.float64, dropout=False, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapted_linear(*tensors, ALPHA)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, plain(*tensors))


# ------------------------------------------------------------------------------------------------------- all matrices

RANKS = (3, 1, 4)
WIDTHS = ((6, 5), (4, 7), (3, 5))  # (d_out, d_in)


def members() -> tuple[list[Triplets], Products]:
    triplets = [
        random_triplets(*shape, rank, seed=k, name=f"m{k}")
        for k, (shape, rank) in enumerate(zip(WIDTHS, RANKS, strict=True))
    ]
    return triplets, Products(triplets)


def loss(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([(b @ a).square().sum() * (k + 1) for k, (a, b) in enumerate(pairs)]).sum()


def gradients(triplets: list[Triplets]) -> list[Tensor | None]:
    found = [w.grad for t in triplets for w in t.parameters]
    for t in triplets:
        for w in t.parameters:
            w.grad = None
    return found


def expected_gradients(triplets: list[Triplets]) -> list[Tensor | None]:
    loss([(t.lam.unsqueeze(1) * t.q, t.p) for t in triplets]).backward()
    return gradients(triplets)


def test_products_and_their_gradients() -> None:
    triplets, products = members()
    pairs = [products.take(t, torch.float64) for t in triplets]
    for t, (a, b) in zip(triplets, pairs, strict=True):
        assert torch.equal(a, t.lam.unsqueeze(1) * t.q)
        assert torch.equal(b, t.p)
    loss(pairs).backward()
    found = gradients(triplets)
    torch.testing.assert_close(found, expected_gradients(triplets), rtol=1e-12, atol=0)
    for w, gradient in zip([w for t in triplets for w in t.parameters], found, strict=True):
        assert gradient is not None
        assert gradient.stride() == w.stride(), "in the layout of its parameter"


def test_gradients_accumulate_over_passes() -> None:
    triplets, products = members()
    for _ in range(3):
        loss([products.take(t, torch.float64) for t in triplets]).backward()
    found = gradients(triplets)
    for mine, once in zip(found, expected_gradients(triplets), strict=True):
        torch.testing.assert_close(mine, 3 * once, rtol=1e-12, atol=0)


def test_second_derivatives_of_products() -> None:
    triplets, products = members()
    parameters = [w for t in triplets for w in t.parameters]

    def second(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        first = torch.autograd.grad(loss(pairs), parameters, create_graph=True)
        return list(torch.autograd.grad(sum((g**3).sum() for g in first), parameters))

    ours = second([products.take(t, torch.float64) for t in triplets])
    torch.testing.assert_close(ours, second([(t.lam.unsqueeze(1) * t.q, t.p) for t in triplets]))


def test_members_that_did_not_run_get_no_gradient() -> None:
    triplets, products = members()
    a, b = products.take(triplets[2], torch.float64)
    (b @ a).sum().backward()
    assert [gradient is None for gradient in gradients(triplets)] == 6 * [True] + 3 * [False]


def test_layers_of_one_pass_may_belong_to_two_backward_passes() -> None:
    """As of two losses on two parts of a model: each has its own call of backward()."""
    triplets, products = members()
    halves = [
        [products.take(t, torch.float64) for t in triplets[:1]],
        [products.take(t, torch.float64) for t in triplets[1:]],
    ]
    for pairs in halves:
        loss(pairs).backward()
    found = gradients(triplets)
    for half in (triplets[:1], triplets[1:]):
        loss([(t.lam.unsqueeze(1) * t.q, t.p) for t in half]).backward()
    torch.testing.assert_close(found, gradients(triplets), rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["in place", "data", "new storage", "frozen", "other rank"])
def test_changed_parameters_are_noticed(how: str) -> None:
    """Whatever changed them, and whether or not a backward pass or a whole forward pass lay in between."""
    triplets, products = members()
    total = sum(
        part.sum() for part in products.take(triplets[0], torch.float64)
    )  # the others are made, too, and not taken
    if how == "other rank":  # which needs parameters that nothing else holds
        total.backward()
    for t in triplets:
        with torch.no_grad():
            if how == "in place":
                t.lam.mul_(2)
            elif how == "new storage":
                t.q.data = t.q.data * 2
            elif how == "frozen":
                t.q.requires_grad_(False)
            elif how == "other rank":
                t.keep(torch.zeros(1, dtype=torch.long))
            else:
                t.q.data.mul_(2)  # leaves no trace by itself ...
    order = triplets if how == "data" else triplets[::-1]  # ... but the first layer to run again has all made anew
    for t in order:
        a, _ = products.take(t, torch.float64)
        assert torch.equal(a, t.lam.unsqueeze(1) * t.q)
        assert a.requires_grad


def test_weights_changed_before_backward_are_an_error() -> None:
    triplets, products = members()
    total = loss([products.take(t, torch.float64) for t in triplets])
    with torch.no_grad():
        triplets[0].lam.add_(1)
    with pytest.raises(StateError, match="changed in place"):
        total.backward()


def test_weights_that_took_no_part_may_change() -> None:
    triplets, products = members()
    total = loss([products.take(triplets[0], torch.float64)])
    with torch.no_grad():
        triplets[1].lam.add_(1)
    total.backward()
    assert triplets[0].lam.grad is not None
    assert triplets[1].lam.grad is None


def test_without_gradients_nothing_is_kept() -> None:
    triplets, products = members()
    with torch.no_grad():
        a, b = products.take(triplets[0], torch.float64)
    assert not a.requires_grad
    assert b is triplets[0].p
    with torch.inference_mode():
        products.take(triplets[1], torch.float64)
    a, _ = products.take(triplets[0], torch.float64)
    assert a.requires_grad


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
def test_copies_make_their_own(copied: Callable[[Products], Products]) -> None:
    triplets, products = members()
    products.take(triplets[0], torch.float64)
    other = copied(products)
    with torch.no_grad():
        for t in other.members:
            t.lam.zero_()
    for mine, theirs in zip(triplets, other.members, strict=True):
        assert products.take(mine, torch.float64)[0].any()
        assert not other.take(theirs, torch.float64)[0].any()


def test_parameters_of_another_kind_are_left_to_their_own() -> None:
    """Tensors that functional_call or sharding put in the place of parameters have graphs, or places, of their own."""
    triplets, products = members()
    swapped = triplets[1]
    q = swapped.q.detach().clone().requires_grad_()
    del swapped.right.right_vectors
    swapped.right.right_vectors = q * 2  # type: ignore[assignment]
    pairs = [products.take(t, torch.float64) for t in triplets]
    loss(pairs).backward()
    assert q.grad is not None
    assert all(w.grad is not None for t in (triplets[0], triplets[2]) for w in t.parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_the_type_that_layers_compute_in(dtype: torch.dtype) -> None:
    triplets, products = members()
    pairs = [products.take(t, dtype) for t in triplets]
    assert {part.dtype for pair in pairs for part in pair} == {dtype}
    loss(pairs).backward()
    found = gradients(triplets)
    for mine, exact in zip(found, expected_gradients(triplets), strict=True):
        assert mine is not None and mine.dtype == torch.float64
        assert (mine - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


def test_rank_zero() -> None:
    triplets, products = members()
    triplets[1].keep(torch.zeros(0, dtype=torch.long))
    a, b = products.take(triplets[1], torch.float64)
    assert (a.shape, b.shape) == ((0, 7), (4, 0))
    y = adapted_linear(randn(N, 7, seed=1), None, randn(4, 7, seed=2), None, a, b, ALPHA)
    torch.testing.assert_close(y, F.linear(randn(N, 7, seed=1), randn(4, 7, seed=2)))


def test_parameters_stay_parameters() -> None:
    triplets, products = members()
    products.take(triplets[0], torch.float64)
    assert all(type(w) is nn.Parameter for t in triplets for w in t.parameters)
