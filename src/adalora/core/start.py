"""Where triplets start: the largest singular triplets of the loss's gradient by the weights, without ever forming it.

With Λ = 0 only λ has a gradient at the first step, ∂L/∂λ_i = s·ρ·p_iᵀ G q_i with G = ∂L/∂W0, so a step of size η on
every λ lowers the loss by s·ρ·η·Σ_i |p_iᵀ G q_i|: most where P and Q are the singular vectors of G (decision 016). Its
products with thin matrices are all that block power iteration asks for (Halko, Martinsson, Tropp 2011, arXiv 0909.4061,
algorithm 4.4):

    Q: K random orthonormal rows
    repeat sweeps / 2 times:
      sum G Qᵀ over the batches, [d_out, K]       P ← an orthonormal basis of its columns
      sum Pᵀ G over the batches, [K, d_in]        U Σ Vᵀ = its singular value decomposition;  P ← P U,  Q ← Vᵀ

and a layer that sees its input x and the gradient g of its output has both: G Qᵀ = gᵀ (x Qᵀ), Pᵀ G = (g P)ᵀ x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .errors import ConfigError, StateError

OVERSAMPLING = 6  # K is the rank and so many
SWEEPS = 4
BATCHES = 8
SCALE = 2.0**12  # of the loss: no rounding, and nothing underflows in half precision
SMALLER = 2.0**-4  # where it overflows

Apply = Callable[[Tensor, Tensor], Tensor]


class Directions(NamedTuple):
    """The largest singular triplets of one matrix's gradient G, of the batches' mean loss, in descending order."""

    left: Tensor  # [d_out, k], orthonormal columns
    values: Tensor  # σ, [k]
    right: Tensor  # [k, d_in], orthonormal rows
    square: float  # ‖G‖_F², an unbiased estimate by the first K random rows

    @property
    def share(self) -> float:
        """Of ‖G‖_F², as far as it is known, what these triplets hold."""
        held = float(self.values.square().sum())
        return held / max(held, self.square)


class Sketch:
    """What is found out about the gradient of one matrix.

    Args:
        d_out: rows of G.
        right_shape: of one row of Q: [d_in], or [in, *kernel] of a convolution.
        rank: triplets wanted.
        apply: (x, Q) -> Q x, as the layer does it.
        triplet_dim: where its result counts triplets, and the layer's output counts outputs: -1; of a convolution 1.
        is_linear: ``apply`` is x Qᵀ, whose transpose is known.
    """

    def __init__(
        self,
        d_out: int,
        right_shape: Sequence[int],
        rank: int,
        apply: Apply,
        device: torch.device,
        triplet_dim: int = -1,
        is_linear: bool = True,
    ) -> None:
        self.d_out, self.right_shape, self.d_in = d_out, tuple(right_shape), math.prod(right_shape)
        self.apply, self.device, self.triplet_dim, self.is_linear = apply, device, triplet_dim, is_linear
        self.size = min(rank + OVERSAMPLING, d_out, self.d_in)  # K
        self.rank = min(rank, self.size)
        self.left: Tensor | None = None  # P, [d_out, K]: what is summed is then Pᵀ G
        self.right = torch.empty(0)  # Q, [K, d_in]
        self.sum = torch.empty(0)
        self.found: Directions | None = None

    def begin(self, generator: torch.Generator) -> None:
        """K random orthonormal rows."""
        basis, _ = torch.linalg.qr(torch.randn(self.d_in, self.size, generator=generator))
        self.right = basis.T.to(self.device)

    def clear(self) -> None:
        shape = (self.d_out, self.size) if self.left is None else (self.size, self.d_in)
        self.sum = torch.zeros(shape, device=self.device)

    @torch.no_grad()
    def add(self, x: Tensor, g: Tensor) -> None:
        """Take in one backward pass, in float32: the input of the layer and the gradient of its output."""
        x = x.float() if x.is_floating_point() else x
        g = g.float().movedim(self.triplet_dim, -1).reshape(-1, self.d_out)
        if self.left is None:
            h = self._product(x, self.right).movedim(self.triplet_dim, -1)
            self.sum += g.T @ h.reshape(-1, self.size)
        elif self.is_linear:
            self.sum += (g @ self.left).T @ x.reshape(-1, self.d_in)
        else:
            self.sum += self._transposed(x, g @ self.left)

    def settle(self, weight: float) -> None:
        """After a sweep over batches of this weight together: the next P, or the next Q and what has been found."""
        mean = self.sum / weight
        self.sum = torch.empty(0)
        if self.left is None:
            if self.found is None:  # the rows are random: E‖G Qᵀ‖² = ‖G‖² K / d_in
                square = float(mean.square().sum()) * self.d_in / self.size
                self.found = Directions(mean, mean[0], mean, square)  # its triplets are filled in below
            self.left, _ = torch.linalg.qr(mean / mean.abs().amax().clamp_min(torch.finfo(mean.dtype).tiny))
            return
        u, values, self.right = torch.linalg.svd(mean, full_matrices=False)
        assert self.found is not None
        k = self.rank
        self.found = Directions((self.left @ u)[:, :k], values[:k], self.right[:k], self.found.square)
        self.left = None

    def _product(self, x: Tensor, right: Tensor) -> Tensor:
        return self.apply(x, right.view(-1, *self.right_shape))

    def _transposed(self, x: Tensor, v: Tensor) -> Tensor:
        """What autograd knows of the layer's own product: Σ vᵀ x, [K, d_in], for v of [n, K]."""
        with torch.enable_grad():
            right = torch.zeros(self.size, self.d_in, device=v.device, requires_grad=True)
            h = self._product(x, right)
            (found,) = torch.autograd.grad(h.movedim(self.triplet_dim, -1).reshape(-1, self.size), right, v)
        return found


class Look(Function):
    """A layer's output, unchanged to the bit, whose gradient a sketch sees on its way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, sketch: Sketch) -> Tensor:
        """``anchor``: a number that requires a gradient, so that ``y`` does where nothing before it is trained."""
        ctx.save_for_backward(x)
        ctx.sketch = sketch
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            ctx.sketch.add(x, g)
        return g, None, None, None


def find_directions(
    sketches: Sequence[Sketch], look: Callable[[float], int], sweeps: int = SWEEPS
) -> list[Directions | None]:
    """The largest singular triplets of every matrix's gradient.

    In a distributed training every process calls this with batches of its own and gets the same directions.

    Args:
        sketches: one a matrix, where :class:`Look` feeds them.
        look: goes forwards and backwards through all batches, with every loss multiplied by what it is given; returns
            their number.
        sweeps: how often it does: an even number. Each pair multiplies by Gᵀ G once more.

    Returns:
        in the order of ``sketches``; None for a matrix without a gradient.

    Raises:
        ConfigError: ``sweeps`` is not an even number of at least 2.
        StateError: a gradient is not finite.
    """
    if type(sweeps) is not int or sweeps < 2 or sweeps % 2:
        raise ConfigError(f"start_sweeps={sweeps!r} must be an even number, at least 2: a pair looks at both sides.")
    generator = torch.Generator().manual_seed(0)  # nobody else's random state moves
    for sketch in sketches:
        sketch.begin(generator)
    scale = SCALE
    for _ in range(sweeps):
        while True:
            for sketch in sketches:
                sketch.clear()
            batches = _over_processes(sketches, look(scale))
            if all(bool(sketch.sum.isfinite().all()) for sketch in sketches):
                break
            if scale == 1:
                raise StateError("a gradient of the loss is not finite, so it has no directions to start from.")
            scale *= SMALLER
        for sketch in sketches:
            sketch.settle(batches * scale)
    return [s.found if s.found is not None and bool(s.found.values.any()) else None for s in sketches]


def _over_processes(sketches: Sequence[Sketch], batches: int) -> int:
    """Sums over all processes of a distributed training; the number of their batches."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return batches
    count = torch.tensor(float(batches), device=sketches[0].device)
    for tensor in (count, *(sketch.sum for sketch in sketches)):
        distributed.all_reduce(tensor)
    return int(count)
