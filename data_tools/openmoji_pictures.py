"""OpenMoji's pictures one by one, with their names, tags and groups.

Package `openmoji` (npm, CC-BY-SA-4.0: a picture that is shown carries the line "OpenMoji, openmoji.org, CC-BY-SA-4.0").
Flags, variants by skin tone, and what has no tags are left out. For collages of them see `collages`.
"""

import json
from pathlib import Path

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.openmoji import licence as licence
from mmpre.data_tools.packages import Npm, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.svg import draw_png
from mmpre.data_tools.writing import write_splits

description = "OpenMoji's pictures one by one, with names (English), tags and groups: 1,653 pictures"
size = "4.3 MB"
packages = (Npm("openmoji", "17.0.0", ("package/package.json", "package/data/openmoji.json", "package/color/svg/")),)
tasks = (
    EvalTask(kind="retrieval", about="a picture by its name, 160 in all", input="png", target="txt"),
    EvalTask(kind="classification", about="the group, 9 ways", input="png", target="json:group"),
    EvalTask(kind="classification", about="the subgroup", input="png", target="json:subgroup"),
)


def build(out: Path, *, source: Path | None = None, fetch: bool = False, side_px: int = 144) -> Path:
    """Write pictures `side_px` high and wide: `png` (see-through ground), `txt` (the name) and `json`."""
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        root = got[0].folder
        listed = json.loads((root / "data" / "openmoji.json").read_text(encoding="utf-8"))
        chosen = [one for one in listed if one["tags"] and not one["skintone"] and one["group"] != "flags"]

        def samples():
            for one in chosen:
                svg = (root / "color" / "svg" / f"{one['hexcode']}.svg").read_text(encoding="utf-8")
                about = {
                    "emoji": one["emoji"], "hexcode": one["hexcode"], "tags": one["tags"].split(", "),
                    "group": one["group"], "subgroup": one["subgroups"],
                }  # fmt: skip
                name = one["annotation"].lower()
                yield split_of(name), {"__key__": one["hexcode"], "png": draw_png(svg, side_px), "txt": name,
                                       "json": json.dumps(about, ensure_ascii=False)}  # fmt: skip

        counts = write_splits(aside, samples(), "openmoji", total=len(chosen))
        write_card(aside, name="openmoji", licence=licence, sources=got, counts=counts, tasks=tasks, side_px=side_px,
                   split_rule=f"by the name in lower case: {RULE}")  # fmt: skip
    return out
