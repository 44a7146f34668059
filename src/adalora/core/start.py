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
    square: float  # ‖G‖_F², estimated

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
        apply: (x, Q) -> Q x, as the layer does it; the dimension of its result that counts triplets, and that of the
            layer's output which counts outputs, is as far from the end as ``right_shape`` is long.
        is_linear: ``apply`` is x Qᵀ, whose transpose is known.
        oversampling: K is the rank and so many.
    """

    def __init__(
        self,
        d_out: int,
        right_shape: Sequence[int],
        rank: int,
        apply: Apply,
        device: torch.device,
        is_linear: bool = True,
        oversampling: int = OVERSAMPLING,
    ) -> None:
        self.d_out, self.right_shape, self.d_in = d_out, tuple(right_shape), math.prod(right_shape)
        self.apply, self.device, self.is_linear = apply, device, is_linear
        self.size = min(rank + oversampling, d_out, self.d_in)  # K
        self.rank = min(rank, self.size)
        self.left: Tensor | None = None  # P, [d_out, K]: what is summed is then Pᵀ G
        self.right = torch.empty(0)  # Q, [K, d_in]
        self.probed: Tensor | None = None  # G Qᵀ of the first, random Q: [d_out, K]
        self.sum = torch.empty(0)
        self.found: Directions | None = None

    def begin(self, generator: torch.Generator) -> None:
        """K random orthonormal rows."""
        random = torch.randn(self.d_in, self.size, generator=generator, dtype=torch.float32, device="cpu")
        self.right = torch.linalg.qr(random).Q.T.to(self.device)

    def clear(self) -> None:
        shape = (self.d_out, self.size) if self.left is None else (self.size, self.d_in)
        self.sum = torch.zeros(shape, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def add(self, x: Tensor, g: Tensor) -> None:
        """Take in one backward pass, in float32: the input of the layer and the gradient of its output."""
        with torch.autocast(g.device.type, enabled=False):
            x = x.float() if x.is_floating_point() else x
            g = self._flat(g.float(), self.d_out)
            if self.left is None:
                self.sum += g.T @ self._flat(self._product(x, self.right), self.size)
            elif self.is_linear:
                self.sum += (g @ self.left).T @ x.reshape(-1, self.d_in)
            else:
                self.sum += self._transposed(x, g @ self.left)

    @torch.no_grad()
    def settle(self, weight: float) -> None:
        """After a sweep over batches of this weight together: the next P, or the next Q and what has been found."""
        with torch.autocast(self.device.type, enabled=False):
            mean = self.sum / weight
            self.sum = torch.empty(0)
            if self.left is None:
                self.probed = mean if self.probed is None else self.probed
                self.left = torch.linalg.qr(mean / mean.abs().amax().clamp_min(torch.finfo(mean.dtype).tiny)).Q
                return
            u, values, self.right = torch.linalg.svd(mean, full_matrices=False)
            k, square = self.rank, self._square(values, again=self.found is not None)
            self.found = Directions((self.left @ u)[:, :k], values[:k], self.right[:k], square)
            self.left = None

    def _square(self, values: Tensor, again: bool) -> float:
        """‖G‖_F²: of what P spans it is known, of the rest random rows say it, E‖R Qᵀ‖² = ‖R‖² K / d_in.

        The first P has been made of these very rows, which then speak for all of G.
        """
        assert self.probed is not None and self.left is not None
        known, times = float(values.square().sum()), self.d_in / self.size
        if not again:
            return max(known, float(self.probed.square().sum()) * times)
        rest = self.probed - self.left @ (self.left.T @ self.probed)
        return known + float(rest.square().sum()) * times

    def _flat(self, tensor: Tensor, size: int) -> Tensor:
        """[n, size], of a tensor with the dimension of this size in its place."""
        return tensor.movedim(-len(self.right_shape), -1).reshape(-1, size)

    def _product(self, x: Tensor, right: Tensor) -> Tensor:
        return self.apply(x, right.view(-1, *self.right_shape))

    def _transposed(self, x: Tensor, v: Tensor) -> Tensor:
        """What autograd knows of the layer's own product: Σ vᵀ x, [K, d_in], for v of [n, K]."""
        with torch.enable_grad():
            right = torch.zeros(self.size, self.d_in, dtype=torch.float32, device=v.device, requires_grad=True)
            (found,) = torch.autograd.grad(self._flat(self._product(x, right), self.size), right, v)
        return found


class Look(Function):
    """A layer's output, unchanged to the bit, whose gradient a sketch sees on its way back.

    It is a copy: what follows may write into it, as an activation in place does.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, sketch: Sketch, x: Tensor) -> Tensor:
        """``anchor``: a number that requires a gradient, so that ``y`` does where nothing before it is trained."""
        ctx.sketch = sketch
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
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
            how many had one.
        sweeps: how often it does: an even number. Each pair multiplies by Gᵀ G once more.

    Returns:
        in the order of ``sketches``; None for a matrix without a gradient.

    Raises:
        ConfigError: ``sweeps`` is not an even number of at least 2.
        StateError: no batch has a loss, or a gradient is not finite.
    """
    if type(sweeps) is not int or sweeps < 2 or sweeps % 2:
        raise ConfigError(f"start_sweeps={sweeps!r} must be an even number, at least 2: a pair looks at both sides.")
    if not sketches:
        return []
    generator = torch.Generator().manual_seed(0)  # nobody else's random state moves
    for sketch in sketches:
        sketch.begin(generator)
    scale = SCALE
    for _ in range(sweeps):
        while True:
            for sketch in sketches:
                sketch.clear()
            batches = _look_everywhere(sketches, look, scale)
            if all(bool(sketch.sum.isfinite().all()) for sketch in sketches):
                break
            if scale == 1:
                raise StateError("a gradient of the loss is not finite, so it has no directions to start from.")
            scale *= SMALLER
        for sketch in sketches:
            sketch.settle(batches * scale)
    return [s.found if s.found is not None and bool(s.found.values.any()) else None for s in sketches]


def _look_everywhere(sketches: Sequence[Sketch], look: Callable[[float], int], scale: float) -> int:
    """Sums over all processes of a distributed training; the number of their batches."""
    batches, error = 0, None
    try:
        batches = look(scale)
    except Exception as caught:  # of whatever kind: the others would wait for this process's sums
        error = caught
    batches, failed = over_processes([batches, error is not None], sketches[0].device)
    if error is not None:
        raise error
    if failed:
        raise StateError(
            f"{failed} other process{'es' * (failed > 1)} of this training could not look at the gradient; the model is"
            " as it was."
        )
    if not batches:
        raise StateError("none of the batches has a label that counts, so there is no gradient to start from.")
    if _processes() > 1:
        for sketch in sketches:
            torch.distributed.all_reduce(sketch.sum)
    return batches


def over_processes(counts: Sequence[int], device: torch.device) -> list[int]:
    """Each count summed over the processes of a distributed training; as they are without one."""
    if _processes() == 1:
        return list(counts)
    summed = torch.tensor([int(count) for count in counts], device=device)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def _processes() -> int:
    distributed = torch.distributed
    alone = not distributed.is_available() or not distributed.is_initialized()
    return 1 if alone else distributed.get_world_size()
