"""Made-up biographies: a corpus with known facts, for recipes that watch a model memorise.

People, places and employers are invented from syllables; no text describes a real person. Every fact is drawn
independently, so a person's other facts do not predict it, and a recalled fact is a memorised one. Every fact is stated
once per epoch, in the words of one of several templates (Allen-Zhu and Li 2023, "Physics of language models: part 3.1,
knowledge storage and extraction": without this variety models store facts but cannot answer questions about them).
Further templates, with words that all occur in the text, serve only as questions and never occur in the text. So recall
is not the memory of a string.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasc_lightning.evaluation import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
    """One kind of fact and its wording.

    Attributes:
        name: For example ``"birth date"``.
        templates: Sentences of the text, with ``[X]`` for the person and, later, ``[Y]`` for the object.
        held_out: Sentences that are never in the text; they are the questions.
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
    """An invented person.

    Attributes:
        name: First and last name; no two people share both.
        facts: Object of each relation, by the relation's name.
    """

    name: str
    facts: Mapping[str, str]


def make_people(count: int, seed: int) -> list[Person]:
    """Invent people and their facts.

    Args:
        count: Number of people, at most 6,000.
        seed: Seed of names and facts.

    Raises:
        ValueError: If there are fewer names than people.
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
    """Yield invented capitalised words of two or three syllables, each once."""
    seen = set(_MONTHS) | set(_FIRMS)
    while True:
        syllables = [random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(random.choice((2, 2, 3)))]
        word = ("".join(syllables) + random.choice(_CODAS)).capitalize()
        if word not in seen:
            seen.add(word)
            yield word


def epoch_biographies(people: Sequence[Person], seed: int, epoch: int, shuffled: bool = False) -> list[str]:
    """Write every person's biography again, with other templates and another order of sentences and people.

    The result depends on the arguments alone, so a resumed run reads the same text as an uninterrupted one.

    Args:
        people: The people.
        seed: Seed of the wording.
        epoch: Index of the epoch.
        shuffled: Whether to give the objects of each relation to other people, differently in each epoch. The text then
            has the same sentences, names and number of each object, but no facts to memorise.

    Returns:
        One text per person, which states each fact once.
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
    """Return every person's facts as questions; the held-out templates take turns.

    An object is ranked among the objects of the same relation in a group of 25 people. Chance is then about 1 in 20,
    and a measurement takes a quarter of the time of a hundred candidates. A model that knows only which objects are
    frequent scores slightly above chance.
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

    Every text begins with ``<s>``; a word outside the biographies is ``<unk>``.
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


def biography_windows(
    people: Sequence[Person],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    seed: int,
    epoch: int,
    shuffled: bool = False,
) -> Tensor:
    """Return an epoch's biographies, joined and cut into windows; a rest of less than one window is dropped.

    Raises:
        ValueError: If they do not fill one window.
    """
    texts = epoch_biographies(people, seed, epoch, shuffled)
    ids = [token for text in tokenizer(texts)["input_ids"] for token in text]
    if len(ids) < window:
        raise ValueError(
            f"Expected biographies of at least one window of {window} tokens but {len(people)} people have "
            f"{len(ids)} tokens. Give more --people or a smaller --window."
        )
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
