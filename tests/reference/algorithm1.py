"""Algorithm 1 of the paper (arXiv 2303.10512), as literally as Python allows: one matrix, one entry class at a time.

Nothing here is shared with the library; the regulariser is differentiated by autograd, inside the loss, as the paper
writes it. Slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def budget(t: int, *, b0: int, bT: int, T: int, t_init: int, t_final: int) -> int:
    """Equation 12 (without its second subtraction of t_final, which would overshoot b0), rounded down."""
    if t <= t_init:
        return b0
    if t >= T - t_final:
        return bT
    return int(bT + (b0 - bT) * (1 - (t - t_init) / (T - t_init - t_final)) ** 3)


class Algorithm1:
    """P, E (the paper's Λ in the authors' code) and Q of every matrix, and two moving averages of each.

    Parameters are trained in place, as parts of a model; plain tensors are copied.
    """

    def __init__(
        self,
        matrices: list[tuple[Tensor, Tensor, Tensor]],
        *,
        T: int,
        t_init: int,
        t_final: int,
        delta_t: int,
        target_rank: int,
        beta1: float,
        beta2: float,
        gamma: float,
    ) -> None:
        self.matrices = [
            {
                key: value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value.clone())
                for key, value in zip("PEQ", matrix, strict=True)
            }
            for matrix in matrices
        ]
        self.I_bar = [{key: torch.zeros_like(w) for key, w in m.items()} for m in self.matrices]
        self.U_bar = [{key: torch.zeros_like(w) for key, w in m.items()} for m in self.matrices]
        self.T, self.t_init, self.t_final, self.delta_t = T, t_init, t_final, delta_t
        self.b0 = sum(len(m["E"]) for m in self.matrices)
        self.bT = target_rank * len(self.matrices)
        self.beta1, self.beta2, self.gamma = beta1, beta2, gamma
        self.scores: list[Tensor] = [torch.zeros_like(m["E"]) for m in self.matrices]
        self.masks: list[Tensor] = [torch.ones(len(m["E"]), dtype=torch.bool) for m in self.matrices]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [w for m in self.matrices for w in m.values()]

    def regulariser(self) -> Tensor:
        """Equation 4, summed over all matrices."""
        R = torch.zeros((), dtype=self.matrices[0]["P"].dtype)
        for m in self.matrices:
            P, Q, eye = m["P"], m["Q"], torch.eye(len(m["E"]), dtype=m["P"].dtype)
            R = R + (P.T @ P - eye).pow(2).sum() + (Q @ Q.T - eye).pow(2).sum()
        return R

    def step(self, t: int, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Lines 3 to 9 for one step: gradient, importance at the weights before the update, update, pruning of Λ."""
        optimizer.zero_grad()
        (loss + self.gamma * self.regulariser()).backward()
        if t < self.T - self.t_final:
            for m, I_bar, U_bar in zip(self.matrices, self.I_bar, self.U_bar, strict=True):
                for key, w in m.items():
                    sensitivity = (w * w.grad).abs().detach()
                    I_bar[key] = self.beta1 * I_bar[key] + (1 - self.beta1) * sensitivity
                    U_bar[key] = self.beta2 * U_bar[key] + (1 - self.beta2) * (sensitivity - I_bar[key]).abs()
        optimizer.step()
        pruning = self.t_init < t < self.T - self.t_final and t % self.delta_t == 0
        if pruning or t == self.T - self.t_final:
            self.prune(budget(t, b0=self.b0, bT=self.bT, T=self.T, t_init=self.t_init, t_final=self.t_final))
        elif t > self.T - self.t_final:
            self.apply_masks()

    def prune(self, b: int) -> None:
        """Equations 7 to 11: score each triplet, keep the b best of all matrices, set the others' λ to 0."""
        self.scores = []
        for I_bar, U_bar in zip(self.I_bar, self.U_bar, strict=True):
            s = {key: I_bar[key] * U_bar[key] for key in "PEQ"}
            rank = len(s["E"])
            self.scores.append(
                torch.stack([s["E"][i] + s["P"][:, i].mean() + s["Q"][i, :].mean() for i in range(rank)])
            )
        ranked = sorted(
            ((-float(score), k, i) for k, scores in enumerate(self.scores) for i, score in enumerate(scores))
        )
        kept = {(k, i) for _, k, i in ranked[:b]}
        self.masks = [torch.tensor([(k, i) in kept for i in range(len(m["E"]))]) for k, m in enumerate(self.matrices)]
        self.apply_masks()

    def apply_masks(self) -> None:
        with torch.no_grad():
            for m, mask in zip(self.matrices, self.masks, strict=True):
                m["E"][~mask] = 0.0
