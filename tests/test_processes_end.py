"""Locks, signals, the watchdog, metrics and strict JSON."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from mmpre.processes.stopping import HANG_EXIT, Stopper
from mmpre.runs.lock import LockedError, RunLock
from mmpre.runs.metrics import MetricsWriter, read_metrics
from mmpre.strict_json import JSONError, parse, read

ENDING = """
import atexit, ctypes, logging, sys, threading, time
from mmpre.processes.stopping import end_at_once
# what a thread of C++ can do to a process whose interpreter is going down
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
logging.basicConfig(stream=sys.stdout, format="%(message)s")
atexit.register(print, "at exit")
def work():
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    logging.getLogger().warning("logged")
    print("printed", end=" ")
    {how}
end_at_once(work)
"""

GROUP = """
import os, torch
from mmpre.processes.processes import Processes
before = len(os.listdir("/proc/self/task"))
processes = Processes.start(60.0)
weight = torch.zeros(3, requires_grad=True)
processes.sum(weight.detach())
weight.sum().backward()
torch.optim.AdamW([weight]).step()
processes.stop()
print(len(os.listdir("/proc/self/task")) - before)
"""

HOLDER = """
import sys, time
from pathlib import Path
from mmpre.runs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    import os
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(30); os._exit(0)
    time.sleep(30)
"""


def holder(folder, *more):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.fault("E1")
@pytest.mark.parametrize(("how", "code"), [("pass", 0), ("sys.exit(2)", 2), ("raise KeyError('unforeseen')", 1)])
def test_a_process_of_a_group_ends_with_its_code_whatever_threads_would_do_to_its_end(how, code):
    program = ENDING.replace("{how}", how)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == ["logged", "printed", "thread", "at", "exit"]
    assert ("KeyError: 'unforeseen'" in done.stderr) == (code == 1)


@pytest.mark.fault("E1")
def test_no_thread_of_a_group_outlives_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP], env=os.environ | place | {"RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    assert [one.communicate(timeout=90)[0].split()[-1:] for one in both] == [["0"], ["0"]]


@pytest.mark.fault("E11")
def test_a_second_owner_is_refused_with_host_process_and_time(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(LockedError, match=rf"is being worked on: host .+, process {process.pid}, since \d{{4}}-"):
            RunLock(tmp_path).__enter__()
    finally:
        process.kill()
        process.wait()


def test_a_killed_owners_lock_is_free_even_while_its_forked_worker_lives(tmp_path):
    process = holder(tmp_path, "fork")
    time.sleep(0.2)
    process.kill()
    process.wait()
    for _ in range(2):
        with RunLock(tmp_path) as lock:
            assert f'"pid": {os.getpid()}' in lock.path.read_text()


def test_signals_are_remembered_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stopper() as stopper:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.stopping
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGTERM) is before


WORKER = """
import multiprocessing, os, sys, time
def work():
    from mmpre.processes.stopping import worker_init
    worker_init()
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=work).start()
    time.sleep(60)
"""


@pytest.mark.fault("E10", "I3")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_a_worker_ignores_sigterm_and_ends_with_its_parent():
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(worker, 0)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.02)
    assert not _alive(worker)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


HANG = """
import sys, time
from pathlib import Path
from mmpre.processes.stopping import Watchdog
with Watchdog(0.5, Path(sys.argv[1]), 3) as watchdog:
    watchdog.phase("held-out loss", 17)
    time.sleep(60)
"""


def test_the_watchdog_names_rank_phase_and_step_and_ends_the_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, timeout=20)
    assert done.returncode == HANG_EXIT
    note = (tmp_path / "hang-rank3.txt").read_text()
    assert re.search(r"rank 3 gave no sign of life for 0.5 s in phase: held-out loss, step 17", note)
    assert "time.sleep" in note or "line 7" in note


@pytest.mark.fault("I12")
def test_metrics_come_back_bit_for_bit_and_lose_only_what_was_cut_or_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    values = [0.1 + 0.2, 1e-300, math.pi, 5e-324]
    for step, value in enumerate(values):
        writer.write({"step": step, "loss": value})
    writer.write({"step": 4, "loss": math.nan, "norm": math.inf})
    assert [line["loss"] for line in read_metrics(path)] == [*values, "nan"]
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    writer.truncate_after(2)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, column 2"), ('{"a": 1, "a": 2}', "key 'a' stands twice"), ("[NaN]", "NaN is no JSON number"),
        ("[" * 5000, "nested more than 100 deep"), ("[" + "9" * 5000 + "]", "5000 digits"), (b"\xff", "not UTF-8"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
    ],
)  # fmt: skip
def test_bad_json_is_refused_with_a_reason(text, message):
    with pytest.raises(JSONError, match=message):
        parse(text)


def test_brackets_in_text_are_no_nesting_and_files_are_bounded_and_named(tmp_path):
    assert parse('["' + "[" * 500 + '\\"["]') == ["[" * 500 + '"[']
    (tmp_path / "a.json").write_text("[" + "1," * 1000 + "1]")
    with pytest.raises(JSONError, match=r"a.json: is longer than 100 bytes"):
        read(tmp_path / "a.json", max_bytes=100)
    with pytest.raises(JSONError, match=r"b.json: cannot be read \(No such file"):
        read(tmp_path / "b.json")
