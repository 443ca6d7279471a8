"""The command line. Nothing heavy is imported before it is known what is asked for."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from mmpre.foreseen import foreseen, told

HELP = """\
mmpre: pretrain an encoder on unlabelled data of any modality

  mmpre list                         recipes, modalities and data sets that are installed
  mmpre plan RECIPE                  parameters, FLOPs, memory (and time, for a device's --flops), with no data
  mmpre train RECIPE [--scale tiny]  pretrain; RECIPE is a name or a .py file; RECIPE --help lists its numbers
  mmpre resume RUN                   go on with a run that was stopped or killed
  mmpre replay RUN --step N          do a step again and compare it with the log
  mmpre import FOLDER RECIPE         begin with the weights of a model of transformers or timm
  mmpre eval RUN                     what it learned, on held-out data, beside the same network untrained
  mmpre claim RECIPE                 a paper's comparison, made again over seeds, with a verdict
  mmpre report RUN [RUN ...]         one page: curves, numbers, and what it makes of hidden words, patches, sounds
  mmpre embed RUN --data SHARD ...   features of every row, with their keys, as safetensors or Parquet
  mmpre export RUN --out DIR         a folder that transformers loads, compared before it gets its name
  mmpre demo                         image-text pretraining on OpenMoji collages, from pictures to numbers

  mmpre data list                    the data sets that mmpre can build, and what they are good for
  mmpre data build NAME --out DIR    make the shards of a known data set
  mmpre data pack SOURCE --out DIR   make shards of your own files: a folder, CSV, JSONL or Parquet
  mmpre data index SHARD ...         read shards once and say what is wrong with them
  mmpre data inspect SHARD ...       what is in them; --modality NAME: a picture of what a mask hides of them
  mmpre data derive SHARD ...        what a frozen network makes of them, once, into a sidecar
  mmpre data cache                   shards that were fetched from urls; --clear removes them
  mmpre data tokenizer SHARD ...     train a tokenizer on their texts

  mmpre bench [NAME ...]             speed, side by side with what people use
  mmpre new-modality NAME            a modality of your own to start from, in one file, with its test

Every command answers --help. Problems end with exit code 2, and nothing that was done is lost."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a problem that we foresee is told in a few lines, without a traceback, with exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from mmpre.processes.stopping import end_at_once

        end_at_once(lambda: _do(words))
    _do(words)


def _do(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        return foreseen(lambda: print(HELP))
    if words[0] == "--version":
        from importlib.metadata import version

        return foreseen(lambda: print(version("mmpre")))
    from mmpre.processes.stopping import UNDER_AGENT, die_with_parent

    if UNDER_AGENT in os.environ:
        die_with_parent()  # before anything can take long
    logging.basicConfig(stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable())
    logging.getLogger("mmpre").setLevel(logging.INFO)

    def work() -> int | None:
        command, rest = _command(words)
        return command(rest)

    foreseen(work)


class _Printable(logging.Formatter):
    """Log lines as they are, but for what could speak to the terminal: a shard's key may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return told(super().format(record))


def _command(words: list[str]) -> tuple[Callable[[list[str]], int | None], list[str]]:
    if words[0] == "data":
        from mmpre.command_line import commands_data

        table = commands_data.DATA
        words = words[1:] or ["--help"]
        if words[0] in ("-h", "--help"):
            return (lambda rest: print(HELP)), []
    else:
        from mmpre.command_line import commands

        table = commands.TOP
    if words[0] not in table:
        from difflib import get_close_matches

        near = get_close_matches(words[0], table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(table)}"
        raise ValueError(f"there is no command {words[0]!r}{hint}")
    return table[words[0]], words[1:]
