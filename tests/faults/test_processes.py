"""Processes and loading workers that die, hang, differ or come twice: never silent, never for ever."""

import os
import signal
import time

import pytest
from harness import lines, same, step_of
from runs import resume, start, train

import mmpre as library
from mmpre.data.prefetch import LoadingError
from mmpre.processes.peers import PeerError, check_alike, first_cause
from mmpre.processes.processes import Processes
from mmpre.processes.stopping import HANG_EXIT
from mmpre.runs.lock import LockedError

HANG = 4.0


@pytest.mark.fault("E1", "D11", "I9")
def test_a_killed_process_ends_all_and_the_run_goes_on_alone_bit_for_bit(melodies, unbroken, tmp_path):
    run = tmp_path / "killed"
    with start(run, melodies, breaks="killed@7/1", processes=2) as tree:
        assert tree.until(lambda: step_of(run) >= 6)
        begun = time.monotonic()
        assert tree.wait(seconds=30) != 0
    assert time.monotonic() - begun < 20
    assert "rank 0 stopped because another process ended without a word" in tree.output
    resume(run)
    same(run, unbroken)


@pytest.mark.fault("E2")
def test_the_first_cause_is_what_every_process_tells(melodies, tmp_path):
    run = tmp_path / "raises"
    with start(run, melodies, breaks="raise@3/1", processes=2) as tree:
        assert tree.wait(seconds=60) != 0
    cause = "rank 1: ArithmeticError: broken on purpose at step 3"
    assert f"mmpre: rank 0 stopped because another process failed first. {cause}" in tree.output
    assert (run / "first-error.txt").read_text().startswith(cause)
    assert "Connection closed" not in tree.output


@pytest.mark.fault("E3")
def test_a_stopped_process_is_named_with_its_step_and_phase_and_ended(melodies, tmp_path):
    run = tmp_path / "stopped"
    with start(run, melodies, "--hang-seconds", HANG, breaks="stopped@6/1", processes=2) as tree:
        assert tree.until(lambda: step_of(run) >= 5)
        begun = time.monotonic()
        assert tree.wait(seconds=30) != 0
    assert time.monotonic() - begun < 2 * HANG + 10
    note = (run / "hang-rank0.txt").read_text()
    assert f"rank 0 gave no sign of life for {HANG:g} s in phase: " in note
    assert "rank 1 (process " in note
    assert "was in phase: forward and backward, step 6; SILENT for" in note
    assert "loop.py" in note  # where this one waits


@pytest.mark.slow
@pytest.mark.fault("E3")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_hangs_in_its_own_code_names_the_line(melodies, tmp_path, processes):
    run = tmp_path / "hangs"
    with start(run, melodies, "--hang-seconds", HANG, breaks=f"hangs@6/{processes - 1}", processes=processes) as tree:
        code = tree.wait(seconds=60)
    assert code == (HANG_EXIT if processes == 1 else 1)
    note = (run / f"hang-rank{processes - 1}.txt").read_text()
    assert "in phase: forward and backward, step 6" in note
    assert "broken.py" in note


@pytest.mark.slow
@pytest.mark.fault("E5")
def test_a_process_that_takes_another_path_ends_the_run_in_bounded_time(melodies, tmp_path):
    run = tmp_path / "path"
    with start(run, melodies, "--hang-seconds", HANG, breaks="other-path@6/1", processes=2) as tree:
        assert tree.wait(seconds=60) != 0
    assert step_of(run) <= 6
    assert "stopped because another process" in tree.output or "gave no sign of life" in tree.output


WORKERS = {
    "worker-killed": r"loading worker 0 \(process \d+\) was ended by signal 9 \(SIGKILL\), as when memory runs out, "
    r"while it made step 6, micro-batch 0, train-\d+\.tar: train\d+; look at that sample",
    "worker-exits": r"loading worker 0 \(process \d+\) ended by itself with exit code 0, while it made step 6, .*train",
    "worker-leaves": "loading worker, step 6, task pitch: SystemExit: 0",
    "unpicklable": "loading worker, step 6, task pitch: LocalError: cannot be pickled",
}


@pytest.mark.fault("E6", "E8", "E9")
@pytest.mark.parametrize("how", WORKERS)
def test_a_worker_that_ends_or_raises_anything_is_an_error_that_names_its_sample(melodies, tmp_path, how):
    with pytest.raises(LoadingError, match=WORKERS[how]):
        train(tmp_path / how, melodies, f"{how}@6", workers=1)
    resume(tmp_path / how, workers=1)
    assert step_of(tmp_path / how) == 23


@pytest.mark.fault("E7")
def test_a_stopped_worker_is_named_with_its_sample(melodies, tmp_path):
    run = tmp_path / "stopped"
    with start(run, melodies, "--hang-seconds", HANG, breaks="worker-stopped@6", workers=1) as tree:
        assert tree.wait(seconds=60) == HANG_EXIT
    note = (run / "hang-rank0.txt").read_text()
    assert "in phase: loading, step " in note  # of what the worker has not handed over yet
    assert "STOPPED) makes step 6, micro-batch 0, train-" in note


@pytest.mark.fault("E10", "E11", "D2")
def test_a_second_job_is_refused_and_processes_end_with_their_agent(melodies, unbroken, tmp_path):
    run = tmp_path / "twice"
    with start(run, melodies, breaks="slow@*", processes=2, workers=1) as tree:
        assert tree.until(lambda: step_of(run) >= 6), tree.output
        owner = next(pid for pid in tree.children() if tree.children(pid))
        with pytest.raises(LockedError, match=r"is being worked on: host .+, process \d+, since .+; stop that one"):
            library.resume(run)
        (run / "checkpoints" / ".tmp-7-left").mkdir()
        assert owner in tree.living()
        os.kill(tree.process.pid, signal.SIGKILL)
        tree.wait(seconds=20)  # fails if a process is left after ten seconds
    resume(run)
    assert not list((run / "checkpoints").glob(".*"))
    same(run, unbroken)


@pytest.mark.slow
def test_an_agents_end_before_the_first_step_ends_the_processes_too(melodies, tmp_path):
    run = tmp_path / "early"
    with start(run, melodies, breaks="slow-start@0", processes=2) as tree:
        assert tree.until(lambda: len(tree.children()) == 2)
        time.sleep(1.5)
        os.kill(tree.process.pid, signal.SIGKILL)
        tree.wait(seconds=20)


class Told(Processes):
    """Two processes, of which the second says what the test wants."""

    def __init__(self, second: object) -> None:
        super().__init__(0, 2)
        self.second = second

    def gather(self, mine: object) -> list:
        return [mine, {**mine, **self.second}]

    def barrier(self) -> None:
        pass


@pytest.mark.fault("E12")
def test_processes_that_differ_are_refused_with_what_differs():
    about = {"torch": "2.10.0", "recipe": "abc", "options": {"seed": 1}}
    check_alike(Told({}), about)
    with pytest.raises(PeerError, match=r'differ in their torch: rank 0 has "2.10.0", rank 1 has "2.9.0"; give every'):
        check_alike(Told({"torch": '"2.9.0"'}), about)


@pytest.mark.slow
@pytest.mark.fault("E12")
def test_processes_with_other_weights_are_refused_at_the_start(melodies, tmp_path):
    with start(tmp_path / "other", melodies, breaks="other-weights@0/1", processes=2) as tree:
        assert tree.wait(seconds=60) != 0
    assert "the processes of this run differ in their initial weights: rank 0 has" in tree.output


def test_an_error_of_ones_own_is_raised_as_it_is_and_written_down(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), first_cause(tmp_path, Told({})):
        raise RuntimeError("mine")
    assert (tmp_path / "first-error.txt").read_text().startswith("rank 0: RuntimeError: mine")


@pytest.mark.fault("E13")
def test_readers_that_draw_from_a_librarys_generator_draw_alike_in_every_shape(melodies, tmp_path):
    shapes = {name: train(tmp_path / name, melodies, "library-noise@*", workers=workers, steps=6, valid_every=6)
              for name, workers in (("none", 0), ("two", 2))}  # fmt: skip
    same(shapes["none"], shapes["two"])
    quiet = train(tmp_path / "quiet", melodies, steps=6, valid_every=6)
    assert lines(quiet)[0]["loss"] != lines(shapes["none"])[0]["loss"]


@pytest.mark.slow
@pytest.mark.fault("E14")
def test_a_slow_process_is_shown_and_changes_nothing(melodies, unbroken, tmp_path):
    from mmpre.runs.metrics import read_metrics

    run = tmp_path / "slow"
    with start(run, melodies, breaks="slow@*/1", processes=2) as tree:
        assert tree.wait(seconds=90) == 0, tree.output
    same(run, unbroken)
    times = [line["time"]["processes"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert all(slow["own"] >= 0.1 for _, slow in times)
