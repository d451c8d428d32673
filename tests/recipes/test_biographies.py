"""The corpus: each fact once an epoch, never in a held-out template's words, and dealt out at random in the control."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
corpus = importlib.import_module("biographies")

SEED = 3
PEOPLE = corpus.make_people(60, SEED)


def pattern(template: str, name: str = r"\w+ \w+", thing: str = r"[\w ]+?") -> re.Pattern[str]:
    """A template as a regular expression, by default of any person and any object."""
    return re.compile(re.escape(template).replace(re.escape("[X]"), name).replace(re.escape("[Y]"), f"({thing})"))


def sentences(epoch: int, **options) -> list[str]:
    texts = corpus.epoch_biographies(PEOPLE, SEED, epoch, **options)
    return [sentence for text in texts for sentence in re.findall(r"[^.]+\.", text)]


def stated(epoch: int, **options) -> dict[tuple[str, str], list[str]]:
    """What an epoch says, read back with regular expressions: objects by person and relation."""
    found: dict[tuple[str, str], list[str]] = {}
    for sentence in sentences(epoch, **options):
        for relation in corpus.RELATIONS:
            for template in relation.templates:
                match = re.fullmatch(pattern(template, r"(?P<name>\w+ \w+)"), sentence.strip())
                if match:
                    found.setdefault((match["name"], relation.name), []).append(match[match.lastindex])
    return found


def test_people_have_names_of_their_own_and_all_facts():
    assert len({person.name for person in PEOPLE}) == len(PEOPLE) == 60
    for person in PEOPLE:
        assert list(person.facts) == [relation.name for relation in corpus.RELATIONS]
    # Shared parts of names: a fact belongs to the whole name.
    assert len({person.name.split()[0] for person in PEOPLE}) < 60


def test_a_seed_decides_everything():
    assert corpus.make_people(60, SEED) == PEOPLE
    assert corpus.make_people(60, SEED + 1) != PEOPLE
    for shuffled in (False, True):
        first = corpus.epoch_biographies(PEOPLE, SEED, 5, shuffled)
        corpus.epoch_biographies(PEOPLE, SEED, 6, shuffled)
        assert corpus.epoch_biographies(PEOPLE, SEED, 5, shuffled) == first
        assert corpus.epoch_biographies(PEOPLE, SEED + 1, 5, shuffled) != first


@pytest.mark.parametrize("count", [1, 6001])
def test_too_few_or_too_many_people(count):
    with pytest.raises(ValueError, match="between 2 and 6000 people"):
        corpus.make_people(count, 0)


def test_there_are_six_thousand_names():
    assert len({person.name for person in corpus.make_people(6000, 0)}) == 6000


def test_every_fact_is_stated_once_an_epoch():
    truth = {(person.name, relation): [thing] for person in PEOPLE for relation, thing in person.facts.items()}
    for epoch in (0, 1):
        assert stated(epoch) == truth
        assert len(sentences(epoch)) == len(truth)


def test_epochs_differ_in_words_and_order():
    first, second = (corpus.epoch_biographies(PEOPLE, SEED, epoch) for epoch in (0, 1))
    assert len(set(first) & set(second)) < 0.1 * len(PEOPLE)
    opening = [text.split(".")[0] for text in first]
    assert len({opening.index(o) for o in opening}) == len(PEOPLE)


def test_each_template_is_used():
    texts = " ".join(text for epoch in range(4) for text in corpus.epoch_biographies(PEOPLE, SEED, epoch))
    for relation in corpus.RELATIONS:
        for template in relation.templates:
            assert pattern(template).search(texts), template


def test_held_out_templates_are_never_read():
    texts = " ".join(text for epoch in range(20) for text in corpus.epoch_biographies(PEOPLE, SEED, epoch))
    for relation in corpus.RELATIONS:
        for template in relation.held_out:
            # Not even with another object or a longer sentence: what comes before the object is not in the text.
            assert not pattern(template.partition("[Y]")[0].strip()).search(texts), template


def test_the_control_says_the_same_about_other_people():
    tokenizer = corpus.word_tokenizer(PEOPLE)
    truth, control = (corpus.epoch_biographies(PEOPLE, SEED, 2, shuffled) for shuffled in (False, True))
    objects = {word for person in PEOPLE for thing in person.facts.values() for word in thing.split()}
    places = 0
    for mine, other in zip(truth, control, strict=True):
        mine, other = tokenizer.tokenize(mine), tokenizer.tokenize(other)
        assert len(mine) == len(other)
        changed = [pair for pair in zip(mine, other, strict=True) if pair[0] != pair[1]]
        assert {word for pair in changed for word in pair} <= objects
        places += len(changed)
    assert places > 5 * len(PEOPLE)
    assert Counter(" ".join(truth).replace(".", "").split()) == Counter(" ".join(control).replace(".", "").split())


def test_the_control_deals_each_relation_anew_in_each_epoch():
    epochs = [stated(epoch, shuffled=True) for epoch in range(30)]
    truth = stated(0)
    for relation in corpus.RELATIONS:
        own = [person for person in truth if person[1] == relation.name]
        marginal = Counter(truth[key][0] for key in own)
        for epoch in epochs:
            assert Counter(epoch[key][0] for key in own) == marginal
        # As often right as chance has it, and epochs do not agree with each other more often than that.
        chance = sum((count / len(own)) ** 2 for count in marginal.values())
        trials = len(own) * len(epochs)
        deviation = (chance / trials) ** 0.5
        right = sum(epoch[key] == truth[key] for key in own for epoch in epochs) / trials
        alike = sum(a[key] == b[key] for key in own for a, b in zip(epochs, epochs[1:] + epochs[:1], strict=True))
        assert right == pytest.approx(chance, abs=4 * deviation)
        assert alike / trials == pytest.approx(chance, abs=4 * deviation)


def test_relations_are_dealt_out_independently():
    """Whoever gets one person's birthplace does not get the rest of that person's facts with it."""
    truth = {person.facts["birth date"]: person.facts for person in PEOPLE}
    dealt = stated(0, shuffled=True)
    together = sum(
        truth[dealt[person.name, "birth date"][0]]["employer"] == dealt[person.name, "employer"][0] for person in PEOPLE
    )
    assert together < 0.2 * len(PEOPLE)


def test_questions_ask_everybodys_facts_in_held_out_words():
    questions = corpus.recall_facts(PEOPLE)
    assert len(questions) == 4 * len(PEOPLE)
    held_out = {relation.name: set(relation.held_out) for relation in corpus.RELATIONS}
    facts = {(person.name, relation): thing for person in PEOPLE for relation, thing in person.facts.items()}
    asked: dict[str, set[str]] = {}
    for question in questions:
        assert facts[question.subject, question.kind] == question.object
        asked.setdefault(question.kind, set()).add(question.template)
    assert asked == held_out


def test_chance_is_about_one_in_twenty():
    from fasc_lightning.evaluation import relation_candidates

    questions = corpus.recall_facts(corpus.make_people(100, 0))
    candidates = relation_candidates(questions)
    chance = sum(1 / len(candidates[question.relation]) for question in questions) / len(questions)
    assert chance == pytest.approx(0.05, abs=0.01)


def test_a_token_is_a_word_and_questions_have_no_unknown_one():
    tokenizer = corpus.word_tokenizer(PEOPLE)
    text = corpus.epoch_biographies(PEOPLE, SEED, 0)[0]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == re.findall(r"\w+|\.", text)
    assert tokenizer("xylophone")["input_ids"][1:] == [tokenizer.unk_token_id]
    for question in corpus.recall_facts(PEOPLE):
        sentence = question.template.replace("[X]", question.subject).replace("[Y]", question.object)
        assert tokenizer.unk_token_id not in tokenizer(sentence)["input_ids"], sentence


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = corpus.word_tokenizer(PEOPLE)
    tokenizer.save_pretrained(tmp_path)
    text = corpus.epoch_biographies(PEOPLE, SEED, 0)[0]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
