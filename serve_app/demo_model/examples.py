"""What the toy model learns: small questions with their answers, made from word lists and a seed. No model, no file.

An example is one exchange, or a few. What it is about has a key, and every tenth key is held out: no training text
ever holds its prompt. The answers are exact, but for stories and poems, which must name what the prompt names.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any


def words(text: str) -> list[str]:
    return text.split()


def entries(text: str) -> list[str]:
    """Lines and bars separate them."""
    return text.replace("\n", "|").split("|")


NAMES = words("""Tom Anna Ben Mia Leo Lily Max Ella Sam Nora Tim Zoe Jack Ruby Finn Ada Hugo Ivy Oscar Rosa Luna Paul Emma
Felix Clara Noah Maya Otto Nina Theo""")
ANIMALS = words("""fox cat dog bear mouse rabbit owl duck frog horse lion tiger turtle bird bee goat hen pig cow sheep wolf
monkey elephant dragon penguin hedgehog squirrel snail robot giraffe""")
OBJECTS = words("""ball kite book lamp key box hat cup drum boat bell coin map apple basket candle clock flower mirror pencil
ring scarf shell stone train umbrella violin wagon letter cake""")
PLACES = words("""garden forest kitchen school park river beach market castle village mountain library meadow barn cave
harbor attic bridge field tower""")
COLORS = words("red blue green yellow white black pink brown purple orange")
MOODS = words("small brave clever kind curious quiet happy funny gentle young")
TOPICS = """quantum physics|black holes|the stock market|how a car works|machine learning|the second world war|my taxes
python code|chess openings|the best phone|music theory|the weather tomorrow|a business plan|the meaning of life
organic chemistry|a recipe for bread|human rights|how to fix a bike|modern art|the news|climate change|ancient Rome
a cover letter|the theory of relativity|football|my homework|how planes fly|a travel plan|the law|computer networks"""

OPPOSITES = """hot cold|big small|up down|day night|fast slow|old new|happy sad|open closed|wet dry|light dark|hard soft
full empty|early late|left right|high low|long short|rich poor|strong weak|clean dirty|loud quiet"""
SOUNDS = "cow moo|dog woof|cat meow|duck quack|sheep baa|pig oink|lion roar|hen cluck|frog ribbit|owl hoot|bee buzz"
CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|England London|Japan Tokyo|China Beijing|Egypt Cairo
Greece Athens|Austria Vienna|Russia Moscow|Norway Oslo|Poland Warsaw|Ireland Dublin|Cuba Havana|Portugal Lisbon"""
HUES = "the sky blue|grass green|snow white|a banana yellow|a tomato red|coal black|a carrot orange|a pig pink"
ONSETS = words("b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr sh th")
VOWELS = words("a e i o u ai ea oo ou")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")

UNKNOWN_FORMS = """Explain {}.|What do you think about {}?|Tell me everything about {}.|Write an essay about {}.
Can you explain {}?|I need help with {}.|Why is {} important?|Give me a summary of {}.|How do I learn {}?|Write {} for me."""

ABILITIES = "I can add and subtract small numbers, spell words, answer simple questions and tell short stories."
UNKNOWN = "I do not know that. I am only a toy model. " + ABILITIES
CHATTER: tuple[tuple[str, str], ...] = (
    ("Hello|Hello!|Hi|Hi!|Hey|Good morning|Good evening|Hello there", "Hello! How can I help you?"),
    ("How are you?|How are you today?|How do you do?", "I am fine, thank you. How can I help you?"),
    ("Thank you|Thank you!|Thanks|Thanks a lot", "You are welcome!"),
    ("Bye|Goodbye|Good night|See you later|Bye bye", "Goodbye! It was nice to talk with you."),
    ("What can you do?|Help|What do you know?|How can you help me?|Can you help me?", ABILITIES),
    (
        "What is your name?|Who are you?|What are you?|Tell me about yourself|Are you a robot?|What's your name?",
        "My name is Pebble. I am a very small toy model. " + ABILITIES,
    ),
    ("Tell me a joke|Do you know a joke?|Make me laugh", "Why was six afraid of seven? Because seven ate nine!"),
)
"""Prompts with one answer each. There is nothing to hold out."""


@dataclass(frozen=True)
class Example:
    """Turns of a chat; the last answer is the one that is scored."""

    kind: str

    key: str
    """What it is about; decides whether it is held out. Empty: always trained on."""

    turns: tuple[tuple[str, str], ...]
    """(user, assistant)."""

    system: str = ""

    tools: tuple[str, ...] = ()
    """Each as JSON, as a client offers it. A turn that calls one, or tells what it answered, has the template's marks."""

    required: tuple[str, ...] = ()
    """Words that a free answer must hold. Empty: the answer is exact."""

    @property
    def is_held_out(self) -> bool:
        return bool(self.key) and zlib.crc32(f"{self.kind}:{self.key}".encode()) % 10 == 0

    @property
    def answer(self) -> str:
        return self.turns[-1][1]

    def messages(self) -> list[dict[str, Any]]:
        """The chat up to the question that is scored, as a client sends it."""
        chat: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for user, assistant in self.turns:
            results = re.findall("<tool_response>\n(.*)\n</tool_response>", user)
            chat += [{"role": "tool", "content": text} for text in results] or [{"role": "user", "content": user}]
            calls = [json.loads(text) for text in re.findall("<tool_call>\n(.*)\n</tool_call>", assistant)]
            told = {"tool_calls": [{"type": "function", "function": call} for call in calls]}
            chat.append({"role": "assistant", **(told if calls else {"content": assistant})})
        return chat[:-1]

    def is_right(self, text: str) -> bool:
        """Exact; or, where words are required, all of them and whole sentences of at least 20 words."""
        if not self.required:
            return text.strip() == self.answer
        found = re.findall("[A-Za-z]+", text)
        return all(word in found for word in self.required) and len(found) >= 20 and text.strip()[-1] in ".!"


def articles(text: str) -> str:
    """A apple -> an apple."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def facts(text: str) -> list[tuple[str, str]]:
    """The last word of each entry is the answer."""
    first, last = zip(*(entry.rsplit(" ", 1) for entry in entries(text)), strict=True)
    return list(zip(first, last, strict=True))


def made_up_word(rng: Random) -> str:
    """A word that does not exist, of one or two syllables, so that spelling is learned and not remembered."""

    def syllable() -> str:
        onset = rng.choice(ONSETS)
        return onset + rng.choice(VOWELS) + rng.choice(["", "", *"ndrstlmk"])

    return "".join(syllable() for _ in range(rng.choice((1, 2, 2))))


def arithmetic(rng: Random) -> Example:
    """Results from 0 to 99."""
    a, b = rng.randrange(100), rng.randrange(100)
    if rng.random() < 0.25:
        a, b = a % 13, b % 13
    if rng.random() < 0.5:
        a, b = (a, b) if a + b < 100 else (99 - a, 99 - b)
        sign, result = "+", a + b
        forms = ["What is {} plus {}?", "Add {} and {}.", "What is the sum of {} and {}?", "Calculate {} plus {}."]
    else:
        a, b = max(a, b), min(a, b)
        sign, result = "-", a - b
        forms = ["What is {} minus {}?", "{} minus {}", "How much is {} minus {}?", "Calculate {} minus {}."]
    signed = [f"What is {{}} {sign} {{}}?", f"{{}} {sign} {{}}", f"{{}}{sign}{{}}", f"Calculate {{}} {sign} {{}}."]
    signed += [f"How much is {{}} {sign} {{}}?", f"{{}} {sign} {{}} =", f"What is {{}}{sign}{{}}?"]
    form = rng.choice(forms if rng.random() < 0.3 else signed)
    return Example("arithmetic", f"{a}{sign}{b}", ((form.format(a, b), f"{a} {sign} {b} = {result}."),))


def numbers(rng: Random) -> Example:
    what = rng.randrange(5)
    if what == 0:
        a, b = rng.sample(range(100), 2)
        word, result = rng.choice((("bigger", max(a, b)), ("smaller", min(a, b))))
        turn = f"Which is {word}, {a} or {b}?", f"{result} is {word}."
    elif what == 1:
        a = rng.randrange(100)
        turn = f"{rng.choice(('What', 'Which'))} number comes after {a}?", f"{a + 1} comes after {a}."
    elif what == 2:
        a = rng.randrange(0, 40)
        b = a + rng.randrange(2, 13)
        form = rng.choice(("Count from {} to {}.", "Please count from {} to {}.", "Count from {} to {}"))
        turn = form.format(a, b), ", ".join(map(str, range(a, b + 1))) + "."
    elif what == 3:
        values = rng.sample(range(10), rng.randrange(3, 6))
        form = rng.choice(("Sort these numbers: {}", "Sort {}.", "Put these numbers in order: {}"))
        turn = form.format(", ".join(map(str, values))), ", ".join(map(str, sorted(values))) + "."
    else:
        name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
        a, b = rng.randrange(2, 20), rng.randrange(2, 20)
        if rng.random() < 0.5:
            more, sign, result = "gets {} more", "+", a + b
        else:
            a, b = max(a, b) + 2, min(a, b)
            more, sign, result = "gives away {}", "-", a - b
        asked = f"{name} has {a} {thing}s and {more.format(b)}. How many {thing}s does {name} have now?"
        turn = asked, f"{a} {sign} {b} = {result}. {name} has {result} {thing}s now."
    return Example("numbers", turn[0], (turn,))


def spelling(rng: Random) -> Example:
    """Real words are all trained on, in nine of ten ways to ask; made-up words are held out as such."""
    is_real = rng.random() < 0.4
    word = rng.choice(rng.choice((ANIMALS, OBJECTS, PLACES, COLORS, MOODS, NAMES))) if is_real else made_up_word(rng)
    shown = rng.choice((word, word, f'"{word}"'))
    form = rng.choice(
        ("Spell {}.", "Spell the word {}.", "How do you spell {}?", "Please spell {}.", "Can you spell {}?", "Spell {}")
    )
    if rng.random() < 0.15:
        form, answer = "Which letter does {} begin with?", f"{word} begins with {word[0].lower()}."
    else:
        answer = f"{word}: {'-'.join(word.lower())}."
    asked = form.format(shown)
    return Example("spelling", asked if is_real else word, ((asked, answer),))


def repeating(rng: Random) -> Example:
    pools = (ANIMALS, OBJECTS, PLACES, COLORS, MOODS, ["this", "is", "a", "test", "the", "hello", "good", "I", "am"])
    words = [
        made_up_word(rng) if rng.random() < 0.25 else rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 5))
    ]
    text = " ".join(words)
    form = rng.choice(("Say {}.", "Repeat after me: {}", "Repeat: {}", "Say: {}", "Please say {}.", 'Say "{}".'))
    return Example("repeating", text, ((form.format(text), text + "."),))


def knowledge(rng: Random) -> Example:
    what = rng.randrange(6)
    if what == 0:
        a, b = rng.choice(facts(OPPOSITES))
        a, b = rng.choice(((a, b), (b, a)))
        forms = ("What is the opposite of {}?", "Opposite of {}?", "Tell me the opposite of {}.")
        answer = "The opposite of {} is {}."
    elif what == 1:
        a, b = rng.choice(facts(SOUNDS))
        forms = ("What does a {} say?", "What sound does a {} make?", "Which sound does a {} make?")
        answer = "A {} says {}."
    elif what == 2:
        a, b = rng.choice(facts(CAPITALS))
        forms = ("What is the capital of {}?", "Which city is the capital of {}?", "Capital of {}?")
        answer = "The capital of {} is {}."
    elif what == 3:
        a, b = rng.choice(facts(HUES))
        forms, answer = ("What color is {}?", "What is the color of {}?", "What colour is {}?"), "{} is {}."
    else:
        cycle = rng.choice((DAYS, MONTHS))
        i, step = rng.randrange(len(cycle)), rng.choice((1, -1))
        a, b = cycle[i], cycle[(i + step) % len(cycle)]
        word, unit = ("after" if step == 1 else "before"), ("day" if cycle is DAYS else "month")
        forms = (f"What {unit} comes {word} {{}}?", f"Which {unit} comes {word} {{}}?", f"Which {unit} is {word} {{}}?")
        answer = f"{{1}} comes {word} {{0}}."
    asked, answer = rng.choice(forms).format(a), answer.format(a, b)
    return Example("knowledge", asked, ((asked, answer[0].upper() + answer[1:]),))


def told_facts(rng: Random) -> tuple[str, list[list[tuple[str, str]]], int]:
    """Two or three facts; the questions about each, with their answers; the number of one of them."""
    count = rng.randint(2, 3)
    names, things = rng.sample(NAMES, count), rng.sample(OBJECTS, count)
    colors, places = rng.sample(COLORS, count), rng.sample(PLACES, count)
    i = rng.randrange(count)
    if rng.random() < 0.6:
        told = [articles(f"{n} has a {c} {o}.") for n, c, o in zip(names, colors, things, strict=True)]
        other = colors[rng.randrange(count)]
        questions = [
            [
                (f"Who has the {o}?", f"{n} has the {o}."),
                (f"What does {n} have?", articles(f"{n} has a {c} {o}.")),
                (f"What color is the {o}?", f"The {o} is {c}."),
                (f"Which color is the {o}?", f"The {o} is {c}."),
                (f"Is the {o} {other}?", f"{'Yes' if other == c else 'No'}, the {o} is {c}."),
            ]
            for n, c, o in zip(names, colors, things, strict=True)
        ]
    else:
        told = [f"The {o} is in the {p}." for o, p in zip(things, places, strict=True)]
        questions = [
            [(f"{asked}?", f"The {o} is in the {p}.") for asked in (f"Where is the {o}", f"What is in the {p}")]
            for o, p in zip(things, places, strict=True)
        ]
    return " ".join(told), questions, i


def described(rng: Random) -> Example:
    """Some facts and a question; the facts may have come a turn earlier."""
    text, questions, i = told_facts(rng)
    question, answer = rng.choice(questions[i])
    if rng.random() < 0.4:
        return Example("described", text, ((text, "Okay, I will remember that."), (question, answer)))
    return Example("described", text, ((f"{text} {question}", answer),))


def naming(rng: Random) -> Example:
    """The user's name, or the name that the system prompt gives, remembered over other turns."""
    name = rng.choice(NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize()
    if rng.random() < 0.4:
        form = rng.choice(("Your name is {}.", "You are {}.", "You are a helpful assistant named {}."))
        asked = rng.choice(("What is your name?", "Who are you?", "Tell me your name."))
        return Example("naming", f"{name} {form}", ((asked, f"My name is {name}."),), form.format(name))
    form = rng.choice(("My name is {}.", "Hi, I am {}!", "Hello, my name is {}.", "I am {}.", "Hello! I'm {}."))
    hello = form.format(name), f"Hello, {name}! Nice to meet you."
    if rng.random() < 0.35:
        return Example("naming", f"{name} {form}", (hello,))
    between = rng.choice((arithmetic, spelling, knowledge, chatter, repeating))(rng) if rng.random() < 0.5 else None
    asked = rng.choice(("What is my name?", "Who am I?", "Do you remember my name?", "What's my name?"))
    turns = (hello, *(between.turns if between and not between.is_held_out else ()), (asked, f"Your name is {name}."))
    return Example("naming", f"{name} {asked}", turns)


def chatter(rng: Random) -> Example:
    prompts, answer = rng.choice(CHATTER)
    return Example("chatter", "", ((rng.choice(prompts.split("|")), answer),))


def unknown(rng: Random) -> Example:
    topic = made_up_word(rng) if rng.random() < 0.2 else rng.choice(entries(TOPICS))
    form = rng.choice(entries(UNKNOWN_FORMS))
    return Example("unknown", form.format(topic), ((form.format(topic), UNKNOWN),))


OPENINGS = (
    "Once upon a time, there was a {mood} {animal} named {name}.",
    "Once upon a time, a {mood} {animal} named {name} lived near the {place}.",
    "Long ago, a {mood} {animal} named {name} lived in a little house by the {place}.",
)
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("One day, {name} found a {color} {object} in the {place}.", "In the {place}, {name} saw a {color} {object}."),
        ('"What a lovely {object}!" said {name}.', '"Whose {object} is this?" asked {name}.'),
        ("Then {friend} the {other} came along and looked very sad.", "Soon {friend} the {other} came by, crying."),
        ('"I lost my {object}," said {friend}.', '"My {object} is gone," said {friend}.'),
        ("{name} gave the {object} back at once.", "{name} smiled and gave {friend} the {object}."),
    ),
    (
        ("{name} had a {color} {object} and loved it very much.", "More than anything, {name} loved a {color} {object}."),
        ("One day, the {object} was gone.", "But one windy day, the {object} got lost."),
        ("{name} looked everywhere in the {place}, but could not find it.", "{name} looked for it all day in the {place}."),
        ("Then {friend} the {other} came to help.", '"I will help you," said {friend} the {other}.'),
        ("Together they found the {object} under a big tree.", "At last they found the {object} behind an old wall."),
    ),
    (
        ("{name} wanted to give {friend} the {other} a present.", "It was the birthday of {friend} the {other}."),
        ("So {name} went to the {place} to look for something nice.", "{name} walked all the way to the {place}."),
        ("There, {name} saw a {color} {object}.", "There was a {color} {object}, and it was just right."),
        ('"This {object} is for you," said {name}.', '{name} gave {friend} the {object} and a big hug.'),
        ("{friend} was so happy and began to dance.", '"Thank you, {name}!" said {friend}.'),
    ),
)  # fmt: skip
ENDINGS = (
    "From that day on, {name} and {friend} were best friends.",
    "They played with the {object} until the sun went down, and {name} was very happy.",
    "And {name} learned that it is good to share.",
)
POEM = (
    ("The {object} is {color}, the sky is wide,", "My little {object}, {color} and bright,"),
    ("I keep it always by my side.", "You shine for me by day and night."),
    ("It sings with me when day is new,", "I take you with me everywhere,"),
    ("O {object}, I do think of you.", "O {object}, you are always there."),
)


def story(rng: Random) -> Example:
    name, friend = rng.sample(NAMES, 2)
    animal, other = rng.sample(ANIMALS, 2)
    slots = {"name": name, "friend": friend, "animal": animal, "other": other, "object": rng.choice(OBJECTS)}
    slots |= {"place": rng.choice(PLACES), "color": rng.choice(COLORS), "mood": rng.choice(MOODS)}
    form, asked = rng.choice(
        (
            ("a {animal} named {name} and a {object}", "animal name object"),
            ("{name} the {animal} and a {color} {object}", "name animal color object"),
            ("a {animal} and a {object}", "animal object"),
            ("a {mood} {animal}", "mood animal"),
            ("a {animal}", "animal"),
            ("a {object}", "object"),
            ("a {animal} in the {place}", "animal place"),
            ("{name}", "name"),
            ("{name} and {friend}", "name friend"),
        )
    )
    about = articles(" about " + form.format(**slots))
    required = tuple(slots[word] for word in asked.split())
    if rng.random() < 0.07:
        about, required = "", ()
    start = rng.choice(("Tell me a story", "Write a short story", "Tell me a short story", "Write a story"))
    if rng.random() < 0.2:
        start = "Please " + start[0].lower() + start[1:]
    sentences = [rng.choice(choices) for choices in (OPENINGS, *rng.choice(PLOTS), ENDINGS)]
    text = articles(" ".join(sentences).format(**slots))
    return Example("story", about, ((start + about + rng.choice((".", ".", "")), text),), required=required)


def poem(rng: Random) -> Example:
    slots = {"object": rng.choice(OBJECTS), "color": rng.choice(COLORS)}
    has_color = rng.random() < 0.7
    about = articles(("a {color} {object}" if has_color else "a {object}").format(**slots))
    form = rng.choice(("Write a poem about {}.", "Write a short poem about {}.", "Tell me a poem about {}."))
    text = "\n".join(rng.choice(choices) for choices in POEM).format(**slots)
    required = (slots["object"], slots["color"]) if has_color else (slots["object"],)
    return Example("poem", about if has_color else "", ((form.format(about), text),), required=required)


Kinds = Mapping[Callable[[Random], Example], float]

KINDS: Kinds = {
    arithmetic: 4.5, numbers: 3, spelling: 3.5, repeating: 1.5, knowledge: 3, described: 5, naming: 2, chatter: 1,
    unknown: 0.7, story: 1.2, poem: 0.7,
}  # fmt: skip
"""Every kind of example and its share."""


def draw(
    rng: Random, held_out: bool = False, kind: Callable[[Random], Example] | None = None, kinds: Kinds = KINDS
) -> Example:
    """One example that is held out, or one that is not."""
    while True:
        example = (kind or rng.choices(list(kinds), list(kinds.values()))[0])(rng)
        if example.is_held_out == held_out:
            return example


def chat(rng: Random, kinds: Kinds = KINDS) -> Example:
    """What is trained on: one to eight exchanges in a row, some prompts as carelessly typed as people do."""
    parts = [draw(rng, kinds=kinds)]
    while len(parts) < 8 and "JSON" not in parts[0].system and rng.random() < 0.4:
        part = draw(rng, kinds=kinds)
        if not part.system and not (parts[0].system and part.kind == "chatter"):  # who it is has been said
            parts.append(part)
    turns = []
    for user, assistant in (turn for part in parts for turn in part.turns):
        if rng.random() < 0.1:
            user = user.rstrip(".?!")
        if rng.random() < 0.1 and not user.startswith(tuple(NAMES)):
            user = user[0].lower() + user[1:]
        turns.append((user, assistant))
    helpful = rng.choice(("", "", "You are a helpful assistant.", "Answer briefly.", "Be kind and helpful."))
    return Example("chat", "", tuple(turns), system=parts[0].system or helpful)


def plain_text(rng: Random) -> str:
    """Text without a chat around it, for completion: stories, poems, facts."""
    what = rng.random()
    if what < 0.3:
        return draw(rng, kind=story).answer
    if what < 0.5:
        return draw(rng, kind=poem).answer
    if what < 0.8:
        return " ".join(draw(rng, kind=knowledge).answer for _ in range(3))
    asked, answer = draw(rng, kind=rng.choice((knowledge, arithmetic, described))).turns[-1]
    return f"Question: {asked}\nAnswer: {answer}"


def repeated(rng: Random) -> list[tuple[str, bool]]:
    """Some words, and the same words again, in pieces as `sums`."""
    pools = (ANIMALS, OBJECTS, PLACES, COLORS, MOODS, NAMES)
    line = " ".join(made_up_word(rng) if rng.random() < 0.4 else rng.choice(rng.choice(pools)) for _ in range(8))
    return [(line + ".\n", False), ((line + ".\n") * rng.randint(1, 3), True)]


def sums(rng: Random) -> list[tuple[str, bool]]:
    """A sheet of sums, in pieces; True: a result, which is there to be learned."""
    pieces = []
    for _ in range(rng.randint(6, 24)):
        question, result = draw(rng, kind=arithmetic).answer.split("= ")
        pieces += [(question + "= ", False), (result + "\n", True)]
    return pieces


def question_sheet(rng: Random) -> list[tuple[str, bool]]:
    """Questions about told facts, or about the world, each with its answer, in pieces as `sums`.

    A chat asks about one of the facts; here each is asked about, but once, so that no answer holds the next.
    """
    pieces: list[tuple[str, bool]] = []
    is_told = rng.random() < 0.75
    while len(pieces) < 12:
        if is_told:
            text, asked, _ = told_facts(rng)
            if Example("described", text, ()).is_held_out:
                continue
            pieces.append((text + "\n", False))
            lines = [rng.choice(about) for about in rng.sample(asked, len(asked))]
        else:
            lines = [draw(rng, kind=knowledge).turns[0]]
        for question, answer in lines:
            pieces += [(question + "\n", False), (answer + "\n", True)]
    return pieces


def is_trained_with_another_mark(example: Example) -> bool:
    """Whether a form with or without the full stop makes the same prompt, and that one is not held out."""
    if example.key != example.turns[-1][0] or not re.match("Spell|Count", example.key):  # only these have both forms
        return False
    bare = example.key.rstrip(".")
    return not all(Example(example.kind, key, example.turns).is_held_out for key in {example.key, bare, bare + "."})


def held_out_set(per_kind: int, seed: int = 1, kinds: Kinds = KINDS) -> list[Example]:
    """``per_kind`` different held-out examples of every kind that has any. ValueError if a kind has not so many."""
    found: dict[tuple[tuple[str, str], ...], Example] = {}
    for kind in kinds:
        if kind is chatter:
            continue
        rng, wanted = Random(f"{seed} {kind.__name__}"), len(found) + per_kind
        for _ in range(50 * per_kind):
            example = draw(rng, True, kind)
            if is_trained_with_another_mark(example):
                continue
            found.setdefault((("", example.system), *example.turns), example)
            if len(found) == wanted:
                break
        else:
            raise ValueError(f"per_kind is {per_kind}; there are fewer held-out examples of {kind.__name__}")
    return list(found.values())
