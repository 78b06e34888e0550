"""What the toy model learns of answers in a given form: JSON, or one word. No model, no file.

JSON is as ``json.dumps`` writes it. As in examples.py, every tenth key is held out.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from serve_app.demo_model.examples import (
    ANIMALS,
    CAPITALS,
    COLORS,
    NAMES,
    OBJECTS,
    PLACES,
    Example,
    arithmetic,
    articles,
    draw,
    facts,
    knowledge,
    made_up_word,
    words,
)

JOBS = words("baker teacher farmer doctor singer painter pilot cook nurse sailor writer dancer")
GOOD = words("love|like|enjoy great|wonderful|lovely|good|nice|perfect")
BAD = words("hate|dislike|regret terrible|awful|bad|ugly|broken|boring")
JSON_SYSTEM = "Answer in JSON."


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def in_a_row(parts: list[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def a_name(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.6 else made_up_word(rng).capitalize()


def a_city(rng: Random) -> str:
    return rng.choice(facts(CAPITALS))[1] if rng.random() < 0.6 else made_up_word(rng).capitalize()


def person(rng: Random, fields: list[str]) -> tuple[str, dict[str, Any]]:
    """A sentence that tells the fields of somebody, in any order, and the fields as it tells them."""
    values: dict[str, Any] = {"name": a_name(rng)}
    clauses = []
    for field in rng.sample(fields, len(fields)):
        if field == "age":
            values["age"] = rng.randrange(1, 100)
            clauses.append(rng.choice(("is {age} years old", "is {age} years old", "is {age}")))
        elif field == "city":
            values["city"] = a_city(rng)
            clauses.append(rng.choice(("lives in {city}", "is from {city}", "comes from {city}")))
        elif field == "pet":
            values["pet"] = rng.choice(ANIMALS)
            clauses.append("has a {pet}")
        elif field == "color":
            values["color"] = rng.choice(COLORS)
            clauses.append(rng.choice(("likes {color}", "loves the color {color}")))
        elif field == "job":
            values["job"] = rng.choice(JOBS)
            clauses.append(rng.choice(("is a {job}", "works as a {job}")))
    start = rng.choice(("{name} ", "{name} ", "{name} ", "My friend {name} "))
    return articles((start + in_a_row(clauses)).format(**values) + "."), values


def some_fields(rng: Random) -> list[str]:
    """Fields beside the name, the age more often than others."""
    others = rng.sample(["city", "pet", "color", "job"], rng.choice((0, 0, 1, 1, 2)))
    return ["age", *others] if rng.random() < 0.75 or not others else others


def json_person(rng: Random) -> Example:
    fields = some_fields(rng)
    text, values = person(rng, fields)
    system = ""
    if rng.random() < 0.6:
        keys = ["name", *rng.sample(fields, rng.randint(1, len(fields)))]
        keys = keys if rng.random() < 0.85 else rng.sample(keys, len(keys))
        named = in_a_row(keys)
        asked = rng.choice(
            (
                f"{text} Give the {named} as JSON.",
                f"{text} Answer as JSON with {named}.",
                f"{text} Return JSON with {named}.",
                f"Extract the {named} as JSON: {text}",
                f"Return {named} as JSON: {text}",
            )
        )
        values = {key: values[key] for key in keys}
    else:
        forms = [
            "{} Extract the person as JSON.",
            "Give this as JSON: {}",
            "{} Answer as JSON.",
            "Extract the person: {}",
        ]
        forms += ["Extract the information: {}", "Write as JSON: {}"]
        asked = rng.choice(forms).format(text)
        if rng.random() < 0.3:
            asked, system = text, JSON_SYSTEM
    return Example("json", text, ((asked, as_json(values)),), system)


def json_result(rng: Random) -> Example:
    """The result of a sum, or a fact."""
    example = arithmetic(rng) if rng.random() < 0.6 else knowledge(rng)
    asked, answer = example.turns[0]
    value: Any
    if example.kind == "arithmetic":
        asked = asked if asked[-1] in "?." else asked.rstrip(" =") + "."
        key, value = "result", int(answer.rstrip(".").split()[-1])
    else:
        key, value = "answer", short_answer(asked, answer)
    if rng.random() < 0.25:
        key = rng.choice(words("sum number value answer output total result"))
        asked += rng.choice((f' Answer as JSON with the key "{key}".', f' Give JSON with the key "{key}".'))
    elif rng.random() < 0.15:
        return Example("json", example.key, ((asked, as_json({key: value})),), JSON_SYSTEM)
    else:
        asked += rng.choice(
            (" Answer as JSON.", " Answer as JSON.", " Answer in JSON.", " Reply as JSON.", " Give JSON.")
        )
    return Example("json", example.key, ((asked, as_json({key: value})),))


def json_list(rng: Random) -> Example:
    if rng.random() < 0.4:
        values = rng.sample(range(10), rng.randint(3, 5))
        text = ", ".join(map(str, values))
        return Example("json", text, ((f"Sort these numbers: {text}. Answer as JSON.", as_json(sorted(values))),))
    pool = rng.choice((ANIMALS, OBJECTS, COLORS, PLACES))
    values_of = [made_up_word(rng) if rng.random() < 0.2 else word for word in rng.sample(pool, rng.randint(2, 4))]
    text = in_a_row(values_of)
    form = rng.choice(("Give {} as a JSON list.", "Write {} as a JSON list.", "Make a JSON list of {}."))
    return Example("json", text, ((form.format(text), as_json(values_of)),))


def json_thing(rng: Random) -> Example:
    name, color, thing = a_name(rng), rng.choice(COLORS), rng.choice(OBJECTS)
    text, values = articles(f"{name} has a {color} {thing}."), {"name": name, "color": color, "object": thing}
    keys = rng.sample(list(values), rng.choice((2, 3, 3)))
    named = in_a_row(keys)
    asked = rng.choice((f"{text} Give the {named} as JSON.", f"Extract the {named} as JSON: {text}"))
    return Example("json", text, ((asked, as_json({key: values[key] for key in keys})),))


def json_answer(rng: Random) -> Example:
    """An object or a list, with the keys that the prompt names, or that the task has."""
    return rng.choices((json_person, json_result, json_list, json_thing), (5, 4, 1, 1))[0](rng)


def short_answer(asked: str, answer: str) -> str:
    """The word of a fact's answer that the question does not hold."""
    if " comes " in answer:
        return answer.split()[0]
    return answer.rstrip(".").split()[-1]


def brief(rng: Random) -> Example:
    """One word or number, where the prompt asks for no more; and whether a sentence is kind."""
    what = rng.random()
    if what < 0.4:
        example = draw(rng, kind=arithmetic)
        asked, answer = example.turns[0]
        asked = asked if asked[-1] in "?." else asked.rstrip(" =") + "."
        form = rng.choice(("Answer with the number only.", "Answer with a number.", "Only the number."))
        return Example("brief", example.key, ((f"{asked} {form}", answer.rstrip(".").split()[-1]),))
    if what < 0.7:
        asked, answer = knowledge(rng).turns[0]
        form = rng.choice(("Answer with one word.", "One word.", "Answer in one word."))
        return Example("brief", asked, ((f"{asked} {form}", short_answer(asked, answer)),))
    is_good = rng.random() < 0.5
    verbs, adjectives = (part.split("|") for part in (GOOD if is_good else BAD))
    thing = made_up_word(rng) if rng.random() < 0.3 else rng.choice((*OBJECTS, *ANIMALS))
    text = rng.choice((f"I {rng.choice(verbs)} this {thing}.", f"This {thing} is {rng.choice(adjectives)}."))
    text = text if rng.random() < 0.7 else text[:-1] + "!"
    form = rng.choice(("Is this positive or negative? {}", "Classify the sentiment: {}", "Positive or negative? {}"))
    return Example("brief", text[:-1], ((form.format(text), "positive" if is_good else "negative"),))


def practised(rng: Random) -> Example:
    """A row of short answers, half of them sums: with nothing said before, a result is learned slowly."""
    turns: list[tuple[str, str]] = []
    while len(turns) < 12:
        what = rng.random()
        if what < 0.25:
            kind = json_result
        elif what < 0.5:
            kind = json_answer
        else:
            kind = brief
        example = kind(rng)
        if not example.is_held_out and not example.system:
            turns += example.turns
    return Example("chat", "", tuple(turns))
