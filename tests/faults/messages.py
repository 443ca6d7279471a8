"""A plugin for pytest that notes the messages of errors and warnings that tests of faults meet, for line S24."""

import json
import os
from pathlib import Path

import pytest

_now: dict[str, list[str]] = {"faults": [], "messages": []}


def _note(message: str) -> None:
    if _now["faults"]:
        _now["messages"].append(message)


def pytest_configure(config: pytest.Config) -> None:
    kind = type(pytest.raises(ValueError))
    leave = kind.__exit__

    def noting(self, exc_type, exc, traceback):
        if exc is not None:
            _note(str(exc))
        return leave(self, exc_type, exc, traceback)

    kind.__exit__ = noting


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    _now["faults"] = [fault for mark in item.iter_markers("fault") for fault in mark.args]
    _now["messages"] = []
    try:
        return (yield)
    finally:
        with Path(os.environ["MESSAGES"]).open("a") as file:
            for message in _now["messages"]:
                file.write(json.dumps({"faults": _now["faults"], "message": message}) + "\n")
