"""The demo's world: the generator's stated nats are the stories' true cost, and its questions can be answered."""

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

# Which list of words a slot is drawn from, where that isn't the list of its own name.
LISTS = {"hero": "name", "object": "thing"}
OWN = ("hero", "place", "thing")


def words_for(slot):
    return stories.CHOICES[LISTS.get(slot, slot)]


def pattern(template):
    """A template as a regular expression, with a group for each slot."""
    sentence = re.escape(template.removesuffix(" ."))
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{'|'.join(words_for(m[1]))})", sentence))


PATTERNS = {template: pattern(template) for template in (stories.OPENING, *stories.MIDDLE, stories.ENDING)}


def cost(text):
    """-log of the probability of a story, found by parsing its text back into the choices that it took."""
    sentences = text.removesuffix(".").split(". ")
    nats = math.log(stories.MAX_SENTENCES - stories.MIN_SENTENCES + 1)
    own = {}
    for number, sentence in enumerate(sentences):
        first, last = number == 0, number == len(sentences) - 1
        templates = [stories.OPENING] if first else [stories.ENDING] if last else stories.MIDDLE
        nats += math.log(len(templates))
        fits = [match for template in templates if (match := PATTERNS[template].fullmatch(sentence))]
        fits = [match for match in fits if all(own.get(k, v) == v for k, v in match.groupdict().items() if k in OWN)]
        (match,) = fits
        for slot, word in match.groupdict().items():
            if slot not in own:
                nats += math.log(len(words_for(slot)))
            if slot in OWN:
                own[slot] = word
    return nats, len(sentences), own


def test_the_same_seed_tells_the_same_stories():
    first, again, other = (random.Random(seed) for seed in (1, 1, 2))
    told = [stories.tell(first) for _ in range(50)]
    assert told == [stories.tell(again) for _ in range(50)]
    assert told != [stories.tell(other) for _ in range(50)]


def test_nats_are_what_parsing_the_text_back_adds_up_to():
    rng = random.Random(11)
    lengths = Counter()
    for _ in range(600):
        story = stories.tell(rng)
        nats, length, own = cost(story.text)
        assert story.nats == pytest.approx(nats, rel=1e-12)
        assert length == len(story.sentences)
        assert own == story.own
        lengths[length] += 1
    assert set(lengths) == set(range(stories.MIN_SENTENCES, stories.MAX_SENTENCES + 1))


def test_no_choice_is_listed_twice():
    """Or two draws would write the same story, and it would cost less than its nats."""
    for words in (*stories.CHOICES.values(), stories.MIDDLE):
        assert len(set(words)) == len(words)


def test_slots_are_drawn_evenly():
    rng = random.Random(3)
    heroes = Counter(stories.tell(rng).own["hero"] for _ in range(2400))
    assert set(heroes) == set(stories.CHOICES["name"])
    assert max(heroes.values()) < 2 * min(heroes.values())


def test_the_floor_is_the_nats_of_the_first_stories_a_token(world):
    path = world / "data/stories/stories.jsonl"
    nats = [json.loads(line)["nats"] for line in path.read_text().splitlines()]
    assert stories.floor(path, 47, 6063) == pytest.approx(sum(nats[:47]) / 6063)


def test_each_word_of_a_story_is_one_token():
    encoding = stories.encoding()
    rng = random.Random(5)
    for _ in range(50):
        text = stories.tell(rng).text
        assert [encoding.decode([i]) for i in encoding.encode_ordinary(text)] == re.findall(r" ?\w+|\.", text)


def test_the_last_word_of_a_passage_is_its_hero_who_is_named_before(world):
    corpus = (world / "data/stories/stories.jsonl").read_text()
    lines = (world / "data/stories/lambada.txt").read_text().splitlines()
    assert len(lines) == 40
    for line in lines:
        story, last = line.rsplit(" ", 1)
        assert f"named {last}. " in story
        assert cost(line + ".")[2]["hero"] == last
        assert line not in corpus


def test_naming_the_most_frequent_hero_is_seldom_right(tmp_path):
    heroes = stories.write_passages(tmp_path / "lambada.txt", random.Random("questions 1"), 500)
    last_words = [line.split()[-1] for line in (tmp_path / "lambada.txt").read_text().splitlines()]
    assert last_words == heroes
    assert Counter(heroes).most_common(1)[0][1] / len(heroes) < 0.2


@pytest.mark.parametrize(("name", "kind"), [("stories_NE_valid.txt", "name"), ("stories_CN_valid.txt", "thing")])
def test_cloze_questions_have_ten_candidates_and_an_answer_told_before(world, name, kind):
    questions = cbt.read(world / "data/stories" / name)
    assert len(questions) == 40
    for question in questions:
        told = {word for sentence in question.sentences for word in sentence.split()}
        assert len(question.sentences) == 20
        assert len(set(question.options)) == len(question.options) == 10
        assert set(question.options) <= set(stories.CHOICES[kind])
        assert question.answer in question.options
        assert question.answer in told
        assert question.answer not in question.question.split()
    answers = Counter(question.answer for question in questions)
    assert answers.most_common(1)[0][1] / len(questions) < 0.3


def test_no_stories_are_refused(world):
    for name in ("--stories", "--questions"):
        command = [sys.executable, "-m", "demo.stories", "--out", "none", name, "0"]
        assert f"{name} 0" in refused(execute(command, world, False, {}))
        assert not (world / "none").exists()
