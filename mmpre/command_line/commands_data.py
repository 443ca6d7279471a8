"""What each command of `mmpre data` does. Heavy imports stand inside the functions."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from mmpre.command_line.shared import Command, Paths, as_json
from mmpre.plugins import PluginError, find_data_set, find_modality, names


def data_list(rest: list[str]) -> None:
    def show(json: bool = False) -> None:
        """The data sets that mmpre can build: what is in them, their licences, how they come, what they are good for.

        Args:
            json: Print JSON for programs.
        """
        from mmpre.data.listing import known_sets, tell

        sets, bad = known_sets()
        if json:
            print(as_json({"data sets": sets, "disabled": bad}))
            return
        tell(sets, bad)

    tyro.cli(show, args=rest, prog="mmpre data list")


def build(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        print(f"usage: mmpre data build NAME --out DIR ...\n\nNAME is one of {', '.join(names('data set'))}.")
        if not rest or rest[0] not in ("-h", "--help"):
            sys.exit(2)
        return
    module = find_data_set(rest[0])
    prog = f"mmpre data build {rest[0]}"
    print(tyro.cli(module.build, args=rest[1:], prog=prog, description=module.__doc__))


def pack(rest: list[str]) -> None:
    from mmpre.data.pack import pack_files

    tyro.cli(pack_files, args=rest, prog="mmpre data pack")


def index(rest: list[str]) -> None:
    def go(shards: Paths, verify: bool = False, json: bool = False) -> None:
        """Read shards once, keep their index beside them, and say what is wrong with them.

        Args:
            shards: Paths, folders, globs, or patterns such as a-{000..009}.tar.
            verify: Read again what was indexed before, and end with an error that lists the shards that changed since.
            json: Print JSON for programs.
        """
        from mmpre.data.index import open_shards
        from mmpre.data.shards import ShardReader
        from mmpre.data.tar import printable

        opened = open_shards(list(shards))
        if verify:
            ShardReader(opened).verify()
        told = {"shards": len(opened.indexes), "samples": len(opened), "fingerprint": opened.fingerprint,
                "problems": opened.problems()}  # fmt: skip
        if json:
            print(as_json(told))
            return
        print(f"{told['samples']} samples in {told['shards']} shards, fingerprint {told['fingerprint'][:16]}")
        for shard, causes in told["problems"].items():
            print(f"  {printable(shard)}: " + ", ".join(f"{cause} {count}" for cause, count in causes.items()))

    tyro.cli(go, args=rest, prog="mmpre data index")


def inspect(rest: list[str]) -> None:
    def go(
        shards: Paths, samples: int = 3, json: bool = False, modality: str | None = None,
        mask: str = "RandomTokens(rate=0.15)", sidecar: Path | None = None, picture: Path = Path("hidden.png"),
    ) -> None:  # fmt: skip
        """What is in some shards: counts, members, sizes, and the first samples; or a picture of what a mask hides.

        Args:
            shards: Paths, folders, globs, or patterns such as a-{000..009}.tar.
            samples: How many samples to show.
            json: Print JSON for programs.
            modality: Draw what a mask hides of the samples, read as this modality (a name, or the path of its file).
            mask: As recipes write it, such as "StartedSpans(chance=0.1, length=10)".
            sidecar: Folder of what was derived of the samples, such as regions.
            picture: The PNG to write.
        """
        if modality:
            from mmpre.data.hidden import draw_hidden

            module = find_modality(modality)
            told = draw_hidden(list(shards), module, picture, mask=mask, samples=samples, sidecar=sidecar)
            print(as_json(told) if json else told["picture"])
            return
        from mmpre.data.inspection import inspect_shards, show

        told = inspect_shards(list(shards), samples)
        print(as_json(told)) if json else show(told)

    tyro.cli(go, args=rest, prog="mmpre data inspect")


def derive(rest: list[str]) -> None:
    def go(
        shards: Paths, out: Path, by: Path, suffix: str = "derived.safetensors", batch: int = 32,
        layer: int | None = None, pool: str = "mean", roles: tuple[str, ...] = (), features: bool = False,
        centres: Path | None = None, fit: int | None = None, best: bool = False, max_holes: float = 0.05,
    ) -> None:  # fmt: skip
        """Compute once what a frozen network makes of each sample, into a sidecar beside the shards.

        Run it again after a kill, or several times at once: shards that are whole are kept, the others are shared.

        Args:
            shards: Paths, folders, globs, urls, or patterns such as a-{000..009}.tar.
            out: Folder of the sidecar; a recipe's --sidecar names it.
            by: A .py file that defines derive(samples) -> a mapping of names to tensors for each, or a run's folder.
            suffix: Of the members that are written, safetensors.
            batch: Samples at once.
            layer: Of a run's encoder, 0 for what comes in; by default the network's result.
            pool: Of a run's states: mean over a row's tokens, or none for all of them.
            roles: Of a run's network; by default all.
            features: Take the modality's clean features (pixels of patches, say) in place of a run's states.
            centres: File of k-means centres; what is written is the number of each token's nearest one.
            fit: First find so many centres of these shards (the training ones), and write that file.
            best: Use the run's weights with the best held-out loss, not the newest.
            max_holes: Share of unusable samples of a shard past which it stops.
        """
        from mmpre.data.derive import DeriveError
        from mmpre.data.derive import derive as derive_shards
        from mmpre.derivers import fit_centres, from_file, from_run

        if by.suffix == ".py":
            deriver = from_file(by)
        else:
            read = {"layer": layer, "roles": roles, "features": features, "best": best}
            if fit is not None:
                if centres is None:
                    raise DeriveError("derive: --fit needs --centres, the file that the centres are written to")
                fit_centres(by, list(shards), fit, centres, **read)
            deriver = from_run(by, pool=pool, centres=centres, **read)
        print(derive_shards(list(shards), out, deriver, suffix=suffix, batch=batch, max_holes=max_holes))

    tyro.cli(go, args=rest, prog="mmpre data derive")


def cache(rest: list[str]) -> None:
    def go(clear: bool = False, json: bool = False) -> None:
        """The shards that were fetched from elsewhere. MMPRE_CACHE names another folder, MMPRE_CACHE_GB a limit.

        Args:
            clear: Remove them all; not while a run reads them.
            json: Print JSON for programs.
        """
        from mmpre.data import remote

        if clear:
            print(f"{remote.clear():,} bytes removed from {remote.Remote().root}")
            return
        found = remote.entries()
        if json:
            print(as_json(found))
            return
        for one in found:
            print(f"{one['size']:>15,} bytes  {one['url']}")
        print(f"{len(found)} shards, {sum(one['size'] for one in found):,} bytes in {remote.Remote().root}")

    tyro.cli(go, args=rest, prog="mmpre data cache")


def tokenizer(rest: list[str]) -> None:
    def go(
        shards: Paths, out: Path,
        kind: Annotated[str, tyro.conf.arg(help="wordpiece, bpe, unigram or letters (no words: DNA)")] = "wordpiece",
        vocab: int = 16_000, suffix: str = "txt", lowercase: bool = True, modality: str | None = None,
    ) -> None:  # fmt: skip
        """Train a tokenizer on the texts of some shards.

        Args:
            shards: Paths, folders, globs, or patterns.
            out: The tokenizer.json to write.
            vocab: Number of pieces at most.
            suffix: The members that hold the texts.
            lowercase: Make all texts lower case.
            modality: One that says what its texts are, such as dna, or the path of its file; in place of a suffix.
        """
        from mmpre.data.tokenizer import train_tokenizer

        corpus = getattr(find_modality(modality), "corpus", None) if modality else None
        if modality and corpus is None:
            raise PluginError(f"modality {modality} does not say what its texts are (corpus); name --suffix instead")
        made = train_tokenizer(
            list(shards), out, kind=kind, vocab=vocab, suffix=suffix, lowercase=lowercase, corpus=corpus
        )
        print(made)

    tyro.cli(go, args=rest, prog="mmpre data tokenizer")


DATA: dict[str, Command] = {
    "list": data_list, "build": build, "pack": pack, "index": index, "inspect": inspect, "tokenizer": tokenizer,
    "derive": derive, "cache": cache,
}  # fmt: skip
