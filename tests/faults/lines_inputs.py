"""Lines of the scoreboard about what comes from outside: random changes of inputs and files, probes that run code, and
what the messages say."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lines import Figure, line
from mutants import of_bytes, of_json, of_words
from PIL import Image
from tones_run import short_run

HERE = Path(__file__).parent
SLOW_SECONDS = 2.0
INPUT_BYTES, MEDIA_BYTES = 300 << 20, 512 << 20


def in_child(work: Callable[[Path, Any], None], folder: Path, argument: Any = None) -> dict[str, Any]:
    """What a function notes down in a process of its own, which it may take with it."""
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(work.__name__, folder, argument))
    process.start()
    process.join()
    path = folder / "told.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    return told | {"exit": process.exitcode}


def _child(name: str, folder: Path, argument: Any) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stderr = open(os.devnull, "w")
    globals()[name](folder, argument)


class Tally:
    """Counts what came of inputs: tracebacks, slow ones, memory."""

    def __init__(self, folder: Path) -> None:
        self.path, self.before = folder / "told.json", None
        self.counts = {"tried": 0, "refused": 0, "tracebacks": 0, "slow": 0, "bytes": 0}
        self.examples: list[str] = []

    def take(self, call: Callable[[], Any], expected: type[Exception], about: object) -> None:
        if self.before is None:
            self.before = _most_bytes()
        begun = time.perf_counter()
        try:
            call()
        except expected:
            self.counts["refused"] += 1
        except BaseException as e:
            self.counts["tracebacks"] += 1
            self.examples.append(f"{type(e).__name__}: {e} of {about!r:.300}")
        seconds = time.perf_counter() - begun
        self.counts["tried"] += 1
        if seconds > SLOW_SECONDS:
            self.counts["slow"] += 1
            self.examples.append(f"{seconds:.1f} s: {about!r:.300}")
        self.counts["bytes"] = _most_bytes() - self.before

    def close(self) -> None:
        self.path.write_text(json.dumps(self.counts | {"examples": self.examples[:20]}))


def _most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# ---- S11: records, sidecars, the command line ----

HAND_MADE = ["", *"""
train|train bert --lr|train bert --lr=|train bert --lr abc|train bert --lr 1e-4x|train bert --lr nan
train bert --lr inf|train bert --lr -1|train bert --lr 0|train bert --width 0|train bert --width -4
train bert --width 1.5|train bert --heads 0|train bert --heads 5|train bert --depth -1|train bert --batch 0
train bert --batch 99999999999999999999|train bert --steps 1e3|train bert --steps 0|train bert --hide 1.5
train bert --hide nan|train bert --dropout 2|train bert --length 0|train bert --clip 0|train bert --warmup -3
train bert --warmup 9999999|train bert --seed 1e99|train bert --precision fp8|train bert --workers -1
train bert --max-holes 2|train bert --hang-seconds nan|train bert --keep 0|train bert --micro-batches 0
train bert --exact maybe|train bert --lerning-rate 3|train bert --scale|train bert --scale huge|train brt
train nowhere.py|train ./|train bert --tokenizer|train bert --tokenizer nowhere.json
train bert --tokenizer /etc/passwd|train bert --out|resume|resume nowhere|resume /etc/passwd|resume . --width 3
eval nowhere|eval . --rows x|data|data idnex|data index|data index nowhere.tar|data index pipe:ls
data index ftp9://a:b@c/d.tar|data inspect ''|data pack nowhere --out x
data tokenizer nowhere.tar --out t --vocab -1|bench nowhere
""".strip().replace("\n", "|").split("|")]  # fmt: skip


def mutate_inputs(folder: Path, argument: Any) -> None:
    import mmpre
    import mmpre.runs.run as run_module
    from mmpre.command_line.cli import main
    from mmpre.data.index import ShardError
    from mmpre.data.shards import _read_record

    tally, dice = Tally(folder), random.Random(11)
    record = json.loads((folder / "run" / "run.json").read_text())
    sidecar = {"format": 1, "shards": {"a.tar": "0" * 64}, "holes": {"a.tar": ["k1", "k2"]}}
    mmpre.load(folder / "run")
    for _ in range(2000):
        data = of_json(record, dice)
        (folder / "run" / "run.json").write_bytes(data)
        tally.take(lambda: mmpre.load(folder / "run"), ValueError, data)
    for _ in range(1000):
        data = of_json(sidecar, dice)
        (folder / "sidecar.json").write_bytes(data)
        tally.take(lambda: _read_record(folder), ShardError, data)

    def build_only(out, record, found, options, *, fresh):
        with torch.device("meta"):  # numbers that ask for much memory are no fault
            run_module.build(found, record["numbers"], options.seed)

    run_module._carry_out = build_only
    words = ["train", "bert", "--scale", "tiny", "--data", "a.tar", "--lr", "1e-3", "--steps", "300", "--width", "32",
             "--depth", "1", "--heads", "2", "--out", "new", "--workers", "0"]  # fmt: skip
    _quietly(main, words)  # what is imported once is not an input's time
    lines = [of_words(words, dice) for _ in range(2000)] + [one.split() for one in HAND_MADE]
    for one in lines:
        tally.take(lambda one=one: _quietly(main, one), _Ended, one)
    tally.counts["hand made"] = len(HAND_MADE)
    tally.close()


class _Ended(Exception):
    """The command line ended with exit code 2 and a message."""


def _quietly(main: Callable[[list[str]], None], words: list[str]) -> None:
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            main(words)
    except SystemExit as e:
        if e.code not in (0, None) and (e.code != 2 or not told.getvalue().strip() or "Traceback" in told.getvalue()):
            raise RuntimeError(f"exit code {e.code}: {told.getvalue()[-300:]}") from None
        if e.code:
            raise _Ended from None


@line("S11")
def mutants_of_inputs(folder: Path) -> Figure:
    short_run(folder)
    told = in_child(mutate_inputs, folder)
    shown = f"{told.get('tracebacks')} / {int(told['exit'] < 0)} / {told.get('slow')} / {told.get('bytes', 0) >> 20} MB"
    good = told["exit"] == 0 and not told["tracebacks"] and not told["slow"] and told["bytes"] < INPUT_BYTES
    return Figure(f"{shown} of {told.get('tried', 0):,}", good, told)


# ---- S12: media ----


def media() -> dict[str, list[tuple[str, bytes]]]:
    """Files of each modality, with their suffixes."""
    import clips
    import safetensors.numpy
    import soundfile

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pictures = []
    for suffix, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP")):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        pictures.append((suffix, buffer.getvalue()))
    soft = rng.random((4, 7), dtype=np.float32)
    boxes = np.tile(np.float32([0, 0, 1, 1, 1, 1, 1]), (4, 1))
    regions = {"features": rng.random((4, 8), dtype=np.float32), "boxes": boxes}
    regions["soft"] = soft / soft.sum(1, keepdims=True)
    film = clips.frames(12)
    sounds = []
    for suffix, kind in (("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG")):
        buffer = io.BytesIO()
        soundfile.write(buffer, rng.normal(0, 0.1, 8000), 16_000, format=kind)
        sounds.append((suffix, buffer.getvalue()))
    return {
        "text": [("txt", "A picture of a caf\u00e9, \u00fcber alles; \N{GRINNING FACE}.".encode() * 4)],
        "pictures": pictures,
        "regions": [("regions.safetensors", safetensors.numpy.save(regions))],
        "sound": sounds,
        "video": [(suffix, clips.film(film, suffix)) for suffix in clips.CODECS]
        + [(suffix, clips.animation(film, suffix)) for suffix in ("webp", "gif")],
    }


def mutate_media(folder: Path, modality: str) -> None:
    from mmpre.data.contract import check_tokens
    from mmpre.data.sample import BadMember, Sample
    from mmpre.data.video import Evenly, Video
    from mmpre.draw import Draw
    from mmpre.modalities.image_patches import ImageReader
    from mmpre.modalities.regions import RegionReader
    from mmpre.modalities.speech import FbankReader
    from mmpre.modalities.text import TextReader
    from mmpre.modalities.video import VideoReader

    reader = {"text": lambda: TextReader("bytes"), "pictures": lambda: ImageReader(patch_px=8),
              "regions": lambda: RegionReader(8, 7), "sound": lambda: FbankReader(),
              "video": lambda: VideoReader(Video(sampling=Evenly(4)))}[modality]()  # fmt: skip
    files, tally, dice = media()[modality], Tally(folder), random.Random(12)
    draw = Draw.row(0, 0, 0, epoch=0, unit=0)

    def read(suffix: str, data: bytes) -> None:
        sample = Sample("k", "a.tar", "digest", {suffix: data})
        if hasattr(reader, "windows"):
            reader.windows(sample)
        check_tokens(reader.tokenize(sample, draw), modality, reader, sample)

    for suffix, data in files:
        read(suffix, data)  # whole files are read
    for i in range(2000):
        suffix, data = files[i % len(files)]
        broken = of_bytes(data, dice)
        tally.take(lambda suffix=suffix, broken=broken: read(suffix, broken), BadMember, (suffix, i))
    tally.close()


@line("S12")
def mutants_of_media(folder: Path) -> Figure:
    told = {}
    for modality in media():
        (folder / modality).mkdir()
        told[modality] = in_child(mutate_media, folder / modality, modality)
    ended = sum(one.get("tracebacks", 0) + (one["exit"] != 0) for one in told.values())
    most = max(one.get("bytes", 0) for one in told.values())
    over = sum(one.get("bytes", 0) > MEDIA_BYTES for one in told.values())
    shown = f"{ended} / {over} (at most {most >> 20} MB more); 2,000 each of {', '.join(told)}"
    return Figure(shown, not ended and not over, told)


# ---- S13 and S24: by the tests themselves ----


def _tests(folder: Path, *words: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words], cwd=HERE.parent.parent, text=True,
        capture_output=True, timeout=800,
        env=os.environ | {"PYTHONPATH": str(HERE), "MESSAGES": str(folder / "messages")},
    )  # fmt: skip
    return done.stdout, done.returncode


@line("S13")
def probes_that_run_code(folder: Path) -> Figure:
    """The tests of section G and D13 plant payloads; each fails where a marker file is found afterwards."""
    names = "url_runs or pickled or cannot_name or put_beside or import_path or lead_out_of_its_folder"
    out, code = _tests(folder, "tests/test_security.py", "tests/test_checkpoint.py", "-k", names)
    passed = int(re.search(r"(\d+) passed", out)[1]) if " passed" in out else 0
    failed = int(re.search(r"(\d+) failed", out)[1]) if " failed" in out else 0
    return Figure(
        f"{failed} of {passed + failed} probes", code == 0 and passed >= 15, {"passed": passed, "told": out[-500:]}
    )


NAMES = re.compile(r"""['"`][^'"`]+['"`]|[\w./-]+\.(tar|json|jsonl|py|safetensors|idx|npz)\b|\b\w+\.\w+\b|\b\d""")
STEP = re.compile(
    r"\b(add|allow|at most|check|continue|convert|copy|did you mean|download|give|go on|index|install|leave|look|lower|"
    r"make|mend|must|move|name|put|raise|remove|resume|save|set|shorten|shrink|split|start|stop|there are|unpack|"
    r"uninstall|use|wanted|write)\b"
)


@line("S24")
def messages(folder: Path) -> Figure:
    """Of the faults whose tests meet an error: how many of them name what is broken and say what to do."""
    files = [str(path) for path in (HERE.parent).glob("test_*.py") if "mark.fault" in path.read_text()]
    out, _ = _tests(folder, *files, "-m", "not slow", "-p", "messages", "--timeout=120")
    told: dict[str, list[str]] = {}
    for text in (folder / "messages").read_text().splitlines():
        one = json.loads(text)
        for fault in one["faults"]:
            told.setdefault(fault, []).append(one["message"])
    good = {fault for fault, some in told.items() if any(NAMES.search(one) and STEP.search(one) for one in some)}
    bad = {fault: some[:3] for fault, some in told.items() if fault not in good}
    share = len(good) / len(told)
    ends = [text for text in out.splitlines() if text.startswith("FAILED") or " passed" in text]
    numbers = {"faults": len(told), "good": len(good), "others": bad, "tests": ends}
    return Figure(f"{share:.0%} ({len(good)} of {len(told)} faults that end in an error)", share >= 0.95, numbers)
