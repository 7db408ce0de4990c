# SPDX-License-Identifier: Apache-2.0
"""Slot-value tables and phrases of the synthetic corpora.

Two domains that differ in the ways fine-tuning has to bridge. `restaurants` is the base: mostly plain, now and then
chatty. `hotels` is held out: other values everywhere, two slots the base has never seen, and a style of its own, always
speaking to the reader. What carries over is what a pretrained model would bring along: copying values out of the
context (names are composed, so hardly any is seen twice), everyday adjectives, ways to say where something is.

Sentences are put together from phrases chosen at random and end in a telephone number that is not in the context, so
even a perfect model has a loss well above zero, as on real text. Everything is short, because the quickstart's model
reads bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_BYTES = 126
"""Of a context and its sentence together; longer ones are drawn again."""

_FIRST = (
    *("Red", "Blue", "Green", "Golden", "Silver", "Old", "New", "Little", "Grand", "Quiet", "Happy", "Royal", "Casa"),
    *(
        "Hidden",
        "Bright",
        "Sunny",
        "Wild",
        "Sweet",
        "Amber",
        "Cosy",
        "Ivy",
        "Stone",
        "North",
        "South",
        "Monte",
        "Villa",
    ),
)
_SECOND = (
    *("Mill", "Oak", "Owl", "Rye", "Fig", "Duck", "Goose", "Gate", "Tree", "Cup", "Hen", "Elk", "Star", "Fox", "Lion"),
    *("Harp", "Lark", "Moon", "Barn", "Court", "Manor", "Cabin", "Fiore", "Marina"),
)
_SYLLABLES = (
    *("ba", "be", "bo", "ca", "co", "da", "de", "di", "do", "fa", "ka", "ki", "la", "le", "li", "lo", "lu", "ma", "me"),
    *("mi", "mo", "na", "ne", "ni", "no", "pa", "pe", "ra", "re", "ri", "ro", "sa", "se", "si", "so", "ta", "te", "ti"),
)
_ADJECTIVES = (
    *("warm", "quiet", "bright", "lively", "cosy", "sunny", "modern", "rustic", "friendly", "famous", "homely", "tiny"),
    *("charming", "stylish", "grand", "peaceful", "spotless", "colourful", "polished", "calm", "festive", "splendid"),
)
_NOUNS = ("place", "spot", "home", "retreat", "house", "corner", "favourite", "hideaway")
_PLAIN = (
    *("{name} is a {adjective} {noun}", "{name} is the {adjective} {noun}", "Here is {name}, a {adjective} {noun}"),
    *(
        "There is {name}, a {adjective} {noun}",
        "One {adjective} {noun} is {name}",
        "We know {name}, a {adjective} {noun}",
    ),
)
_CHATTY = (
    *("You will love {name}, your {adjective} {noun}", "Treat yourself to {name}, your {adjective} {noun}"),
    *("Come to {name}, your {adjective} {noun}", "Enjoy {name}, your {adjective} {noun}"),
    *("Dream on at {name}, your {adjective} {noun}", "Say hello to {name}, your {adjective} {noun}"),
)
_WHERE = ("near the {area}", "by the {area}", "close to the {area}", "beside the {area}", "facing the {area}")


class Draws:
    """An endless stream of choices that is a function of its key alone, on every machine and Python version."""

    def __init__(self, *key: object) -> None:
        self._key, self._count = "/".join(map(str, key)), 0

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        self._count += 1
        digest = hashlib.sha256(f"{self._key}/{self._count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % n

    def pick(self, options: Sequence[str]) -> str:
        """One of the options."""
        return options[self.below(len(options))]

    def order(self, items: Sequence[str]) -> list[str]:
        """The items, shuffled."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]


@dataclass(frozen=True)
class Domain:
    """A closed vocabulary per slot beside the name, phrases per slot, and how often the style is chatty."""

    values: Mapping[str, Sequence[str]]
    phrases: Mapping[str, Sequence[str]]
    chatty_percent: int

    def meaning(self, draws: Draws) -> dict[str, str]:
        """A name and one or two other slots (two in three of four cases), in table order."""
        name = _name(draws)
        chosen = set(draws.order(list(self.values))[: 1 if draws.below(4) == 0 else 2])
        return {"name": name, **{slot: draws.pick(self.values[slot]) for slot in self.values if slot in chosen}}

    def sentence(self, meaning: Mapping[str, str], draws: Draws) -> str:
        """A sentence that expresses exactly the slots of `meaning`, and a telephone number."""
        chatty = draws.below(100) < self.chatty_percent
        opening = draws.pick(_CHATTY if chatty else _PLAIN)
        words = {"adjective": draws.pick(_ADJECTIVES), "noun": draws.pick(_NOUNS)}
        slots = draws.order([slot for slot in meaning if slot != "name"])
        pieces = [opening, *(draws.pick(self.phrases[slot]) for slot in slots)]
        end = "!" if chatty else "."
        number = " ".join(f"{draws.below(100):02d}" for _ in range(3))
        return " ".join(pieces).format(**meaning, **words) + f"{end} Call {number}{end}"


def _name(draws: Draws) -> str:
    """Two words, or a made-up one, with or without an article; tens of thousands in all."""
    form = draws.below(10)
    if form < 5:
        return f"{draws.pick(_FIRST)} {draws.pick(_SECOND)}"
    made = "".join(draws.pick(_SYLLABLES) for _ in range(2 + draws.below(2))).capitalize()
    return made if form < 8 else f"The {made}"


DOMAINS: dict[str, Domain] = {
    "restaurants": Domain(
        values={
            "food": (
                *("Thai", "Polish", "French", "Greek", "Turkish", "Spanish", "Mexican"),
                *("Korean", "Indian", "Cuban", "Danish", "Irish", "Persian", "Swiss"),
            ),
            "area": ("canal", "park", "port", "bridge", "market", "tower", "station", "church", "square", "museum"),
            "price": ("low", "fair", "high"),
        },
        phrases={
            "food": ("serving {food} food", "with {food} food", "for {food} food", "known for {food} dishes"),
            "area": _WHERE,
            "price": ("at {price} prices", "with {price} prices", "asking {price} prices", "and {price} prices"),
        },
        chatty_percent=35,
    ),
    "hotels": Domain(
        values={
            "area": ("lake", "beach", "forest", "river", "hills", "castle"),
            "stars": ("two", "three", "four", "five"),
            "offer": ("pool", "spa", "sauna", "gym", "garden", "bar"),
        },
        phrases={
            "area": _WHERE,
            "stars": ("with {stars} stars", "proud of {stars} stars", "boasting {stars} stars", "and {stars} stars"),
            "offer": (
                "with a {offer} for you",
                "and your own {offer}",
                "with its own {offer}",
                "known for its {offer}",
            ),
        },
        chatty_percent=100,
    ),
}
