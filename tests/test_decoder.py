"""Decoders in a process of their own: whatever they do costs the file alone, and moves no other."""

import os
import pickle

import fake_decoders
import numpy as np
import pytest

from mmpre.data.decoder import Decoder
from mmpre.data.sample import BadMember

WAY_OUT = "; leave the file out, or write it again"


@pytest.fixture
def decoder():
    made = Decoder(fake_decoders.decode, seconds=1.0, max_bytes=256 << 20, recycle_bytes=128 << 20)
    yield made
    made.close()


def cause(decoder, data, **settings):
    with pytest.raises(BadMember) as caught:
        decoder(data, "mp4", **settings)
    assert caught.value.member == "mp4" and caught.value.detail
    return caught.value.cause, caught.value.detail


def test_arrays_come_back_as_they_are_and_prints_do_not_disturb(decoder):
    made = decoder(b"two", "mp4", scale=3)
    assert {name: one.tolist() for name, one in made.items()} == {
        "frames": [[0, 3, 6], [9, 12, 15]],
        "times": [0.5, 1.5],
    }
    large = os.urandom(3 << 20)
    assert decoder(b"x " + large, "mp4")[""].tobytes() == large
    assert decoder(b"print abc", "mp4")[""].tobytes() == b"abc"
    assert decoder.started == 1


@pytest.mark.fault("B9", "B10")
def test_a_decoder_that_hangs_or_crashes_costs_its_file_and_the_next_is_read(decoder):
    assert cause(decoder, b"hang") == ("decoder hangs", "the decoder gave no answer within 1 s" + WAY_OUT)
    assert decoder(b"x ab", "mp4")[""].tobytes() == b"ab"
    assert cause(decoder, b"segfault") == ("decoder crashed", "the decoder ended with signal SIGSEGV" + WAY_OUT)
    assert cause(decoder, b"exit") == ("decoder crashed", "the decoder ended with exit code 0" + WAY_OUT)
    assert decoder(b"x cd", "mp4")[""].tobytes() == b"cd"
    assert cause(decoder, b"raise") == ("cannot be decoded", "ValueError: no such codec")
    assert cause(decoder, b"pickle")[0] == "cannot be decoded"


@pytest.mark.fault("B10")
def test_only_what_fails_twice_is_the_files_fault(tmp_path):
    decoder = Decoder(fake_decoders.once)
    assert decoder(b"", "mp4", flag=str(tmp_path / "flag"))[""].tolist() == [7]
    assert decoder.started == 2
    decoder.close()


@pytest.mark.fault("B11")
def test_memory_has_a_limit_and_a_leak_is_thrown_away_between_files(decoder):
    assert cause(decoder, b"bomb") == (
        "decoder out of memory",
        "the decoder wanted more than 268,435,456 bytes of memory",
    )
    assert cause(decoder, b"grow")[0] == "decoder out of memory"
    before = decoder.started
    for i in range(30):
        assert decoder(b"leak %02d" % i, "mp4")[""].tobytes() == b"%02d" % i
    assert before < decoder.started <= before + 6


def test_no_child_outlives_its_decoder_and_pickling_leaves_it_behind(decoder):
    decoder(b"x a", "mp4")
    pid = decoder._child.pid
    other = pickle.loads(pickle.dumps(decoder))
    assert other._child is None and decoder._child.pid == pid
    decoder.close()
    assert not os.path.exists(f"/proc/{pid}")


def test_what_another_process_could_not_find_and_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="must stand at the top of its module"):
        Decoder(lambda data: np.zeros(1))
    with pytest.raises(ValueError, match="seconds must be above 0"):
        Decoder(fake_decoders.decode, seconds=0)
