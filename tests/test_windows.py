"""Windows, as far as another system can show it: no import needs a module or a function that it lacks."""

from __future__ import annotations

import re

from processes import run_script


def test_every_module_imports_without_posix():
    found = re.search(r"imported (\d+) modules", run_script("no_posix.py"))
    assert found is not None
    assert int(found[1]) > 150
