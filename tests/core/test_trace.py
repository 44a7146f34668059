"""The record of a training: readable while it grows, and right after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from adalora.core.allocator import Allocator
from adalora.core.trace import Allocation, TraceFile
from tests.core.toys import SHAPES, Toy, adamw, plan, train

HEADER = {"names": ["a.b", "ä"], "budget": {"initial": 8, "target": 4}}


def allocation(step: int) -> Allocation:
    return Allocation(step, 8 - step // 10, [4, 4 - step // 10], [0, 0], 0.125)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_header_then_allocations(tmp_path: Path) -> None:
    """One JSON object a line, in a folder that need not exist; each is there as soon as it is appended."""
    trace = TraceFile(tmp_path / "run" / "trace.jsonl")
    trace.start(HEADER)
    assert lines(trace.path) == [{"type": "start", **HEADER}]
    trace.append(allocation(10))
    assert lines(trace.path)[1:] == [
        {"type": "allocation", "step": 10, "budget": 7, "ranks": [4, 3], "returned": [0, 0], "orthogonality": 0.125}
    ]
    assert [p.name for p in trace.path.parent.iterdir()] == ["trace.jsonl"]


def test_a_new_run_starts_a_new_trace(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.jsonl")
    trace.start(HEADER)
    trace.append(allocation(10))
    trace.start({**HEADER, "names": []})
    assert lines(trace.path) == [{"type": "start", **HEADER, "names": []}]


def test_a_resumed_run_keeps_what_it_will_not_repeat(tmp_path: Path) -> None:
    """Resumed from step 20: allocations after it will be made again; the header is the resumed run's; one header."""
    trace = TraceFile(str(tmp_path / "trace.jsonl"))
    trace.start(HEADER)
    for step in (10, 20, 30):
        trace.append(allocation(step))
    again = TraceFile(trace.path)
    again.start({"names": ["new"]}, after_step=20)
    again.append(allocation(25))
    assert lines(trace.path)[0] == {"type": "start", "names": ["new"]}
    assert [line["step"] for line in lines(trace.path)[1:]] == [10, 20, 25]


@given(cut=st.integers(1, 200), after=st.integers(0, 50))
def test_a_kill_in_the_middle_of_a_line(cut: int, after: int, tmp_path_factory: object) -> None:
    """However much of the end is missing, a resumed run keeps the whole lines before it and writes whole ones."""
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"  # type: ignore[attr-defined]
    trace = TraceFile(path)
    trace.start(HEADER)
    for step in (10, 20, 30):
        trace.append(allocation(step))
    text = path.read_text()
    left = text[: max(0, len(text) - cut)]
    path.write_text(left)
    whole = [json.loads(line) for line in left.split("\n")[:-1]]
    trace.start(HEADER, after_step=after)
    kept = [line["step"] for line in lines(path)[1:]]
    sure = [line["step"] for line in whole if line["type"] == "allocation" and line["step"] <= after]
    # a line that lacks nothing but its end of line is whole, too
    assert kept[: len(sure)] == sure and set(kept[len(sure) :]) <= {10, 20, 30} and all(s <= after for s in kept)
    trace.append(allocation(40))
    assert lines(path)[-1]["step"] == 40


def test_an_allocator_writes_what_it_did(tmp_path: Path) -> None:
    """File and memory agree; the header says what the ranks belong to; budgets are the schedule's."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    allocator.trace_file = TraceFile(tmp_path / "trace.jsonl")
    allocator.trace_file.start(allocator.header())
    seen: dict[int, tuple[list[int], float]] = {}

    def after(step: int) -> None:
        assert allocator.schedule is not None
        if allocator.schedule.allocates(step):
            seen[step] = list(allocator.ranks().values()), allocator.orthogonality_error()

    train(toy, allocator, adamw(toy.parameters()), range(1, 17), after)
    header, *allocations = lines(tmp_path / "trace.jsonl")
    assert header == {
        "type": "start",
        "names": ["m0", "m1", "m2"],
        "initial_ranks": [4, 4, 4],
        "triplet_parameters": [d_out + d_in for d_out, d_in in SHAPES],
        "budget": {"initial": 12, "target": 6},
        "schedule": {
            "initial_budget": 12, "target_budget": 6, "total_step": 16, "t_init": 2, "t_final": 4, "delta_t": 2,
            "curve": "cubic", "unit": "triplets",
        },
        "budget_unit": "triplets",
        "rank_by": "score",
        "importance": "sensitivity_uncertainty",
        "policy": "global_topk",
    }  # fmt: skip
    assert [line["step"] for line in allocations] == [4, 6, 8, 10, 12]
    for line, recorded in zip(allocations, allocator.trace, strict=True):
        told = {key: value for key, value in recorded._asdict().items() if value is not None}
        assert line == {"type": "allocation", **told}
        assert allocator.schedule is not None
        assert recorded.budget == allocator.schedule.budget(recorded.step) == sum(recorded.ranks)
        assert recorded.ranks == seen[recorded.step][0]
    for recorded in allocator.trace[:-1]:  # the last is measured before its pruned triplets are sliced away
        assert recorded.orthogonality == seen[recorded.step][1]


def test_a_state_takes_the_trace_in_memory_back_with_it() -> None:
    """Loaded into an allocator that has gone on, a state leaves no allocation after its own step in the trace."""
    toy = Toy()
    allocator, optimizer = Allocator(toy.triplets, plan(compact=False)), adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, 8))
    state, steps = allocator.state_dict(), [a.step for a in allocator.trace]
    train(toy, allocator, optimizer, range(8, 17))
    assert steps == [4, 6] and [a.step for a in allocator.trace] == [4, 6, 8, 10, 12]
    allocator.load_state_dict(state)
    assert [a.step for a in allocator.trace] == steps
    train(toy, allocator, optimizer, range(8, 17))
    assert [a.step for a in allocator.trace] == [4, 6, 8, 10, 12]


def test_what_came_back_and_the_scores_of_the_last_ranking() -> None:
    """Returned triplets are counted against the mask before; the scores explain which triplets were kept."""
    toy = Toy(ranks=(6, 6, 6))
    allocator = Allocator(toy.triplets, plan(target_rank=2, delta_t=1, beta1=0.05, beta2=0.05))
    before = allocator.mask.clone()
    returned: dict[int, list[int]] = {}

    def after(step: int) -> None:
        nonlocal before
        if allocator.mask.shape == before.shape:  # not sliced yet
            back = allocator.mask & ~before
            returned[step] = [int(part.sum()) for part in back.split([6, 6, 6])]
            before = allocator.mask.clone()

    train(toy, allocator, adamw(toy.parameters()), range(1, 17), after)
    *earlier, last = allocator.trace
    assert len(earlier) > 4 and all(line.returned == returned[line.step] for line in earlier)
    assert any(sum(line.returned) for line in earlier), "nothing came back, so nothing was tested"
    assert all(line.scores is None for line in earlier) and last.scores is not None
    ranked = sorted((score, k) for k, scores in enumerate(last.scores) for score in scores)[-last.budget :]
    assert last.ranks == [sum(owner == k for _, owner in ranked) for k in range(3)]
