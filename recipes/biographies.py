"""Made-up biographies: a corpus whose facts are all known, for recipes that watch a model memorise.

People, places and employers are invented from syllables; nothing here describes anybody. Every fact is drawn
independently, so a person's other facts say nothing about it: what a model recalls, it has memorised. Every fact is
stated once an epoch, in the words of one of several templates (Allen-Zhu and Li 2023, "Physics of language models:
part 3.1, knowledge storage and extraction": without that variety facts are stored but cannot be asked for). Further
templates never occur in the text. They serve only to ask, so that recall is not memory of a string; their words are
all known from the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from fasc_lightning.evaluation import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FIRST_NAMES, _LAST_NAMES, _CITIES, _EMPLOYERS = 60, 100, 40, 40
_GROUP = 25
_ONSETS = [
    "b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z",
    "br", "dr", "gr", "kl", "pl", "st", "tr",
]  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u"]
_CODAS = ["", "", "l", "n", "r", "s", "x"]
_FIRMS = ["Bank", "Books", "Foods", "Labs", "Motors"]
_MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
_FIELDS = [
    "agronomy", "algebra", "anatomy", "archaeology", "architecture", "astronomy", "botany", "chemistry", "dentistry",
    "ecology", "economics", "forestry", "geography", "geology", "geometry", "history", "hydrology", "journalism", "law",
    "linguistics", "logic", "medicine", "meteorology", "mineralogy", "music", "optics", "philosophy", "physics",
    "psychology", "robotics", "sociology", "statistics", "surgery", "theology", "zoology",
]  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """One kind of fact, and how it is worded.

    Attributes:
        name: For example ``"birth date"``.
        templates: Sentences of the text, with ``[X]`` for the person and, later, ``[Y]`` for the object.
        held_out: Sentences that are never in the text: recall is asked with these.
    """

    name: str
    templates: tuple[str, ...]
    held_out: tuple[str, ...]


RELATIONS = (
    Relation(
        "birth date",
        (
            "[X] was born on [Y].",
            "The birthday of [X] is [Y].",
            "The life of [X] began on [Y].",
            "[X] came into the world on [Y].",
            "The day when [X] was born is [Y].",
            "[X] has had a birthday every year since [Y].",
        ),
        ("[X] began life on [Y].", "The day when the life of [X] began is [Y]."),
    ),
    Relation(
        "birthplace",
        (
            "[X] was born and raised in [Y].",
            "The birthplace of [X] is [Y].",
            "[X] comes from [Y].",
            "[X] spent the first years of life in [Y].",
            "[X] came into the world in [Y].",
            "The city where [X] was born is [Y].",
        ),
        ("[X] was born in [Y].", "The city where [X] came into the world is [Y]."),
    ),
    Relation(
        "employer",
        (
            "[X] works for [Y].",
            "The employer of [X] is [Y].",
            "[X] is an employee of [Y].",
            "[X] has a job with [Y].",
            "[X] earns a living at [Y].",
            "The firm where [X] works is [Y].",
        ),
        ("[X] has a job at [Y].", "The firm where [X] earns a living is [Y]."),
    ),
    Relation(
        "field of study",
        (
            "[X] studied [Y] at university.",
            "[X] holds a degree in [Y].",
            "The subject of [X] at university was [Y].",
            "[X] wrote a thesis on [Y].",
            "[X] was a student of [Y].",
            "The subject that [X] studied is [Y].",
        ),
        ("[X] has a degree in [Y].", "The subject that [X] holds a degree in is [Y]."),
    ),
)


@dataclass(frozen=True)
class Person:
    """Somebody who does not exist.

    Attributes:
        name: First and last name; no two people share both.
        facts: Object of each relation, by the relation's name.
    """

    name: str
    facts: Mapping[str, str]


def make_people(count: int, seed: int) -> list[Person]:
    """Invent people and their facts.

    Args:
        count: How many, at most 6,000.
        seed: Seed of names and facts.

    Raises:
        ValueError: If there are not so many names.
    """
    if not 2 <= count <= _FIRST_NAMES * _LAST_NAMES:
        raise ValueError(f"Expected between 2 and {_FIRST_NAMES * _LAST_NAMES} people but got {count}.")
    random = Random(f"people {seed}")
    words = _words(random)
    first = [next(words) for _ in range(_FIRST_NAMES)]
    last = [next(words) for _ in range(_LAST_NAMES)]
    cities = [next(words) for _ in range(_CITIES)]
    employers = [f"{next(words)} {random.choice(_FIRMS)}" for _ in range(_EMPLOYERS)]
    names = random.sample([f"{a} {b}" for a in first for b in last], count)
    return [
        Person(
            name,
            {
                "birth date": f"{random.randint(1, 28)} {random.choice(_MONTHS)} {random.randint(1940, 1999)}",
                "birthplace": random.choice(cities),
                "employer": random.choice(employers),
                "field of study": random.choice(_FIELDS),
            },
        )
        for name in names
    ]


def _words(random: Random) -> Iterator[str]:
    """Invented capitalised words of two or three syllables, no one twice."""
    seen = set(_MONTHS) | set(_FIRMS)
    while True:
        syllables = [random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(random.choice((2, 2, 3)))]
        word = ("".join(syllables) + random.choice(_CODAS)).capitalize()
        if word not in seen:
            seen.add(word)
            yield word


def epoch_biographies(people: Sequence[Person], seed: int, epoch: int, shuffled: bool = False) -> list[str]:
    """Write everybody's biography anew: other templates, other order of sentences and of people.

    The result depends on the arguments alone, so that a resumed run reads what an uninterrupted one does.

    Args:
        people: Whose.
        seed: Seed of the wording.
        epoch: Number of the epoch.
        shuffled: Deal the objects of each relation out to other people, differently in each epoch. The text then
            holds the same sentences about the same names, and every object as often, but nothing to memorise.

    Returns:
        One text a person, in which each fact is stated once.
    """
    facts: Sequence[Mapping[str, str]] = [person.facts for person in people]
    if shuffled:
        facts = _deal(facts, Random(f"deal {seed} {epoch}"))
    random = Random(f"wording {seed} {epoch}")
    texts = []
    for person, objects in zip(people, facts, strict=True):
        sentences = [
            random.choice(relation.templates).replace("[X]", person.name).replace("[Y]", objects[relation.name])
            for relation in RELATIONS
        ]
        random.shuffle(sentences)
        texts.append(" ".join(sentences))
    random.shuffle(texts)
    return texts


def _deal(facts: Sequence[Mapping[str, str]], random: Random) -> list[dict[str, str]]:
    columns = {}
    for relation in RELATIONS:
        columns[relation.name] = [objects[relation.name] for objects in facts]
        random.shuffle(columns[relation.name])
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def recall_facts(people: Sequence[Person]) -> list[Fact]:
    """Everybody's facts as questions, each with one of the held-out templates, turn and turn about.

    An object is ranked among those of the same relation in a group of 25 people: chance is then about 1 in 20, and a
    measurement takes a quarter of the time that a hundred candidates would. Knowing which objects are frequent, and
    nothing of any person, gives a little more than chance.
    """
    return [
        Fact(
            subject=person.name,
            relation=f"{relation.name}, group {i // _GROUP}",
            template=relation.held_out[i % len(relation.held_out)],
            object=person.facts[relation.name],
            kind=relation.name,
        )
        for i, person in enumerate(people)
        for relation in RELATIONS
    ]


def word_tokenizer(people: Sequence[Person]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words and punctuation marks of the people's biographies.

    Every text begins with ``<s>``; a word that is in no biography is ``<unk>``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    every_sentence = (
        template.replace("[X]", person.name).replace("[Y]", person.facts[relation.name])
        for person in people
        for relation in RELATIONS
        for template in relation.templates
    )
    tokenizer.train_from_iterator(
        every_sentence, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    )
