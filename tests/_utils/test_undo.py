from __future__ import annotations

import random
import sys
from functools import partial

import pytest
import torch
from faults import differences
from snapshots import fingerprint, parts_of
from torch import nn

from fasc_lightning._utils import Undo, undoing


class Interrupt(BaseException):
    """Nothing else raises it."""


def model():
    made = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 3), nn.Dropout()))
    made[2][0].bias.requires_grad_(False)
    made[1].eval()
    return made


def looked_at(module, alive):
    def look(value):
        alive.append(value)
        return fingerprint(value)

    return parts_of(module, look)


def test_steps_run_in_reverse_when_a_block_ends():
    ran = []
    with undoing() as undo:
        undo.add(ran.append, 1)
        undo.add(ran.append, 2)
        assert ran == []
    assert ran == [2, 2, 1, 1]


def test_what_is_forgotten_stays():
    ran = []
    with undoing() as undo:
        undo.add(ran.append, 1)
        undo.forget()
    assert ran == []


def test_a_step_that_is_interrupted_is_finished():
    flags, left = [True] * 4, [2]

    def put():
        for i in range(4):
            if left[0] == 0:
                left[0] = -1
                raise Interrupt
            left[0] -= 1
            flags[i] = False

    ran, undo = [], Undo()
    for step in (partial(ran.append, "first"), put, partial(ran.append, "last")):
        undo.add(step)
    with pytest.raises(Interrupt):
        undo.close()
    assert flags == [False] * 4
    assert ran == ["last", "last", "first", "first"]


def test_a_step_that_fails_keeps_no_other_from_running():
    def fail():
        raise OSError("a full disk")

    ran = []

    def work():
        with undoing() as undo:
            undo.add(ran.append, 1)
            undo.add(fail)
            raise RuntimeError("first")

    with pytest.raises(OSError, match="a full disk") as caught:
        work()
    assert ran == [1, 1]
    errors = [caught.value]
    while errors[-1].__context__ is not None:
        errors.append(errors[-1].__context__)
    assert isinstance(errors[-1], RuntimeError)


def test_attributes_get_their_values_back_or_go():
    class Holder:
        kind = "of the class"

    class Other(Holder):
        pass

    holder = Holder()
    holder.own = 1
    undo = Undo()
    undo.set(holder, "own", 2)
    undo.set(holder, "kind", "of its own")
    undo.set(holder, "__class__", Other)
    assert (holder.own, holder.kind, type(holder)) == (2, "of its own", Other)
    undo.close()
    assert vars(holder) == {"own": 1}
    assert type(holder) is Holder
    undo.close()
    assert vars(holder) == {"own": 1}


KINDS = ["register_forward_hook", "register_forward_pre_hook", "register_state_dict_post_hook"]
KINDS += ["register_load_state_dict_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_goes_and_the_same_one_of_others_stays(kind):
    module, alive = model()[0], []

    def hook(*unused):
        return None

    getattr(module, kind)(hook)
    before = looked_at(module, alive)
    with undoing() as undo:
        undo.hook(getattr(module, kind), hook)
        getattr(module, kind)(hook)
        assert differences(before, parts_of(module, fingerprint))
    left = [len(value) for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict)]
    assert max(left) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_whose_registration_is_interrupted_goes(kind, monkeypatch):
    module, alive = model()[0], []
    before = looked_at(module, alive)
    register = getattr(type(module), kind)

    def interrupted(self, *args, **kwargs):
        register(self, *args, **kwargs)
        raise Interrupt

    monkeypatch.setattr(nn.Module, kind, interrupted)
    with pytest.raises(Interrupt), undoing() as undo:
        undo.hook(getattr(module, kind), lambda *unused: None)
    assert [key for _, key in differences(before, parts_of(module, fingerprint))] in ([], ["_is_full_backward_hook"])


@pytest.mark.parametrize("attributes", [False, True])
def test_a_structure_is_put_back_in_its_order(attributes):
    module, alive = model(), []
    module.config = type("Config", (), {})()
    module.config.layers = 2
    module.noted = "before"
    before = looked_at(module, alive)
    weights = [p.detach().clone() for p in module.parameters()]
    with undoing() as undo:
        undo.keep(module, attributes)
        first = module[0]
        del module[0]
        module.append(first)
        module[1][0] = nn.Linear(2, 3)
        module[1].register_forward_hook(lambda *unused: None)
        module.__class__ = type("Other", (nn.Sequential,), {})
        module.eval().requires_grad_(False)
        module.forward = lambda x: x
        module.register_buffer("sum", torch.zeros(1), persistent=False)
        module.config.layers, module.noted, module.more = 3, "after", 1
    changed = {key for _, key in differences(before, parts_of(module, fingerprint))}
    assert changed == (set() if attributes else {"noted", "more"})
    assert module.config.layers == (2 if attributes else 3)
    assert [name for name, _ in module.named_children()] == ["0", "1", "2"]
    assert all(torch.equal(now, was) for now, was in zip(module.parameters(), weights, strict=True))


def change(module):
    """Change all that can be changed, until the block ends."""
    with undoing() as undo:
        undo.keep_modes(module)
        undo.keep_flags(module)
        module.eval().requires_grad_(False)
        undo.set(module[1], "inplace", True)
        undo.set(module[1], "log", print)
        undo.set(module[0], "__class__", type("Other", (nn.Linear,), {}))
        for layer in module:
            undo.hook(layer.register_forward_hook, print)
        undo.keep(module)
        module[2][1] = nn.Linear(2, 2)
        module[2].register_forward_pre_hook(print)


class Instructions:
    """Counts the instructions of some files, or raises at one of them."""

    def __init__(self, at: int, *files: str) -> None:
        self.at, self.files, self.count = at, files, 0

    def enter(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.see

    def see(self, frame, event, arg):
        if event == "opcode":
            self.count += 1
            if self.count - 1 == self.at:
                raise Interrupt
        return self.see

    def run(self, module) -> None:
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            change(module)
        finally:
            sys.settrace(before)


def test_an_exception_at_any_instruction_is_undone():
    files = "_undo.py", "contextlib.py"
    counted = Instructions(-1, *files)
    counted.run(model())
    for at in random.Random(0).sample(range(counted.count), 100):
        module, alive = model(), []
        before = looked_at(module, alive)
        with pytest.raises(Interrupt):
            Instructions(at, *files).run(module)
        assert not differences(before, parts_of(module, fingerprint)), at
