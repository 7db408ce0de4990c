# SPDX-License-Identifier: Apache-2.0
"""Slot-value tables and sentence templates of the synthetic corpora.

Two domains that differ in the ways fine-tuning has to bridge: `restaurants` is plain and declarative and serves as
the base; `hotels` has other names, other values, partly other slots, and an enthusiastic style that speaks to the
reader. Values and sentences are short, because the quickstart's model reads bytes: a context and a target stay
within 70 bytes each, nearly always within 127 together. Each set of slots has four templates, so the best possible
loss is not zero, as in real data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from string import Formatter


@dataclass(frozen=True)
class Domain:
    """A closed vocabulary per slot (the first slot is in every mr) and templates over the slots' names."""

    values: Mapping[str, Sequence[str]]
    templates: Sequence[str]

    def meanings(self) -> list[dict[str, str]]:
        """Every slot -> value assignment: the first slot and at least one of the others, in table order."""
        first, *others = self.values
        subsets = chain.from_iterable(combinations(others, size) for size in range(1, len(others) + 1))
        result = []
        for slots in ((first, *subset) for subset in subsets):
            for values in product(*(self.values[slot] for slot in slots)):
                result.append(dict(zip(slots, values, strict=True)))
        return result

    def sentences(self, meaning: Mapping[str, str]) -> list[str]:
        """All sentences that express exactly the slots of `meaning`."""
        return [template.format(**meaning) for template in self.templates if _slots(template) == set(meaning)]


def _slots(template: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(template) if field}


RESTAURANTS = Domain(
    values={
        "name": (
            *("Red Fork", "Old Mill", "Tin Pot", "Blue Oak", "Night Owl", "Wild Rye", "Sour Plum", "Gold Fig"),
            *("Iron Pan", "Salt Jar", "Lucky Duck", "Moon Inn", "Grey Goose", "Hot Stone", "The Anchor", "Pear Tree"),
            *("Green Cup", "Big Onion", "The Nook", "Fat Hen", "Black Ox", "White Elk", "Fox Den", "Honey Bun"),
        ),
        "food": ("Thai", "Polish", "French", "Greek", "Turkish", "Spanish", "Mexican", "Korean"),
        "area": ("canal", "park", "port", "bridge", "market", "tower"),
        "price": ("low", "fair", "high"),
    },
    templates=(
        "{name} serves {food} food.",
        "{name} is a {food} restaurant.",
        "The food at {name} is {food}.",
        "There is {food} food at {name}.",
        "{name} is near the {area}.",
        "{name} is located by the {area}.",
        "Near the {area} there is {name}.",
        "There is a restaurant near the {area}, {name}.",
        "{name} has {price} prices.",
        "Prices at {name} are {price}.",
        "{name} is a restaurant with {price} prices.",
        "The restaurant {name} asks {price} prices.",
        "{name} serves {food} food near the {area}.",
        "{name} is a {food} restaurant by the {area}.",
        "Near the {area}, {name} serves {food} food.",
        "There is {food} food near the {area} at {name}.",
        "{name} serves {food} food at {price} prices.",
        "{name} is a {food} restaurant with {price} prices.",
        "The {food} food at {name} has {price} prices.",
        "With {price} prices, {name} serves {food} food.",
        "{name} is near the {area} and has {price} prices.",
        "Near the {area}, {name} has {price} prices.",
        "{name} has {price} prices and is by the {area}.",
        "The prices at {name} by the {area} are {price}.",
        "{name} serves {food} food near the {area} at {price} prices.",
        "{name} is a {food} place by the {area} with {price} prices.",
        "Near the {area}, {name} serves {food} food at {price} prices.",
        "{name} by the {area} has {food} food and {price} prices.",
    ),
)

HOTELS = Domain(
    values={
        "name": (
            *("Casa Luna", "Villa Rosa", "The Falcon", "Pine Lodge", "Swan House", "Nova Inn", "Casa Brava", "Orion"),
            *("Maple Hall", "The Ivory", "Villa Mare", "Zephyr", "Birch Hall", "Casa Verde", "The Quartz", "Aurora"),
            *("Dune Lodge", "Cobalt", "The Jay", "Villa Alba", "Elm House", "Meridia", "Casa Sol", "The Pearl"),
        ),
        "area": ("lake", "beach", "forest", "river", "hills", "castle"),
        "stars": ("two", "three", "four", "five"),
        "offer": ("pool", "spa", "sauna", "gym", "garden", "bar"),
    },
    templates=(
        "You will love {name}, right by the {area}!",
        "Come to {name} and wake up by the {area}!",
        "Your dream stay by the {area}? {name}!",
        "Pack your bags: {name} by the {area} awaits you!",
        "You deserve all {stars} stars of {name}!",
        "Treat yourself to {name}, your {stars}-star dream!",
        "Your {stars}-star escape is here: {name}!",
        "Wow, {stars} stars, and all for you at {name}!",
        "You will adore the {offer} at {name}!",
        "Dive into your {offer} time at {name}!",
        "Your own {offer}? Yes, at {name}!",
        "Come to {name}, the {offer} is all yours!",
        "You will love {name}, your {stars}-star home by the {area}!",
        "Enjoy {stars} stars by the {area}: your {name} awaits!",
        "By the {area}, {name} spoils you with {stars} stars!",
        "Your {stars}-star escape by the {area}? {name}!",
        "You will love the {offer} at {name} by the {area}!",
        "Your {offer} by the {area} awaits at {name}!",
        "By the {area}, {name} spoils you with a {offer}!",
        "Come to {name} by the {area}, the {offer} is all yours!",
        "You will adore the {offer} at your {stars}-star {name}!",
        "Your {stars}-star {name} even has a {offer} for you!",
        "Enjoy {stars} stars and your {offer} at {name}!",
        "Treat yourself to {name}: {stars} stars and a {offer}!",
        "You will love {name}: {stars} stars and a {offer} by the {area}!",
        "Enjoy {stars} stars and your {offer} by the {area} at {name}!",
        "By the {area}, {name} has {stars} stars and your {offer}!",
        "Your {stars}-star {name} by the {area} has a {offer} for you!",
    ),
)

DOMAINS: dict[str, Domain] = {"restaurants": RESTAURANTS, "hotels": HOTELS}
