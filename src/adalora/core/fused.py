"""The update of a linear layer in as few passes over memory, and as few operations, as it can be done in.

    y = x W0ᵀ + b + α·(z Aᵀ) Bᵀ                x: [n, d_in], z: x after dropout, y: [n, d_out]
                                               A = Λ Q: [r, d_in], B = P: [d_out, r], α = s·ρ

One autograd node does it. Forwards the update is added to the base product in place; backwards, from g = ∂L/∂y,

    hᵀ = A zᵀ                                  kept from the forward pass, [r, n]
    vᵀ = Bᵀ gᵀ                                 [r, n]
    ∂L/∂Bᵀ = α·hᵀ g       ∂L/∂A = α·vᵀ z
    ∂L/∂x = g W0, to which α·v A is added in place (to ∂L/∂z, where there is dropout)

so an adapted layer costs six products with r beside its own two. Thin results are made lying down, [r, ...]: CPU
libraries take half the time, or a tenth, of what upright ones take. With A and B as parameters this is plain LoRA;
:class:`Products` makes the A of AdaLoRA, of all matrices at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .errors import StateError
from .triplets import Triplets


def adapted_linear(
    x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float
) -> Tensor:
    """x W0ᵀ + b + α·(z Aᵀ) Bᵀ, computed in the type of ``x``, or in autocast's.

    Args:
        x: [..., d_in]; z: the same after dropout, None where there is none.
        weight: W0, [d_out, d_in]; bias: [d_out]. Both are constants: they get no gradient.
        a: [r, d_in]; b: [d_out, r]

    Returns:
        [..., d_out]
    """
    inputs = (computed_in(x), x, z, weight, bias, a, b, alpha)
    if torch.is_grad_enabled():
        return _AdaptedLinear.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    return _base_and_update(*inputs)[0]


def add_update(y: Tensor, z: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """y + α·(z Aᵀ) Bᵀ, computed in the type of ``y``: for base layers that only know their product themselves.

    Args:
        y: [..., d_out]; z: [..., d_in]; a: [r, d_in]; b: [d_out, r]
    """
    if torch.compiler.is_compiling():  # autograd takes the expression, laid out so, apart into the same products
        return _with_update(computed_in(y), y, z, a, b.T.contiguous(), alpha)[0]
    return _AddUpdate.apply(computed_in(y), y, z, a, b, alpha)  # type: ignore[no-any-return, no-untyped-call]


def computed_in(tensor: Tensor) -> torch.dtype:
    """The type that a product with this tensor is computed in: its own, or autocast's, which leaves float64 alone."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., d] -> [n, d]"""
    return _cast(tensor.reshape(-1, tensor.shape[-1]), dtype)


def _scaled_product(left: Tensor, right: Tensor, alpha: float, like: Tensor) -> Tensor:
    """α·left right in one operation; ``like`` only has its shape."""
    return torch.addmm(like, left, right, beta=0, alpha=alpha)


def _base_and_update(
    dtype: torch.dtype,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """y, [..., d_out], and hᵀ, [r, n]."""
    rows, w = _rows(x, dtype), _cast(weight, dtype)
    y = rows @ w.T if bias is None else torch.addmm(_cast(bias, dtype), rows, w.T)
    ht = _cast(a, dtype) @ (rows if z is None else _rows(z, dtype)).T
    y.addmm_(ht.T, _cast(b, dtype).T, alpha=alpha)
    return y.view(*x.shape[:-1], y.shape[-1]), ht


def _with_update(
    dtype: torch.dtype, y: Tensor, z: Tensor, a: Tensor, bt: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """y + α·(z Aᵀ) Bᵀ, a sum of its own, since whatever made y may need it again; and hᵀ, [r, n]."""
    ht = _cast(a, dtype) @ _rows(z, dtype).T
    return _cast(torch.addmm(_rows(y, dtype), ht.T, _cast(bt, dtype), alpha=alpha), y.dtype).view(y.shape), ht


def _outside_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward pass on ∂L/∂y as rows, [n, d_out], in the forward pass's type, in autocast or not.

    Autograd itself brings gradients to the types of what they belong to.
    """

    def outside(ctx: Any, gradient: Tensor) -> Any:
        device = gradient.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, _rows(gradient, ctx.dtype))
        with torch.autocast(device, enabled=False):
            return backward(ctx, _rows(gradient, ctx.dtype))

    return outside


def _gradients(
    ctx: Any, g: Tensor, z: Tensor, a: Tensor, b: Tensor, ht: Tensor, needs: Sequence[bool], into: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂L/∂z (added to ``into``, if that is given), ∂L/∂A and ∂L/∂B, as far as they are needed."""
    z, a, b = _rows(z, ctx.dtype), _cast(a, ctx.dtype), _cast(b, ctx.dtype)
    dz, da, db = into, None, None
    if torch.is_grad_enabled():  # a backward pass that will be differentiated must see where h comes from
        ht = a @ z.T
    if needs[2]:
        db = _scaled_product(ht, g, ctx.alpha, like=b.T).T
    if needs[0] or needs[1]:
        vt = b.T @ g.T
        if needs[1]:
            da = _scaled_product(vt, z, ctx.alpha, like=a)
        if needs[0]:
            dz = _scaled_product(vt.T, a, ctx.alpha, z) if into is None else into.addmm_(vt.T, a, alpha=ctx.alpha)
    return dz, da, db


class _AdaptedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        a, b, alpha = rest
        y, ht = _base_and_update(dtype, x, z, weight, bias, a, b, alpha)
        ctx.save_for_backward(x if z is None else z, weight, a, b, ht)
        ctx.dtype, ctx.alpha, ctx.shape, ctx.has_dropout = dtype, alpha, x.shape, z is not None
        return y

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, g: Tensor) -> Any:
        z, weight, a, b, ht = ctx.saved_tensors
        _, needs_x, needs_z, _, _, *needs_a_b, _ = ctx.needs_input_grad
        dx = g @ _cast(weight, ctx.dtype) if needs_x else None
        if ctx.has_dropout:
            dz, da, db = _gradients(ctx, g, z, a, b, ht, (needs_z, *needs_a_b), None)
        else:
            dx, da, db = _gradients(ctx, g, z, a, b, ht, (needs_x, *needs_a_b), dx)
            dz = None
        dx, dz = (None if d is None else d.view(ctx.shape) for d in (dx, dz))
        return None, dx, dz, None, None, da, db, None


class _AddUpdate(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, y: Tensor, z: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        total, ht = _with_update(dtype, y, z, a, b.T, alpha)
        ctx.save_for_backward(z, a, b, ht)
        ctx.dtype, ctx.alpha = dtype, alpha
        return total

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, g: Tensor) -> Any:
        z, a, b, ht = ctx.saved_tensors
        dz, da, db = _gradients(ctx, g, z, a, b, ht, ctx.needs_input_grad[2:5], None)
        return None, g.view(*z.shape[:-1], g.shape[-1]), None if dz is None else dz.view(z.shape), da, db, None


# ------------------------------------------------------------------------------------------------------ all matrices


class Products:
    """A = Λ Q and B = P of all matrices of one adapter, with one node of the graph between them and the parameters.

    So what turns ∂L/∂A and ∂L/∂B into the gradients of P, Λ and Q is a few operations a pass, not a few a matrix.
    The first layer to run has the products of all layers on its device made, and each layer takes its own, once. A
    layer that finds its own taken has come to its next forward pass, and has all of them made anew. A backward pass
    ends them, too.

    Args:
        members: triplets of linear layers.
    """

    def __init__(self, members: Sequence[Triplets]) -> None:
        self.members = list(members)
        self._made: dict[int, tuple[Tensor, Tensor, tuple[object, ...]]] = {}  # by id: A, B, and what they come from

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_made": {}}  # a graph can be neither copied nor pickled

    def take(self, triplets: Triplets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A, [r, d_in], and B, [d_out, r], of this member, differentiable in P, Λ and Q.

        Args:
            dtype: that the layer computes in. The first layer's is taken for all, another layer's has to be cast to.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            taken = self._take(triplets)
            if taken is None and not _is_distributed():
                self._make(dtype, triplets.q.device)
                taken = self._take(triplets)
            if taken is not None:
                return taken
        return triplets.q * triplets.lam.unsqueeze(1), triplets.p

    def forget(self) -> None:
        """Let go of what nobody took."""
        self._made.clear()

    def _take(self, triplets: Triplets) -> tuple[Tensor, Tensor] | None:
        a, b, source = self._made.pop(id(triplets), (None, None, None))
        return None if a is None or b is None or source != _source(triplets.parameters) else (a, b)

    def _make(self, dtype: torch.dtype, device: torch.device) -> None:
        factors = {id(t): t.parameters for t in self.members}
        whole = {
            key: parts
            for key, parts in factors.items()
            if parts[0].device == device and all(type(part) is nn.Parameter for part in parts) and parts[1].numel()
        }
        if not whole:
            return
        inputs = chain(*zip(*whole.values(), strict=True))
        made = _FromFactors.apply(weakref.ref(self), dtype, *inputs)  # type: ignore[no-untyped-call]
        pairs = zip(whole.items(), made[: len(whole)], made[len(whole) :], strict=True)
        self._made.update({key: (a, b, _source(parts)) for (key, parts), a, b in pairs})


def _source(parameters: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What changes when P, Λ or Q do, or whether they are trained."""
    return tuple([(w._version, w.data_ptr(), w.shape, w.requires_grad) for w in parameters])


def _is_distributed() -> bool:
    """Then gradients go out layer by layer, and a layer's parameters may not be whole before it runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _FromFactors(Function):
    """All P, all λ, all Q -> all A, all B.

    Layers that share this node may belong to several backward passes, and what is saved is freed after one: so the
    factors are held aside. Nor do checkpoints, which compare what is saved, see them.
    """

    @staticmethod
    def forward(ctx: Any, products: weakref.ref[Products], dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.products = products
        count = len(factors) // 3
        ctx.ps, ctx.lams, ctx.qs = (factors[k * count : (k + 1) * count] for k in range(3))
        ctx.versions = _versions(ctx)
        all_a: dict[int, Tensor] = {}
        for group, sizes, lam, q in _blocks(ctx, range(count)):
            all_a.update(zip(group, _split(_cast(lam.unsqueeze(1) * q, dtype), sizes), strict=True))
        all_b = ctx.ps
        if any(p.dtype is not dtype for p in all_b):
            all_b = [torch.empty_like(p, dtype=dtype) for p in all_b]
            torch._foreach_copy_(all_b, ctx.ps)
        return *(all_a[k] for k in range(count)), *all_b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂L/∂λ_i = Σ_j Q_ij ∂L/∂A_ij and ∂L/∂Q = Λ ∂L/∂A; ∂L/∂P = ∂L/∂B."""
        count = len(ctx.qs)
        of_a, of_b = gradients[:count], gradients[count:]
        used = [k for k in range(count) if of_a[k] is not None or of_b[k] is not None]
        present = _versions(ctx)
        if any(ctx.versions[k] != present[k] for k in used):
            raise StateError(
                "adapter weights were changed in place after the forward pass whose gradients are asked for: call"
                " backward() before optimizer.step()."
            )
        if (products := ctx.products()) is not None:
            products.forget()
        dlams: dict[int, Tensor] = {}
        dqs: dict[int, Tensor] = {}
        for group, sizes, lam, q in _blocks(ctx, [k for k in range(count) if of_a[k] is not None]):
            da = torch.cat([gradient for k in group if (gradient := of_a[k]) is not None])
            dlams.update(zip(group, _split((da * q).sum(1), sizes), strict=True))
            dqs.update(zip(group, _split(lam.unsqueeze(1) * da, sizes), strict=True))
        return None, None, *_laid_out(of_b, ctx.ps), *(d.get(k) for d in (dlams, dqs) for k in range(count))


def _versions(ctx: Any) -> list[tuple[int, int, int]]:
    return [(p._version, lam._version, q._version) for p, lam, q in zip(ctx.ps, ctx.lams, ctx.qs, strict=True)]


def _blocks(ctx: Any, members: Iterable[int]) -> Iterator[tuple[list[int], list[int], Tensor, Tensor]]:
    """Members of one width and type; their ranks; their λ, [R], and Q, [R, d_in], one below the other."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k in members:
        q = ctx.qs[k]
        groups.setdefault((q.shape[1], q.dtype), []).append(k)
    for group in groups.values():
        lams, qs = [ctx.lams[k] for k in group], [ctx.qs[k] for k in group]
        yield group, [len(lam) for lam in lams], torch.cat(lams), torch.cat(qs)


def _split(block: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts that autograd takes for tensors of their own, not for views."""
    return list(torch.unsafe_split_with_sizes(block, sizes))


def _laid_out(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients in the type and memory layout of their parameters, by one operation instead of one for each."""
    if torch.is_grad_enabled():  # a graph is wanted; autograd will see to both
        return list(gradients)
    given = [gradient for gradient in gradients if gradient is not None]
    copies = [torch.empty_like(w) for w, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    if given:
        torch._foreach_copy_(copies, given)
    copied = iter(copies)
    return [None if gradient is None else next(copied) for gradient in gradients]
