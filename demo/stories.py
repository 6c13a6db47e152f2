"""Generate the demo's data: short stories, their tokenizer, and questions about new stories as in LAMBADA and CBT.

A story has a hero, a place and a thing, which its sentences repeat; other names and objects are drawn for each
sentence. The generator knows the probability of each of its choices. Each story therefore comes with its negative
log-probability in nats: no model can have a lower expected loss.

    python -m demo.stories --out data/stories
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from core import cli
from core.data import tokenizer

WORDS = {
    "name": "Ana Ben Cal Dan Eva Fay Gus Hal Ida Jon Kim Leo Max Nia Ola Pam Ray Sam Tom Uma Vic Wes Zoe Amy",
    "place": "mill lake farm hill port wood inn barn cave fort dock pond",
    "thing": "lamp boat drum kite ring sack book flute hat rope bell coin",
    "job": "cook smith nurse guard baker clerk monk pilot",
    "trait": "kind shy bold calm proud young wise tall",
    "look": "red blue new big pink fine grey small",
    "mood": "glad sad tired cross hungry cold happy brave",
    "go": "walked ran rode came",
    "act": "took held found cleaned hid lost showed kept",
    "sky": "warm wet dark windy clear foggy mild bright",
    "time": "day night morning evening",
    "where": "under behind near on",
    "spot": "table wall door stove chair gate shelf bench",
}
CHOICES = {kind: words.split() for kind, words in WORDS.items()}

# {hero}, {place} and {thing} are drawn once per story; {name}, {object} and the other slots once per sentence.
OPENING = "Once there was a {trait} {job} named {hero} ."
MIDDLE = (
    "{hero} lived near the {place} and had a {look} {thing} .",
    "{hero} {go} to the {place} with the {thing} .",
    "At the {place} {hero} met {name} .",
    "Then {name} saw {hero} with the {look} {thing} .",
    "It was a {sky} {time} at the {place} .",
    "Now {hero} was {mood} .",
    "{hero} {act} the {thing} .",
    "Later {hero} put the {thing} {where} the {spot} .",
    "A {mood} {job} named {name} had a {object} .",
)
ENDING = "So the {thing} went home with {hero} ."
MIN_SENTENCES, MAX_SENTENCES = 8, 22  # per story, uniformly distributed
ENTITIES = ("hero", "place", "thing")
WORD_LISTS = {"hero": "name", "object": "thing"}  # every other slot is filled from the list of its own name


@dataclass
class Story:
    sentences: list[str]  # tokenized, as in the Children's Book Test: "Now Ana was sad ."
    entities: dict[str, str]  # the story's hero, place and thing
    nats: float  # -log of the probability that the generator writes this story

    @property
    def text(self) -> str:
        return " ".join(self.sentences).replace(" .", ".")


def words_for(slot: str) -> list[str]:
    """The words that can fill a slot of a template."""
    return CHOICES[WORD_LISTS.get(slot, slot)]


def generate_story(rng: random.Random, length: int | None = None) -> Story:
    """A story of `length` sentences; None: of a random length."""
    nats = 0.0
    entities: dict[str, str] = {}

    def draw(options: Sequence[str]) -> str:
        nonlocal nats
        nats += math.log(len(options))
        return rng.choice(options)

    def fill(slot: str) -> str:
        if slot not in ENTITIES:
            return draw(words_for(slot))
        if slot not in entities:  # drawn at its first use: the text doesn't reveal an entity that no sentence contains
            entities[slot] = draw(words_for(slot))
        return entities[slot]

    if length is None:
        length = int(draw([str(n) for n in range(MIN_SENTENCES, MAX_SENTENCES + 1)]))
    templates = [OPENING, *(draw(MIDDLE) for _ in range(length - 2)), ENDING]
    words = [[fill(word[1:-1]) if word[0] == "{" else word for word in template.split()] for template in templates]
    return Story([" ".join(sentence) for sentence in words], entities, nats)


@dataclass
class Config:
    out: str = "data/stories"
    """Folder for the stories, their tokenizer and the questions."""
    stories: int = 36_000
    """Number of stories, about 124 tokens each."""
    questions: int = 500
    """Number of questions of each kind, about other stories."""
    seed: int = 1
    """Random seed."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    cli.check_positive(stories=config.stories, questions=config.questions)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(encoding(), out)
    rng = random.Random(f"corpus {config.seed}")
    stories = [generate_story(rng) for _ in range(config.stories)]
    lines = "".join(json.dumps({"text": story.text, "nats": story.nats}) + "\n" for story in stories)
    (out / "stories.jsonl").write_text(lines, encoding="utf-8")
    rng = random.Random(f"questions {config.seed}")
    heroes = write_passages(out / "lambada.txt", rng, config.questions)
    write_cloze(out / "stories_NE_valid.txt", rng, config.questions, "hero")
    write_cloze(out / "stories_CN_valid.txt", rng, config.questions, "thing")
    most_frequent = max(heroes.count(name) for name in heroes) / len(heroes)
    print(f"wrote {out}: {config.stories:,} stories, {config.questions:,} questions of each kind")
    print(f"lambada.txt: the most frequent hero is the answer to {most_frequent:.1%} of the questions")


def encoding() -> Any:
    """A byte-level BPE in which each word of the stories is one token. It can encode any other text."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    templates = " ".join((OPENING, *MIDDLE, ENDING)).split()
    words = {f" {word}" for word in (*templates, *" ".join(WORDS.values()).split()) if word.isalpha()}
    words.add(OPENING.split(maxsplit=1)[0])  # the first word of a document has no space before it
    prefixes = {word[:end].encode() for word in words for end in range(2, len(word) + 1)}
    tokens = [*(bytes([byte]) for byte in range(256)), *sorted(prefixes, key=lambda token: (len(token), token))]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {tokenizer.END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("stories", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def write_passages(path: Path, rng: random.Random, count: int) -> list[str]:
    """Write stories without the final period, one per line as in LAMBADA's files. Returns their last words, heroes."""
    stories = [generate_story(rng) for _ in range(count)]
    path.write_text("".join(story.text.removesuffix(".") + "\n" for story in stories), encoding="utf-8")
    return [story.entities["hero"] for story in stories]


def write_cloze(path: Path, rng: random.Random, count: int, slot: str) -> None:
    """Write questions in the Children's Book Test's format: 20 sentences, then one with a blank for the entity `slot`.

    The other nine candidates are from the same word list; those that occur in the 20 sentences are preferred.
    """
    questions: list[str] = []
    while len(questions) < count:
        story = generate_story(rng, MAX_SENTENCES)
        context, question = story.sentences[:20], story.sentences[20].split()
        answer = story.entities.get(slot)
        if answer is None or question.count(answer) != 1:
            continue
        words = words_for(slot)
        mentioned = {word for sentence in context for word in sentence.split() if word in words} - {answer}
        others = rng.sample(sorted(mentioned), min(len(mentioned), 9))
        remaining = [word for word in words if word != answer and word not in others]
        options = sorted([answer, *others, *rng.sample(remaining, 9 - len(others))])
        blank = " ".join("XXXXX" if word == answer else word for word in question)
        lines = [*context, f"{blank}\t{answer}\t\t{'|'.join(options)}"]
        questions.append("".join(f"{i} {line}\n" for i, line in enumerate(lines, 1)))
    path.write_text("\n".join(questions), encoding="utf-8")


def entropy(stories: Path, val_documents: int, val_tokens: int) -> float:
    """The generator's own loss on the validation split, the first `val_documents` stories, in nats per token.

    Raises ValueError if the file isn't the stories.jsonl that contains them.
    """
    try:
        with open(stories, encoding="utf-8") as file:
            nats = [json.loads(line)["nats"] for line in islice(file, val_documents)]
        total = math.fsum(nats)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--floor {stories} was not written by demo/stories.py ({type(error).__name__}). Use its stories.jsonl"
        ) from None
    if len(nats) < val_documents:
        raise ValueError(
            f"--floor {stories} contains {len(nats)} stories, but the validation split {val_documents}. Use the "
            f"stories.jsonl that the shards were made from"
        )
    return total / val_tokens


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
