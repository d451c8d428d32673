from __future__ import annotations

from fasc_lightning._utils import FreedMemory, _memory


def test_freed_memory_is_returned_once_enough_has_come_together(monkeypatch):
    returned = []
    monkeypatch.setattr(_memory, "return_freed_memory", lambda: returned.append(1))
    freed, after = FreedMemory(every=100), []
    for size in (60, 30, 10, 99, 1, 500):
        freed.add(size)
        after.append(len(returned))
    assert after == [0, 0, 1, 1, 2, 3]
