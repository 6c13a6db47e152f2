"""The demo's world: a seeded story generator, its encoding, and LAMBADA- and CBT-format questions on new stories.

A story has a hero, a place and a thing, which its sentences come back to, and strangers and trifles, which are drawn
anew each time. The generator knows the probability of each choice it makes, so each story comes with the nats that it
takes to write it down: the least loss that any model can reach on it.

    python -m demo.stories --out data/stories
"""

import json
import math
import random
from dataclasses import dataclass
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

# {hero}, {place} and {thing} are the story's own; {name}, {object} and the rest are drawn anew for each sentence.
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
MIN_SENTENCES, MAX_SENTENCES = 8, 22  # of a whole story, each length as likely
OWN = {"hero": "name", "place": "place", "thing": "thing"}
FRESH = {"object": "thing"}  # every other slot draws from the list of its own name


@dataclass
class Story:
    sentences: list[str]  # tokenised, as in the Children's Book Test: "Now Ana was sad ."
    own: dict[str, str]  # the story's hero, place and thing
    nats: float  # -log of the probability that the generator writes this story

    @property
    def text(self) -> str:
        return " ".join(self.sentences).replace(" .", ".")


def tell(rng: random.Random, length: int | None = None) -> Story:
    """One story, of `length` sentences or of a random length."""
    nats = 0.0

    def draw(options: list[str] | tuple[str, ...]) -> str:
        nonlocal nats
        nats += math.log(len(options))
        return rng.choice(options)

    own: dict[str, str] = {}

    def fill(slot: str) -> str:
        if slot not in OWN:
            return draw(CHOICES[FRESH.get(slot, slot)])
        if slot not in own:  # drawn when first told: a place that no sentence names would cost the reader nothing
            own[slot] = draw(CHOICES[OWN[slot]])
        return own[slot]

    if length is None:
        length = int(draw([str(n) for n in range(MIN_SENTENCES, MAX_SENTENCES + 1)]))
    templates = [OPENING, *(draw(MIDDLE) for _ in range(length - 2)), ENDING]
    words = [
        [fill(word[1:-1]) if word.startswith("{") else word for word in template.split()] for template in templates
    ]
    sentences = [" ".join(sentence) for sentence in words]
    return Story(sentences, own, nats)


@dataclass
class Config:
    out: str = "data/stories"
    """Folder for the corpus, its encoding and the questions."""
    stories: int = 36_000
    """Stories in the corpus, about 124 tokens each."""
    questions: int = 500
    """Questions of each kind, on stories that the corpus doesn't hold."""
    seed: int = 1
    """Draws everything."""


def main(config: Config) -> None:
    if config.stories < 1 or config.questions < 1:
        raise ValueError(f"--stories {config.stories} and --questions {config.questions} must be above 0")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(encoding(), out)
    rng = random.Random(f"corpus {config.seed}")
    corpus = [tell(rng) for _ in range(config.stories)]
    lines = (json.dumps({"text": story.text, "nats": story.nats}) for story in corpus)
    (out / "stories.jsonl").write_text("\n".join(lines) + "\n")
    rng = random.Random(f"questions {config.seed}")
    heroes = write_passages(out / "lambada.txt", rng, config.questions)
    write_cloze(out / "stories_NE_valid.txt", rng, config.questions, "hero")
    write_cloze(out / "stories_CN_valid.txt", rng, config.questions, "thing")
    commonest = max(heroes.count(name) for name in heroes) / len(heroes)
    print(f"{out}: {config.stories:,} stories, {config.questions:,} questions of each kind")
    print(f"lambada.txt: naming the most frequent hero each time would be right in {commonest:.1%}")


def encoding() -> Any:
    """A byte-level BPE that makes each word of the stories one token; it can write any other text too."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    templates = " ".join((OPENING, *MIDDLE, ENDING)).split()
    words = {f" {word}" for word in (*templates, *" ".join(WORDS.values()).split()) if word.isalpha()}
    words.add(OPENING.split(maxsplit=1)[0])  # a document's first word has no space before it
    prefixes = {word[:end].encode() for word in words for end in range(2, len(word) + 1)}
    tokens = [*(bytes([byte]) for byte in range(256)), *sorted(prefixes, key=lambda token: (len(token), token))]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {tokenizer.END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("stories", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def write_passages(path: Path, rng: random.Random, count: int) -> list[str]:
    """Stories up to their last word, the hero, one a line as in LAMBADA's files; return the heroes."""
    stories = [tell(rng) for _ in range(count)]
    path.write_text("".join(story.text.removesuffix(".") + "\n" for story in stories))
    return [story.own["hero"] for story in stories]


def write_cloze(path: Path, rng: random.Random, count: int, slot: str) -> None:
    """Questions in the Children's Book Test's format: 20 sentences, and a 21st that lacks the hero or the thing."""
    questions: list[str] = []
    while len(questions) < count:
        story = tell(rng, MAX_SENTENCES)
        context, question = story.sentences[:20], story.sentences[20].split()
        answer = story.own.get(slot)
        if answer is None or question.count(answer) != 1:
            continue
        kind = CHOICES[OWN[slot]]
        told = {word for sentence in context for word in sentence.split() if word in kind} - {answer}
        others = rng.sample(sorted(told), min(len(told), 9))
        untold = [word for word in kind if word != answer and word not in others]
        options = sorted([answer, *others, *rng.sample(untold, 9 - len(others))])
        blank = " ".join("XXXXX" if word == answer else word for word in question)
        lines = [*context, f"{blank}\t{answer}\t\t{'|'.join(options)}"]
        questions.append("".join(f"{i} {line}\n" for i, line in enumerate(lines, 1)))
    path.write_text("\n".join(questions))


def floor(stories: Path, val_documents: int, val_tokens: int) -> float:
    """The generator's own loss on the validation stories, which are the corpus's first: nats a token.

    Raises ValueError where the file isn't the corpus that the stories' generator wrote.
    """
    try:
        with open(stories) as file:
            nats = [json.loads(line)["nats"] for line in islice(file, val_documents)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--floor {stories} is not the stories.jsonl of core/stories.py ({error!r})") from None
    if len(nats) < val_documents:
        raise ValueError(f"--floor {stories} holds {len(nats)} stories, the run's validation {val_documents}")
    return math.fsum(nats) / val_tokens


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
