"""A thing that can be shown and named: what collages are made of."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from PIL import Image

FAINT = 32  # of 255: more see-through than this is border


@dataclass(frozen=True)
class Concept:
    """A picture (RGBA, see-through around the thing shown), its English name and what kind of thing it is."""

    key: str
    name: str
    group: str
    image: Image.Image

    def about(self) -> dict[str, str]:
        return {"key": self.key, "name": self.name, "group": self.group}

    def trimmed(self) -> "Concept":
        """Without its see-through border, so that a box round the picture is a box round the thing."""
        solid = self.image.getchannel("A").point(lambda alpha: 255 if alpha > FAINT else 0)
        return replace(self, image=self.image.crop(solid.getbbox()))


def choose(concepts: Iterable[Concept], *, seen: int, unseen: int) -> tuple[list[Concept], list[Concept]]:
    """Take `seen` concepts for all splits and `unseen` further ones that training never shows.

    Groups take turns, each in the order of its names' hashes, so both lists are spread over the groups and a concept's
    place does not depend on the order of the package's files.
    """
    groups: dict[str, list[Concept]] = {}
    for concept in concepts:
        groups.setdefault(concept.group, []).append(concept)
    for members in groups.values():
        members.sort(key=lambda concept: hashlib.sha1(concept.name.encode()).hexdigest())
    ranked = [(place, group, concept) for group in sorted(groups) for place, concept in enumerate(groups[group])]
    ordered = [concept for _, _, concept in sorted(ranked, key=lambda one: one[:2])]
    if seen < 2 or unseen < 0 or seen + unseen > len(ordered):
        raise ValueError(
            f"collages: concepts must be at least 2, unseen at least 0, and both together at most the {len(ordered)} "
            f"that the source has; got {seen} and {unseen}"
        )
    return ordered[:seen], ordered[seen : seen + unseen]
