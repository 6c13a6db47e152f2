"""demo/stories.py: the recorded nats are the negative log-probability of each story, and its questions have answers."""

import json
import math
import random
import re
import sys
from collections import Counter

import pytest
from conftest import execute, refused

from core.eval import cbt
from demo import stories

# The word list of a slot, where it isn't the list of the slot's own name. Independent of the generator's table.
LISTS = {"hero": "name", "object": "thing"}
ENTITIES = ("hero", "place", "thing")


def words_for(slot):
    return stories.CHOICES[LISTS.get(slot, slot)]


def pattern(template):
    """A template as a regular expression, with a group for each slot."""
    sentence = re.escape(template.removesuffix(" ."))
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{'|'.join(words_for(m[1]))})", sentence))


PATTERNS = {template: pattern(template) for template in (stories.OPENING, *stories.MIDDLE, stories.ENDING)}


def parse_story(text):
    """-log of the probability of a story, its length and its entities: parses the text into the generator's choices."""
    sentences = text.removesuffix(".").split(". ")
    nats = math.log(stories.MAX_SENTENCES - stories.MIN_SENTENCES + 1)
    entities = {}
    for number, sentence in enumerate(sentences):
        first, last = number == 0, number == len(sentences) - 1
        templates = [stories.OPENING] if first else [stories.ENDING] if last else stories.MIDDLE
        nats += math.log(len(templates))
        fits = [match for template in templates if (match := PATTERNS[template].fullmatch(sentence))]
        fits = [
            match
            for match in fits
            if all(entities.get(k, v) == v for k, v in match.groupdict().items() if k in ENTITIES)
        ]
        (match,) = fits
        for slot, word in match.groupdict().items():
            if slot not in entities:
                nats += math.log(len(words_for(slot)))
            if slot in ENTITIES:
                entities[slot] = word
    return nats, len(sentences), entities


def test_equal_seeds_give_equal_stories():
    first, again, other = (random.Random(seed) for seed in (1, 1, 2))
    generated = [stories.generate_story(first) for _ in range(50)]
    assert generated == [stories.generate_story(again) for _ in range(50)]
    assert generated != [stories.generate_story(other) for _ in range(50)]


def test_recorded_nats_equal_the_nats_of_the_parsed_text():
    rng = random.Random(11)
    lengths = Counter()
    for _ in range(600):
        story = stories.generate_story(rng)
        nats, length, entities = parse_story(story.text)
        assert story.nats == pytest.approx(nats, rel=1e-12)
        assert length == len(story.sentences)
        assert entities == story.entities
        lengths[length] += 1
    assert set(lengths) == set(range(stories.MIN_SENTENCES, stories.MAX_SENTENCES + 1))


def test_choices_are_distinct():
    """With a repeated choice, several draws give one story, and its probability exceeds the recorded one."""
    for words in (*stories.CHOICES.values(), stories.MIDDLE):
        assert len(set(words)) == len(words)


def test_heroes_are_uniformly_distributed():
    rng = random.Random(3)
    heroes = Counter(stories.generate_story(rng).entities["hero"] for _ in range(2400))
    assert set(heroes) == set(stories.CHOICES["name"])
    assert max(heroes.values()) < 2 * min(heroes.values())


def test_entropy_is_the_nats_per_token_of_the_first_stories(world):
    path = world / "data/stories/stories.jsonl"
    nats = [json.loads(line)["nats"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert stories.entropy(path, 47, 6063) == pytest.approx(sum(nats[:47]) / 6063)


def test_each_word_of_a_story_is_one_token():
    encoding = stories.encoding()
    rng = random.Random(5)
    for _ in range(50):
        text = stories.generate_story(rng).text
        assert [encoding.decode([i]) for i in encoding.encode_ordinary(text)] == re.findall(r" ?\w+|\.", text)


def test_the_last_word_of_a_passage_is_its_hero_and_occurs_before(world):
    corpus = (world / "data/stories/stories.jsonl").read_text(encoding="utf-8")
    lines = (world / "data/stories/lambada.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 40
    for line in lines:
        story, last = line.rsplit(" ", 1)
        assert f"named {last}. " in story
        assert parse_story(line + ".")[2]["hero"] == last
        assert line not in corpus


def test_the_most_frequent_hero_answers_few_passages(tmp_path):
    heroes = stories.write_passages(tmp_path / "lambada.txt", random.Random("questions 1"), 500)
    last_words = [line.split()[-1] for line in (tmp_path / "lambada.txt").read_text(encoding="utf-8").splitlines()]
    assert last_words == heroes
    assert Counter(heroes).most_common(1)[0][1] / len(heroes) < 0.2


@pytest.mark.parametrize(("name", "kind"), [("stories_NE_valid.txt", "name"), ("stories_CN_valid.txt", "thing")])
def test_cloze_questions_have_ten_candidates_and_an_answer_in_the_context(world, name, kind):
    questions = cbt.read(world / "data/stories" / name)
    assert len(questions) == 40
    for question in questions:
        context = {word for sentence in question.sentences for word in sentence.split()}
        assert len(question.sentences) == 20
        assert len(set(question.options)) == len(question.options) == 10
        assert set(question.options) <= set(stories.CHOICES[kind])
        assert question.answer in question.options
        assert question.answer in context
        assert question.answer not in question.question.split()
    answers = Counter(question.answer for question in questions)
    assert answers.most_common(1)[0][1] / len(questions) < 0.3


def test_a_count_of_zero_is_refused(world):
    for name in ("--stories", "--questions"):
        command = [sys.executable, "-m", "demo.stories", "--out", "none", name, "0"]
        assert f"{name} 0" in refused(execute(command, world, False, {}))
        assert not (world / "none").exists()
