"""Parameters, groups and states changed behind the optimizer's back: it follows, as torch's does."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_cases import VARIANTS, Case, Pair, copy_of, normal, random_gradients

import stepladder as sl

# Each of the following gets an optimizer of either kind and the list of its parameters.


def new_parameter() -> torch.nn.Parameter:
    return copy_of(normal([(9, 4)], torch.float32, 77)[0])


def each_state(optimizer: Any, params: list[Tensor]) -> Any:
    return [optimizer.state[p] for p in params if optimizer.state.get(p)]


def append_parameter(optimizer: Any, params: list[Tensor]) -> None:
    params.append(new_parameter())
    optimizer.param_groups[0]["params"].append(params[-1])


def remove_parameter(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"].pop(0)


def replace_parameter(optimizer: Any, params: list[Tensor]) -> None:
    params[1] = new_parameter()
    optimizer.param_groups[0]["params"][1] = params[1]


def append_group(optimizer: Any, params: list[Tensor]) -> None:
    params.append(new_parameter())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [params[-1]], "lr": 0.3})


def replace_groups(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.3


def reorder_parameters(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][::-1]


def tuple_of_parameters(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


def replace_state_tensors(optimizer: Any, params: list[Tensor]) -> None:
    for state in each_state(optimizer, params):
        for name in set(state) - {"step"}:
            state[name] = state[name] * 2.0


def replace_state_tensors_by_others_of_another_layout(optimizer: Any, params: list[Tensor]) -> None:
    for state in each_state(optimizer, params):
        for name in set(state) - {"step"}:
            x = state[name]
            state[name] = torch.stack([x, x], dim=-1)[..., 0]


def write_into_state_tensors(optimizer: Any, params: list[Tensor]) -> None:
    for state in each_state(optimizer, params):
        for name in set(state) - {"step"}:
            state[name].mul_(2.0)


def swap_the_memory_of_state_tensors(optimizer: Any, params: list[Tensor]) -> None:
    for state in each_state(optimizer, params):
        for name in set(state) - {"step"}:
            state[name].data = state[name] * 2.0


def replace_step_counts(optimizer: Any, params: list[Tensor]) -> None:
    for state in each_state(optimizer, params):
        if "step" in state:
            state["step"] = torch.tensor(100.0)


def write_into_step_counts(optimizer: Any, params: list[Tensor]) -> None:
    for state in each_state(optimizer, params):
        if "step" in state:
            state["step"].fill_(50.0)


def replace_state_entries(optimizer: Any, params: list[Tensor]) -> None:
    for p in params:
        if optimizer.state.get(p):
            optimizer.state[p] = {name: value * 2.0 for name, value in optimizer.state[p].items()}


def delete_one_state_entry(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state.pop(params[0], None)


def clear_one_state_entry(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[0]].clear()


def clear_the_state(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state.clear()


def replace_the_state(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state = defaultdict(dict)


def swap_the_memory_of_parameters(optimizer: Any, params: list[Tensor]) -> None:
    for p in params:
        p.data = p.detach() * 2.0


def swap_parameters_for_another_layout(optimizer: Any, params: list[Tensor]) -> None:
    for p in params:
        p.data = torch.stack([p.detach(), p.detach()], dim=-1)[..., 0]


def exchange_two_parameters(optimizer: Any, params: list[Tensor]) -> None:
    params[0].data, params[2].data = params[2].data, params[0].data


def write_into_parameters(optimizer: Any, params: list[Tensor]) -> None:
    with torch.no_grad():
        for p in params:
            p.mul_(2.0)


MEDDLING = (
    append_parameter,
    remove_parameter,
    replace_parameter,
    append_group,
    replace_groups,
    reorder_parameters,
    tuple_of_parameters,
    replace_state_tensors,
    replace_state_tensors_by_others_of_another_layout,
    write_into_state_tensors,
    swap_the_memory_of_state_tensors,
    replace_step_counts,
    write_into_step_counts,
    replace_state_entries,
    delete_one_state_entry,
    clear_one_state_entry,
    clear_the_state,
    replace_the_state,
    swap_the_memory_of_parameters,
    swap_parameters_for_another_layout,
    exchange_two_parameters,
    write_into_parameters,
)


@pytest.mark.parametrize("meddle", MEDDLING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_meddling_in_mid_run(case: Case, meddle: Callable[[Any, list[Tensor]], None]):
    pair = Pair(case, normal([(17, 5), (3,), (17, 5), ()], torch.float32, 0))
    pair.run(3)
    for optimizer, params in ((pair.ours, pair.p), (pair.theirs, pair.q)):
        meddle(optimizer, params)
    for step in range(3):
        pair.step(random_gradients(pair.p, step))
        pair.check()


# The same through references that were taken long before, so that nobody asks the optimizer for its state again.
# Each function gets the mapping of all states, the first parameter, and its state.


def held_state_gets_another_tensor(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"] * 2.0


def held_state_gets_another_step_count(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    state["step"] = torch.tensor(50.0)


def held_state_is_cleared(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    state.clear()


def held_state_tensor_gets_other_memory(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    state["exp_avg"].data = state["exp_avg"] * 2.0


def held_step_count_gets_other_memory(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    state["step"].data = torch.tensor(50.0)


def held_state_tensor_is_written(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    state["exp_avg"].mul_(2.0)


def held_mapping_is_cleared(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    states.clear()


def held_mapping_gets_another_entry(states: Any, p: Tensor, state: dict[str, Any]) -> None:
    states[p] = {name: value * 2.0 for name, value in state.items()}


HELD = (
    held_state_gets_another_tensor,
    held_state_gets_another_step_count,
    held_state_is_cleared,
    held_state_tensor_gets_other_memory,
    held_step_count_gets_other_memory,
    held_state_tensor_is_written,
    held_mapping_is_cleared,
    held_mapping_gets_another_entry,
)


@pytest.mark.parametrize("accelerated", [False, True], ids=["ours", "accelerated"])
@pytest.mark.parametrize("meddle", HELD, ids=lambda f: f.__name__)
def test_meddling_through_references_that_were_kept(meddle: Callable[..., None], accelerated: bool):
    pair = Pair(Case("AdamW", {"lr": 0.05}), normal([(17, 5), (3,)], torch.float32, 0))
    if accelerated:
        pair.ours = sl.accelerate(torch.optim.AdamW(pair.p, lr=0.05))
    pair.step(random_gradients(pair.p, 0))
    mapping = "mapping" in meddle.__name__
    held = [
        (optimizer.state if mapping else None, params[0], optimizer.state[params[0]])
        for optimizer, params in ((pair.ours, pair.p), (pair.theirs, pair.q))
    ]
    for step in range(3):
        pair.step(random_gradients(pair.p, step))
    for references in held:
        meddle(*references)
    for step in range(3):
        pair.step(random_gradients(pair.p, step))
    pair.check()


def test_tensors_swapped_under_the_optimizers_hands():
    pair = Pair(VARIANTS[1], normal([(17, 5), (3,)], torch.float32, 0))
    pair.run(2)
    for p in (pair.p[0], pair.q[0]):
        torch.utils.swap_tensors(p, copy_of(normal([(17, 5)], torch.float32, 9)[0]))
    pair.run(3)


MOVED_STATE = """
import torch
import stepladder as sl

def buffer_after_its_memory_moved(cls, keep, move):
    p = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = cls([p], lr=0.05, momentum=0.9)
    for step in range(6):
        p.grad = torch.full_like(p, step + 1.0)
        optimizer.step()
        if step == 0:
            kept = keep(optimizer.state[p]["momentum_buffer"])
        if step == 3:
            move(kept)
    return optimizer.state[p]["momentum_buffer"]

def reallocate(storage):
    content, size = storage.clone(), storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    storage.copy_(content)

for keep, move in (
    (lambda x: x.view(-1), lambda x: x.share_memory_()),
    (lambda x: x.untyped_storage(), lambda x: x.share_memory_()),
    (lambda x: x.untyped_storage(), reallocate),
):
    ours, theirs = (buffer_after_its_memory_moved(cls, keep, move) for cls in (sl.SGD, torch.optim.SGD))
    torch.testing.assert_close(ours, theirs)
"""


def test_the_memory_of_a_state_may_be_moved_through_a_view_or_its_storage():
    # In a process of its own: a step that trusted the old address would write to freed memory.
    result = subprocess.run([sys.executable, "-c", MOVED_STATE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
