"""Whichever optimizer and precision: one allocation a step, the budget reached, an adapter that stock PEFT loads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Adafactor

import adalora
from adalora import AdaLoraConfig, Allocator, StateError
from adalora.hf.hooks import drive

from ..core.toys import Toy, plan
from .models import batch, bert, logits
from .test_loops import STEPS, Rows, adamw, adapter_weights, make, one_step

AREA = "Optimizers and precision"
MATRICES = 11
Optimizer = torch.optim.Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [w for w in model.parameters() if w.requires_grad]


def schedulefree(name: str) -> Callable[..., Optimizer]:
    return getattr(pytest.importorskip("schedulefree", reason="schedulefree is not installed"), name)  # type: ignore[no-any-return]


def bitsandbytes(name: str) -> Callable[..., Optimizer]:
    return getattr(pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim, name)  # type: ignore[no-any-return]


def torchao(name: str) -> Callable[..., Optimizer]:
    return getattr(pytest.importorskip("torchao.optim", reason="torchao is not installed"), name)  # type: ignore[no-any-return]


# what a user looks for -> optimizers; a name ending in "closure" is called with one
OPTIMIZERS: dict[str, dict[str, Callable[[list[nn.Parameter]], Optimizer]]] = {
    "AdamW: for-loop, foreach, fused, amsgrad": {
        "for-loop": lambda w: torch.optim.AdamW(w, lr=1e-2, foreach=False),
        "foreach": lambda w: torch.optim.AdamW(w, lr=1e-2, foreach=True),
        "fused": lambda w: torch.optim.AdamW(w, lr=1e-2, fused=True),
        "amsgrad": lambda w: torch.optim.AdamW(w, lr=1e-2, amsgrad=True),
    },
    "SGD, plain and with momentum": {
        "sgd": lambda w: torch.optim.SGD(w, lr=0.1),
        "momentum": lambda w: torch.optim.SGD(w, lr=3e-2, momentum=0.9, nesterov=True),
    },
    "Adafactor of Transformers and of PyTorch": {
        "transformers": lambda w: Adafactor(w, lr=1e-2, relative_step=False, scale_parameter=False),
        "with first moment": lambda w: Adafactor(w, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
        "torch": lambda w: torch.optim.Adafactor(w, lr=1e-2),
    },
    "PyTorch's others: RMSprop, Adagrad, Adadelta, Adamax, ASGD, NAdam, RAdam, Rprop": {
        "RMSprop": lambda w: torch.optim.RMSprop(w, lr=1e-3, centered=True, momentum=0.9),
        "Adagrad": lambda w: torch.optim.Adagrad(w, lr=1e-2),
        "Adadelta": lambda w: torch.optim.Adadelta(w, lr=1.0),
        "Adamax": lambda w: torch.optim.Adamax(w, lr=1e-2),
        "ASGD": lambda w: torch.optim.ASGD(w, lr=0.1),
        "NAdam": lambda w: torch.optim.NAdam(w, lr=1e-2),
        "RAdam": lambda w: torch.optim.RAdam(w, lr=1e-2),
        "Rprop": lambda w: torch.optim.Rprop(w, lr=1e-3),
    },
    "bitsandbytes: 8-bit AdamW and Lion, paged and 32-bit AdamW": {
        "AdamW8bit": lambda w: bitsandbytes("AdamW8bit")(w, lr=1e-2, min_8bit_size=64),
        "Lion8bit": lambda w: bitsandbytes("Lion8bit")(w, lr=1e-3, min_8bit_size=64),
        "PagedAdamW": lambda w: bitsandbytes("PagedAdamW")(w, lr=1e-2),
        "AdamW": lambda w: bitsandbytes("AdamW")(w, lr=1e-2, optim_bits=32),
    },
    "torchao: 8-bit, 4-bit and float8 AdamW": {
        "AdamW8bit": lambda w: torchao("AdamW8bit")(w, lr=1e-2, block_size=16),
        "AdamW4bit": lambda w: torchao("AdamW4bit")(w, lr=1e-2, block_size=16),
        "AdamWFp8": lambda w: torchao("AdamWFp8")(w, lr=1e-2, block_size=16),
    },
    "schedule-free AdamW, RAdam and SGD": {
        "AdamWScheduleFree": lambda w: schedulefree("AdamWScheduleFree")(w, lr=1e-2),
        "for-loop": lambda w: schedulefree("AdamWScheduleFree")(w, lr=1e-2, foreach=False),
        "RAdamScheduleFree": lambda w: schedulefree("RAdamScheduleFree")(w, lr=5e-2),
        "SGDScheduleFree": lambda w: schedulefree("SGDScheduleFree")(w, lr=0.5),
    },
    "schedule-free with closures": {
        "AdamWScheduleFree closure": lambda w: schedulefree("AdamWScheduleFreeClosure")(w, lr=1e-2),
        "SGDScheduleFree closure": lambda w: schedulefree("SGDScheduleFreeClosure")(w, lr=0.1),
    },
    "LBFGS, with and without line search": {
        "closure": lambda w: torch.optim.LBFGS(w, lr=0.1, max_iter=4),
        "line search, closure": lambda w: torch.optim.LBFGS(w, max_iter=4, line_search_fn="strong_wolfe"),
    },
}


def train(model: nn.Module, optimizer: Optimizer, *, with_closure: bool, steps: int = STEPS) -> list[float]:
    losses = []
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(**Rows(8).rows).loss
            loss.backward()
            return loss

        if with_closure:
            losses.append(optimizer.step(closure).item())
        else:
            losses.append(closure().item())
            optimizer.step()
            optimizer.zero_grad()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return losses


def assert_budget_reached(model: nn.Module, target: int = 2, first: int = 3) -> None:
    allocator, ranks = adalora.allocator(model), adalora.ranks(model)
    assert allocator.frozen and allocator.step == STEPS
    assert [allocation.step for allocation in allocator.trace] == list(range(first, 9))
    assert allocator.live == sum(ranks.values()) == target * MATRICES == target * len(ranks)
    assert all(0 <= rank <= 4 for rank in ranks.values())
    assert sum(int(t.lam.count_nonzero()) for t in allocator.triplets) == target * MATRICES, (
        "more than the budget is in use"
    )


def assert_saved_is_in_memory(model: nn.Module, base: nn.Module, directory: Path, target: int = 2) -> None:
    """And within the budget."""
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(base, directory)
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=1e-5)
    assert sum(w.shape[0] for n, w in loaded.named_parameters() if ".lora_A." in n) == target * MATRICES


def same_base() -> nn.Module:
    torch.manual_seed(11)  # as in make()
    return bert()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        pytest.param(what, name, marks=pytest.mark.compatibility(AREA, what), id=f"{what.split(':')[0]}, {name}")
        for what, names in OPTIMIZERS.items()
        for name in names
    ],
)
def test_reaches_its_budget_and_saves_it(what: str, name: str, tmp_path: Path) -> None:
    model = make()
    optimizer = OPTIMIZERS[what][name](trained(model))
    losses = train(model, optimizer, with_closure=name.endswith("closure"))
    assert losses[-1] < losses[0]
    # its first five steps are of length 0: there is nothing to rank before λ has moved
    assert_budget_reached(model, first=6 if name == "RAdamScheduleFree" else 3)
    assert_saved_is_in_memory(model, same_base(), tmp_path)


@pytest.mark.compatibility(AREA, "`compact=False`: pruned λ stay 0 whatever the optimizer averages")
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("AdamW: for-loop, foreach, fused, amsgrad", "foreach"),
        ("SGD, plain and with momentum", "momentum"),
        ("schedule-free AdamW, RAdam and SGD", "AdamWScheduleFree"),
        ("schedule-free with closures", "AdamWScheduleFree closure"),
        ("LBFGS, with and without line search", "closure"),
    ],
)
def test_masks_hold_where_ranks_are_not_compacted(what: str, name: str, tmp_path: Path) -> None:
    """As under DDP. Momentum moves a λ that was set to 0; a schedule-free ``optimizer.eval()`` restores it."""
    model = make(compact=False)
    train(model, OPTIMIZERS[what][name](trained(model)), with_closure=name.endswith("closure"))
    assert sum(t.rank for t in adalora.allocator(model).triplets) == 4 * MATRICES
    assert_budget_reached(model)
    assert_saved_is_in_memory(model, same_base(), tmp_path)


@pytest.mark.compatibility(AREA, "AdamW: for-loop, foreach, fused, amsgrad")
def test_kernels_of_adamw_agree() -> None:
    """The same masks from the same numbers, up to the rounding of a fused kernel."""
    models = [make() for _ in range(3)]
    for model, settings in zip(models, ({"foreach": False}, {"foreach": True}, {"fused": True}), strict=True):
        train(model, adamw(model, **settings), with_closure=False)
    assert adalora.ranks(models[0]) == adalora.ranks(models[1]) == adalora.ranks(models[2])
    for model in models[1:]:
        torch.testing.assert_close(adapter_weights(model), adapter_weights(models[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_packed_moments_stay_and_only_what_is_saved_is_compact(name: str) -> None:
    """Blocks of 8-bit values do not come apart by triplets: shapes stay, pruned λ are held at 0."""
    model = make()
    optimizer = bitsandbytes(name)(trained(model), lr=1e-3, min_8bit_size=64)
    train(model, optimizer, with_closure=False)
    allocator = adalora.allocator(model)
    states = [state["state1"].dtype for state in optimizer.state.values()]
    assert torch.uint8 in states, "no state was quantized: this shows nothing"
    assert allocator.live == 2 * MATRICES
    assert sum(t.rank for t in allocator.triplets) == 4 * MATRICES
    with pytest.raises(StateError, match="8-bit"):
        adalora.compact(model, optimizer)


@pytest.mark.compatibility(AREA, "schedule-free AdamW, RAdam and SGD")
def test_schedule_free_evaluates_and_saves_what_it_averages(tmp_path: Path) -> None:
    """``optimizer.eval()`` swaps in the averaged weights: at any moment of pruning they are what is saved."""
    model = make()
    optimizer = schedulefree("AdamWScheduleFree")(trained(model), lr=1e-2)
    for steps in (5, 4, 3):  # before the last masks, right after the final phase began, at the end
        train(model, optimizer, with_closure=False, steps=steps)  # ends with optimizer.eval()
        at_evaluation = logits(model, "SEQ_CLS")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(same_base(), tmp_path)
        torch.testing.assert_close(logits(loaded, "SEQ_CLS"), at_evaluation, rtol=0, atol=1e-5)
        optimizer.train()
        assert (logits(model, "SEQ_CLS") - at_evaluation).abs().max() > 1e-4, "train and eval were the same weights"
    assert_budget_reached(model)


@pytest.mark.compatibility(AREA, "LBFGS, with and without line search")
def test_each_evaluation_of_a_closure_has_the_regulariser_and_one_counts() -> None:
    """LBFGS evaluates several times for one step. The importance is that of the weights before it."""
    model = make(orth_reg_weight=1.0, initialization="gaussian")
    allocator = adalora.allocator(model)
    optimizer = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=4)
    evaluations: list[float] = []
    before: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        if evaluations:  # by now the regulariser has been added to what was here
            evaluations[-1] = float((allocator.triplets[0].p.grad - before[-1]).norm())
        optimizer.zero_grad()
        loss: torch.Tensor = model(**Rows(8).rows).loss
        loss.backward()
        before.append(allocator.triplets[0].p.grad.clone())
        evaluations.append(0.0)
        return loss

    optimizer.step(closure)
    assert len(evaluations) >= 3
    assert all(added > 0 for added in evaluations[:-1])
    assert allocator.step == 1


@pytest.mark.compatibility(AREA, "Parameter groups: own learning rates for P, Λ, Q")
def test_parameter_groups(tmp_path: Path) -> None:
    model = make()
    triplets = adalora.allocator(model).triplets
    ours = {id(w) for t in triplets for w in t.parameters}
    groups = [
        {"params": [t.p for t in triplets], "lr": 1e-2},
        {"params": [t.lam for t in triplets], "lr": 3e-2, "weight_decay": 0.0},
        {"params": [t.q for t in triplets], "lr": 0.0, "weight_decay": 0.0},
        {"params": [w for w in trained(model) if id(w) not in ours], "lr": 1e-3},
    ]
    vectors = [t.q.detach().clone() for t in triplets]
    losses = train(model, torch.optim.AdamW(groups), with_closure=False)
    assert losses[-1] < losses[0]
    assert_budget_reached(model)
    for t, q in zip(triplets, vectors, strict=True):  # a learning rate of 0: the live rows are where they were
        assert all(any(torch.equal(row, old) for old in q) for row in t.q)
    assert_saved_is_in_memory(model, same_base(), tmp_path)


@pytest.mark.compatibility(AREA, "Several optimizers, one of which holds the whole adapter")
def test_an_optimizer_for_the_head_beside_that_of_the_adapter() -> None:
    model = make()
    ours = {id(w) for t in adalora.allocator(model).triplets for w in t.parameters}
    optimizers = [
        torch.optim.AdamW([w for w in trained(model) if id(w) in ours], lr=1e-2),
        torch.optim.SGD([w for w in trained(model) if id(w) not in ours], lr=1e-2),
    ]
    for _ in range(STEPS):
        model(**Rows(8).rows).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_budget_reached(model)


def shared(model: nn.Module, kind: str) -> list[Optimizer]:
    """Optimizers that each hold a part of the adapter."""
    weights = trained(model)
    if kind == "every other":
        return [torch.optim.AdamW(weights[::2], lr=1e-2), torch.optim.AdamW(weights[1::2], lr=1e-2)]
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    matrices = [w for w in weights if w.ndim == 2]
    return [torch.optim.Muon(matrices, lr=2e-2), torch.optim.AdamW([w for w in weights if w.ndim != 2], lr=1e-2)]


SHARING = "Several optimizers that share an adapter: Muon for P and Q beside AdamW for λ"


@pytest.mark.compatibility(AREA, SHARING)
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("turned", [False, True])
def test_muon_for_matrices_beside_adamw_for_the_rest(compact: bool, turned: bool, tmp_path: Path) -> None:
    """A step counts when all have stepped, whichever is the first; both states are sliced along with the ranks."""
    model = make(compact=compact)
    optimizers = shared(model, "matrices and vectors")[:: -1 if turned else 1]
    losses = []
    for _ in range(STEPS):
        loss = model(**Rows(8).rows).loss
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert_budget_reached(model)
    assert_saved_is_in_memory(model, same_base(), tmp_path)
    triplets = adalora.allocator(model).triplets
    assert sum(t.rank for t in triplets) == (2 if compact else 4) * MATRICES
    for t in triplets:
        for w in t.parameters if t.rank else ():
            state = next(o.state[w] for o in optimizers if w in o.state)
            assert all(value.shape == w.shape for value in state.values() if value.numel() > 1)


@pytest.mark.compatibility(AREA, SHARING)
@pytest.mark.parametrize("sensitivity_at", ["before_step", "after_step"])
@pytest.mark.parametrize("scaled", [False, True])
def test_sharing_an_adapter_changes_nothing(sensitivity_at: str, scaled: bool) -> None:
    """Each parameter gets its regulariser and its importance in the step of its own optimizer: also where a loss scaler
    divides one optimizer's gradients after the other's step."""
    models, scores = [make(orth_reg_weight=1.0, sensitivity_at=sensitivity_at) for _ in range(2)], []
    for model, optimizers in zip(models, ([adamw(models[0])], shared(models[1], "every other")), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(STEPS):
            scaler.scale(model(**Rows(8).rows).loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad()
            if step == 4:
                scores.append(adalora.allocator(model).scores())
    assert scores[0].any() and torch.equal(*scores)
    assert adalora.ranks(models[0]) == adalora.ranks(models[1])
    assert torch.equal(adapter_weights(models[1]), adapter_weights(models[0]))


@pytest.mark.compatibility(AREA, SHARING)
def test_a_scaler_may_skip_one_of_two_optimizers_that_share_an_adapter() -> None:
    """Those of its steps are not counted, and nobody is suspected of not stepping at all."""
    model = make()
    optimizers, allocator = shared(model, "every other"), adalora.allocator(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        scaler.scale(model(**Rows(8).rows).loss).backward()
        if step in (0, 1, 5):
            next(w for w in optimizers[1].param_groups[0]["params"] if w.grad is not None).grad.fill_(float("inf"))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert allocator.step == 5
    assert all(torch.isfinite(w).all() for w in model.parameters())


def test_an_adapter_may_join_an_optimizer_that_has_stepped_already() -> None:
    """Whether its parameters join the optimizer's, or an adapter is made of parameters that it holds."""
    model = make()
    optimizer = torch.optim.AdamW([w for n, w in model.named_parameters() if "modules_to_save" in n], lr=1e-2)
    one_step(model, optimizer)
    assert adalora.allocator(model).step == 0
    optimizer.add_param_group({"params": [w for t in adalora.allocator(model).triplets for w in t.parameters]})
    for _ in range(STEPS):
        one_step(model, optimizer)
    assert_budget_reached(model)
    toy = Toy()
    other = torch.optim.SGD(toy.parameters(), lr=1e-2)
    for driven in (False, True):
        if driven:  # the optimizer holds what it did
            allocator = Allocator(toy.triplets, plan())
            drive(allocator)
        toy.loss(1).backward()
        other.step()
    assert allocator.step == 1


class Picky(torch.optim.SGD):
    """Its step has other arguments than PyTorch's, and raises when told to."""

    def step(self, get_loss: Callable[..., Any] | None = None, batch_size: int = 1, *, fail: bool = False) -> Any:
        self.seen = batch_size
        loss = None
        if get_loss is not None:
            with torch.enable_grad():
                loss = get_loss()
        if fail:
            raise ValueError("no step today")
        super().step()
        return loss


@pytest.mark.compatibility(AREA, "A closure under any name, beside other arguments of `step`")
@pytest.mark.parametrize("form", ["position", "name", "no closure"])
def test_arguments_of_step_arrive(form: str) -> None:
    plain, model = make(), make()
    optimizers = [torch.optim.SGD(trained(plain), lr=0.1), Picky(trained(model), lr=0.1)]
    train(plain, optimizers[0], with_closure=True)

    def closure() -> torch.Tensor:
        optimizers[1].zero_grad()
        loss: torch.Tensor = model(**Rows(8).rows).loss
        loss.backward()
        return loss

    for _ in range(STEPS):
        if form == "no closure":
            closure()
            optimizers[1].step(None, 7)
        elif form == "name":
            optimizers[1].step(batch_size=7, get_loss=closure)
        else:
            optimizers[1].step(closure, 7)
        assert optimizers[1].seen == 7
    assert_budget_reached(model)
    assert torch.equal(adapter_weights(model), adapter_weights(plain))


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_raises_is_forgotten(with_closure: bool) -> None:
    """The next one gets its regulariser and its importance; a step within a step (Picky's) is still one."""
    model, plain = make(orth_reg_weight=1.0), make(orth_reg_weight=1.0)
    optimizers = [Picky(trained(model), lr=0.1), torch.optim.SGD(trained(plain), lr=0.1)]
    for step in range(STEPS):
        for k, (each, optimizer) in enumerate(zip((model, plain), optimizers, strict=True)):

            def closure(each: nn.Module = each, optimizer: Optimizer = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = each(**Rows(8).rows).loss
                loss.backward()
                return loss

            given = (closure,) if with_closure else ()
            if k == 0 and step == 0:  # nothing of it is in the averages: λ = 0 has no sensitivity yet
                if not with_closure:
                    closure()
                with pytest.raises(ValueError, match="no step today"):
                    optimizer.step(*given, fail=True)
            if not with_closure:
                closure()
            optimizer.step(*given)
    assert adalora.allocator(model).step == STEPS
    torch.testing.assert_close(adapter_weights(model), adapter_weights(plain), rtol=0, atol=0)


def test_allocators_may_be_made_while_another_steps() -> None:
    """The hook looks through all of them; one that comes or goes in another thread is no error."""
    model, stop = make(total_step=10_000, tinit=9_000, tfinal=500), threading.Event()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    config = AdaLoraConfig(target_modules=["query"], target_r=1, total_step=10)

    def make_others() -> None:
        while not stop.is_set():
            adalora.get_peft_model(bert(), config)

    thread = threading.Thread(target=make_others)
    thread.start()
    try:
        model(**Rows(8).rows).loss.backward()
        for _ in range(300):
            optimizer.step()
    finally:
        stop.set()
        thread.join()
    assert adalora.allocator(model).step == 300


# ----------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.compatibility(AREA, "Gradient checkpointing, reentrant and not")
def test_checkpointing_after_an_adapter_was_disabled_for_a_reference() -> None:
    """As DPO does between forward and backward: what is computed again must save what was saved, at rank 0, too."""
    model = make(target_r=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = adamw(model)
    for _ in range(STEPS):
        loss = model(**Rows(8).rows).loss
        with torch.no_grad(), model.disable_adapter():
            model(**Rows(8).rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in adalora.ranks(model).values(), "no layer was pruned away: this shows nothing"
    assert adalora.allocator(model).live == MATRICES


@pytest.mark.compatibility(AREA, "Gradient clipping by norm and by value")
def test_importance_sees_the_clipped_gradient() -> None:
    """A score is the product of two quantities that are linear in the gradient: half of it, a quarter of the score."""
    plain, clipped = (make(orth_reg_weight=0.0, beta1=0.5, beta2=0.5) for _ in range(2))
    for model in (plain, clipped):
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        model(**Rows(8).rows).loss.backward()
        if model is clipped:
            norm = nn.utils.clip_grad_norm_(trained(model), float("inf"))
            nn.utils.clip_grad_norm_(trained(model), float(norm) / 2)
        # Λ = 0 at first, so that P and Q have no gradient yet and Λ no sensitivity: move it by hand
        for t in adalora.allocator(model).triplets:
            t.lam.data.fill_(0.5)
        optimizer.step()
    torch.testing.assert_close(
        adalora.allocator(clipped).scores(), adalora.allocator(plain).scores() / 4, rtol=1e-3, atol=0
    )


@pytest.mark.compatibility(AREA, "Gradient clipping by norm and by value")
def test_clipped_trainings_reach_the_budget(tmp_path: Path) -> None:
    for clip in (
        lambda weights: nn.utils.clip_grad_norm_(weights, 0.1),
        lambda weights: nn.utils.clip_grad_norm_(weights, 1e-3, norm_type=float("inf")),  # refuses empty tensors
        lambda weights: nn.utils.clip_grad_value_(weights, 1e-3),
    ):
        model = make(target_r=1)
        optimizer = adamw(model)
        for _ in range(STEPS):
            model(**Rows(8).rows).loss.backward()
            clip(trained(model))
            optimizer.step()
            optimizer.zero_grad()
        assert 0 in adalora.ranks(model).values(), "no layer was pruned away: this shows less"
        assert_budget_reached(model, target=1)
        assert_saved_is_in_memory(model, same_base(), tmp_path, target=1)


@pytest.mark.compatibility(AREA, "Gradient checkpointing, reentrant and not")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Turned on as Transformers does it; the reentrant kind needs inputs that require gradients."""
    results = []
    for checkpointing in (False, True):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            assert model.base_model.model.is_gradient_checkpointing
        train(model, adamw(model), with_closure=False)
        assert_budget_reached(model)
        results.append((adalora.ranks(model), adapter_weights(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.compatibility(AREA, "bfloat16: autocast, a bfloat16 base with a float32 adapter")
@pytest.mark.parametrize("kind", ["autocast", "bfloat16 base"])
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return same_base().to(torch.bfloat16) if kind != "autocast" else same_base()

    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value", "dense"], target_r=2, init_r=4, lora_alpha=16, tinit=2,
        tfinal=4, deltaT=1, total_step=STEPS,
    )  # fmt: skip
    model = adalora.get_peft_model(base(), config)
    allocator = adalora.allocator(model)
    assert {w.dtype for t in allocator.triplets for w in t.parameters} == {torch.float32}  # PEFT's default
    optimizer, losses = adamw(model), []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = model(**batch("SEQ_CLS")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_budget_reached(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    atol = 1e-5 if kind == "autocast" else 0.03  # eight bits of mantissa, logits near 1, another order of products
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=atol)


@pytest.mark.compatibility(AREA, "float16: autocast with `GradScaler`, skipped steps not counted")
@pytest.mark.parametrize("fused", [False, True])
def test_float16_autocast_with_a_scaler_that_starts_too_high(fused: bool) -> None:
    """The first gradients overflow by themselves; clipping after unscaling, as PyTorch's recipe has it."""
    model = make()
    allocator, optimizer = adalora.allocator(model), adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-4)
    calls = 0
    while allocator.step < STEPS:
        with torch.autocast("cpu", torch.float16):
            loss = model(**Rows(8).rows).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        calls += 1
        assert calls < 3 * STEPS
    assert calls > STEPS, "no step was skipped: this shows nothing"
    assert all(torch.isfinite(w).all() for w in model.parameters())
    assert_budget_reached(model)


@pytest.mark.compatibility(AREA, "A closure evaluated once is the same as backward and step")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_a_closure_is_the_same_as_backward_and_step(name: str) -> None:
    models = [make(), make()]
    for model, with_closure in zip(models, (False, True), strict=True):
        train(model, getattr(torch.optim, name)(trained(model), lr=1e-2), with_closure=with_closure)
    assert adalora.ranks(models[0]) == adalora.ranks(models[1])
    assert torch.equal(adapter_weights(models[0]), adapter_weights(models[1]))


@pytest.mark.compatibility(AREA, "Learning-rate schedulers that step before or after")
def test_a_scheduler_wraps_the_optimizers_step() -> None:
    """PyTorch's schedulers replace ``optimizer.step`` by a counting one."""
    model = make()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
    for _ in range(STEPS):
        one_step(model, optimizer)
        scheduler.step()
    assert_budget_reached(model)
