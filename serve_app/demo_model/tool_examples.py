"""What the toy model learns of tools: to call one where it fits, and to state what it answered. No model, no file.

A tool is offered as the JSON that clients send; a call and a result are written as the chat template writes them. As in
examples.py, every tenth key is held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    chatter,
    described,
    draw,
    entries,
    facts,
    knowledge,
    made_up_word,
    naming,
    numbers,
    poem,
    repeating,
    spelling,
    story,
    words,
)
from serve_app.demo_model.json_examples import (
    a_city,
    a_name,
    as_json,
    brief,
    in_a_row,
    json_answer,
    person,
    some_fields,
)

CALL, CALL_END = "<tool_call>\n", "\n</tool_call>"
RESULT, RESULT_END = "<tool_response>\n", "\n</tool_response>"


@dataclass(frozen=True)
class Tool:
    """What a client offers."""

    family: str
    """What it does; two of one family are not offered together."""
    name: str
    description: str
    parameters: tuple[tuple[str, str], ...]
    """(name, JSON type)."""


@dataclass(frozen=True)
class Task:
    """A question for one tool, what it is called with (more than once, if asked about more), and what comes of it."""

    key: str
    question: str
    arguments: tuple[dict[str, Any], ...]
    results: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Family:
    """Makes a tool, and tasks for it."""

    tool: Callable[[Random], Tool]
    ask: Callable[[Random, Tool], Task]


# ---- tools that look something up ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lookup:
    """A tool with one parameter. Lines and bars separate the wordings; ``{}`` is what is looked up."""

    names: str
    descriptions: str
    parameters: str
    questions: str
    subject: Callable[[Random], Any]
    value: Callable[[Random], Any]
    """What the tool finds; put as text, or as JSON under one of ``keys``."""
    keys: str
    answer: str
    """``{}`` and ``{}``: what was looked up, and what was found."""
    both: str = ""
    """A question about two subjects."""


def a_thing(rng: Random) -> str:
    return made_up_word(rng) if rng.random() < 0.3 else rng.choice(OBJECTS)


def a_country(rng: Random) -> str:
    return rng.choice(facts(CAPITALS))[0] if rng.random() < 0.6 else made_up_word(rng).capitalize()


def a_topic(rng: Random) -> str:
    pools = (ANIMALS, OBJECTS, PLACES, COLORS)
    return " ".join(
        made_up_word(rng) if rng.random() < 0.3 else rng.choice(rng.choice(pools)) for _ in range(rng.choice((1, 1, 2)))
    )


def some_words(rng: Random) -> str:
    return " ".join(rng.choice(rng.choice((ANIMALS, OBJECTS, PLACES, COLORS))) for _ in range(rng.randint(1, 4)))


def some_weather(rng: Random) -> str:
    sky = rng.choice(words("sunny rainy cloudy windy cold warm snowy foggy stormy hot dry"))
    return rng.choice((sky, sky, f"{sky}, {rng.randrange(36)} degrees", f"{rng.randrange(36)} degrees"))


def some_money(rng: Random) -> Any:
    amount = rng.randrange(1, 10 ** rng.randint(1, 4))
    return rng.choice((amount, f"{amount} dollars", f"{amount} euros"))


LOOKUPS = {
    "weather": Lookup(
        "get_weather weather current_weather get_current_weather weather_in check_weather",
        "Get the weather in a city.|The current weather in a place.|Tells the weather.|Get weather",
        "city location place",
        """What is the weather in {}?|What is the weather like in {}?|How is the weather in {}?|Tell me the weather in {}.
        What's the weather in {}?|What is the weather in {} today?|Weather in {}?""",
        a_city, some_weather, "weather forecast sky conditions", "The weather in {} is {}.",
        "What is the weather in {} and in {}?",
    ),
    "price": Lookup(
        "get_price price find_price price_of lookup_price check_price",
        "Get the price of an item.|What a thing costs.|Finds the price of a product.",
        "item product thing name",
        "What is the price of the {}?|How much is the {}?|What does the {} cost?|How much does the {} cost?",
        a_thing, some_money, "price cost amount", "The {} costs {}.",
        "What is the price of the {} and of the {}?",
    ),
    "age": Lookup(
        "get_age age_of find_age lookup_age", "Get the age of a person.|How old somebody is.", "name person user",
        "How old is {}?|What is the age of {}?|Find the age of {}.",
        a_name, lambda rng: rng.randrange(1, 100), "age years", "{} is {} years old.",
    ),
    "phone": Lookup(
        "get_phone_number find_phone phone_book lookup_number", "Get the phone number of a person.|The phone book.",
        "name person user",
        "What is the phone number of {}?|Find the phone number of {}.|What number does {} have?",
        a_name, lambda rng: "".join(rng.choices("0123456789", k=rng.randint(4, 7))), "phone number phone_number",
        "The phone number of {} is {}.",
    ),
    "capital": Lookup(
        "get_capital capital_of find_capital country_capital", "Get the capital of a country.|Finds a capital city.",
        "country name land",
        "What is the capital of {}?|Which city is the capital of {}?|Find the capital of {}.",
        a_country, a_city, "capital city", "The capital of {} is {}.",
    ),
    "search": Lookup(
        "search lookup look_up find search_web web_search", "Search the web.|Look up a word.|Finds what is known.",
        "query word term text q",
        "Look up {}.|Search for {}.|Search the web for {}.|Find out about {}.|Look up the word {}.",
        a_topic, some_words, "result text found", "I found this about {}: {}.",
    ),
    "order": Lookup(
        "get_order order_status check_order find_order", "Get the status of an order.|Where an order is.",
        "id order_id number order",
        "Where is order {}?|What is the status of order {}?|Check order {}.",
        lambda rng: rng.randrange(1, 10 ** rng.randint(1, 5)),
        lambda rng: rng.choice(words("shipped lost ready paid packed late delivered open")),
        "status state", "Order {} is {}.",
    ),
}  # fmt: skip


def lookup_family(family: str, lookup: Lookup) -> Family:
    def tool(rng: Random) -> Tool:
        kind = "integer" if family == "order" else "string"
        parameters = ((rng.choice(words(lookup.parameters)), kind),)
        name, description = rng.choice(words(lookup.names)), rng.choice(entries(lookup.descriptions)).strip()
        return Tool(family, name, description, parameters)

    def ask(rng: Random, tool: Tool) -> Task:
        parameter = tool.parameters[0][0]
        subjects = [lookup.subject(rng)]
        form = rng.choice(entries(lookup.questions)).strip()
        if lookup.both and rng.random() < 0.12:
            form, subjects = lookup.both, [*subjects, lookup.subject(rng)]
        found = [lookup.value(rng) for _ in subjects]
        results = []
        for subject, value in zip(subjects, found, strict=True):
            shape, key = rng.random(), rng.choice(words(lookup.keys))
            if shape < 0.5:
                results.append(str(value))
            elif shape < 0.85:
                results.append(as_json({key: value}))
            else:
                results.append(as_json({parameter: subject, key: value}))
        answer = " ".join(lookup.answer.format(*pair) for pair in zip(subjects, found, strict=True))
        question = form.format(*subjects)
        return Task(question, question, tuple({parameter: subject} for subject in subjects), tuple(results), answer)

    return Family(tool, ask)


# ---- tools that reckon -----------------------------------------------------------------------------------------------

OPERATIONS = {
    "+": ("add sum plus add_numbers", "plus", "Add two numbers.|The sum of two numbers."),
    "-": (
        "subtract minus difference subtract_numbers",
        "minus",
        "Subtract two numbers.|Takes one number from another.",
    ),
    "*": ("multiply times product multiply_numbers", "times", "Multiply two numbers.|The product of two numbers."),
    "/": ("divide quotient divide_numbers", "divided by", "Divide two numbers.|The quotient of two numbers."),
}
PAIRS = ("a b", "x y", "first second", "left right", "num1 num2", "a b")


def operation_family(sign: str) -> Family:
    names, _, descriptions = OPERATIONS[sign]

    def tool(rng: Random) -> Tool:
        kind = rng.choice(("integer", "number"))
        parameters = tuple((name, kind) for name in words(rng.choice(PAIRS)))
        return Tool(sign, rng.choice(words(names)), rng.choice(entries(descriptions)), parameters)

    def ask(rng: Random, tool: Tool) -> Task:
        return reckon(rng, sign, tool)

    return Family(tool, ask)


def calculator_tool(rng: Random) -> Tool:
    name = rng.choice(words("calculator calculate compute evaluate calc math"))
    description = rng.choice(("Calculate an expression.", "Evaluates an arithmetic expression.", "A calculator."))
    return Tool("calculator", name, description, ((rng.choice(words("expression expression formula term")), "string"),))


def use_calculator(rng: Random, tool: Tool) -> Task:
    return reckon(rng, rng.choice(list(OPERATIONS)), tool)


def reckon(rng: Random, sign: str, tool: Tool) -> Task:
    """Numbers of up to four digits."""
    a, b = (rng.randrange(1, 10 ** rng.randint(1, 4)) for _ in "ab")
    if sign == "/":
        b = b % 100 + 1
        a = a // b * b or b
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    word = OPERATIONS[sign][1]
    shown = rng.choice((f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a} {word} {b}", f"{a} {word} {b}", f"{a}{sign}{b}"))
    question = rng.choice(("What is {}?", "What is {}?", "Calculate {}.", "How much is {}?")).format(shown)
    if sign == "+" and rng.random() < 0.2:
        question = rng.choice((f"Add {a} and {b}.", f"What is the sum of {a} and {b}?"))
    if sign == "*" and rng.random() < 0.2:
        question = f"Multiply {a} and {b}."
    names = [name for name, _ in tool.parameters]
    arguments: dict[str, Any] = {names[0]: f"{a} {sign} {b}"}
    if tool.family != "calculator":
        arguments = {names[0]: a, names[1]: b}
    text = rng.choice((str(result), str(result), as_json({rng.choice(words("result value answer")): result})))
    return Task(f"{a}{sign}{b}", question, (arguments,), (text,), f"{a} {sign} {b} = {result}.")


# ---- other tools -----------------------------------------------------------------------------------------------------


def person_tool(rng: Random) -> Tool:
    """A record to fill in from a sentence: what clients send that want an object of some class."""
    names = "Person Person person User UserInfo save_person add_user final_result extract_person Character"
    fields = some_fields(rng)
    types = (("name", "string"), *((field, "integer" if field == "age" else "string") for field in fields))
    descriptions = (
        "Save a person.",
        "A person.",
        "The final response which ends this conversation",
        "Extract a person.",
    )
    return Tool("person", rng.choice(words(names)), rng.choice(descriptions), types)


def tell_person(rng: Random, tool: Tool) -> Task:
    fields = [name for name, _ in tool.parameters if name != "name"]
    extra = [field for field in some_fields(rng) if field not in fields] if rng.random() < 0.2 else []
    text, values = person(rng, fields + extra)
    question = rng.choice(("{}", "{}", "Extract the person: {}", "Save this: {}", "Extract: {}")).format(text)
    arguments = {name: values[name] for name, _ in tool.parameters}
    return Task(text, question, (arguments,), (rng.choice(("saved", "ok", "done", '{"ok": true}')),), "Done.")


def clock_tool(rng: Random) -> Tool:
    return Tool("clock", rng.choice(words("get_time current_time clock time_now")), "Get the current time.", ())


def ask_time(rng: Random, tool: Tool) -> Task:
    time = f"{rng.randrange(24)}:{rng.randrange(60):02}"
    result = rng.choice((time, as_json({"time": time})))
    question = rng.choice(("What time is it?", "What is the time?", "Tell me the time.", "How late is it?"))
    return Task("", question, ({},), (result,), f"It is {time}.")


def other_tool(rng: Random) -> Tool:
    """A tool that nobody knows. The question names it."""
    noun = made_up_word(rng) if rng.random() < 0.5 else rng.choice(rng.choice((OBJECTS, ANIMALS, PLACES)))
    name = f"{rng.choice(words('get find read check set send make open run'))}_{noun}"
    pool = words("id key name value count text size word level color title user")
    pool = [made_up_word(rng) if rng.random() < 0.2 else word for word in rng.sample(pool, rng.choice((1, 1, 2, 3)))]
    types = tuple((parameter, rng.choice(("string", "string", "integer"))) for parameter in dict.fromkeys(pool))
    return Tool("other", name, rng.choice(("A tool.", f"Use the {noun}.", f"Does something with the {noun}.")), types)


def use_other(rng: Random, tool: Tool) -> Task:
    arguments: dict[str, Any] = {}
    for name, kind in tool.parameters:
        if kind == "integer":
            arguments[name] = rng.randrange(10 ** rng.randint(1, 4))
        else:
            arguments[name] = (
                made_up_word(rng) if rng.random() < 0.5 else rng.choice(rng.choice((OBJECTS, NAMES, COLORS)))
            )
    given = in_a_row([f"{name} {value}" for name, value in arguments.items()])
    question = f"{rng.choice(('Call', 'Use', 'Run'))} {tool.name} with {given}."
    value = rng.choice((rng.randrange(1000), some_words(rng), made_up_word(rng)))
    result = rng.choice((str(value), as_json({rng.choice(words("result value output")): value})))
    return Task(question, question, (arguments,), (result,), f"The result is {value}.")


FAMILIES: dict[str, Family] = {
    **{family: lookup_family(family, lookup) for family, lookup in LOOKUPS.items()},
    **{sign: operation_family(sign) for sign in OPERATIONS},
    "calculator": Family(calculator_tool, use_calculator),
    "person": Family(person_tool, tell_person),
    "clock": Family(clock_tool, ask_time),
    "other": Family(other_tool, use_other),
}
SHARES = {"weather": 3.0, "calculator": 3.0, "price": 1.5, "person": 2.5, "other": 2.5, "search": 1.5, "clock": 0.4}
"""How often a tool is offered; 1 where it is not named."""


# ---- chats with tools ------------------------------------------------------------------------------------------------


def offered(rng: Random, tool: Tool) -> str:
    """The tool as JSON, with what one client writes and another leaves out."""
    has_titles, has_texts = rng.random() < 0.1, rng.random() < 0.15
    properties = {}
    for name, kind in tool.parameters:
        about = {"title": name.replace("_", " ").title()} if has_titles else {}
        about |= {"description": f"The {name}."} if has_texts else {}
        properties[name] = {"type": kind, **about} if rng.random() < 0.8 else {**about, "type": kind}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if tool.parameters and rng.random() < 0.85:
        schema["required"] = [name for name, _ in tool.parameters]
    if rng.random() < 0.2:
        schema["additionalProperties"] = False
    if rng.random() < 0.25:
        schema = dict(sorted(schema.items()))
    if rng.random() < 0.05:
        schema["title"] = tool.name
    function: dict[str, Any] = {"name": tool.name}
    if rng.random() < 0.65:
        function["description"] = tool.description
    if tool.parameters or rng.random() < 0.7:
        function["parameters"] = schema
    if rng.random() < 0.1:
        function["strict"] = True
    return as_json({"type": "function", "function": function})


def some_tools(rng: Random) -> list[Tool]:
    """One to three; not a calculator beside a tool for sums."""
    names: list[str] = []
    count = rng.choice((1, 1, 1, 2, 2, 3))
    if count > 1 and rng.random() < 0.2:
        names = rng.sample(list(OPERATIONS), count)
    while len(names) < count:
        name = rng.choices(list(FAMILIES), [SHARES.get(name, 1.0) for name in FAMILIES])[0]
        taken = {*names, *(OPERATIONS if "calculator" in names else ())}
        if name not in taken and not (name == "calculator" and taken & set(OPERATIONS)):
            names.append(name)
    return [FAMILIES[name].tool(rng) for name in names]


def call_text(tool: Tool, arguments: dict[str, Any]) -> str:
    return CALL + as_json({"name": tool.name, "arguments": arguments}) + CALL_END


def exchange(tool: Tool, task: Task) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two turns: the question with the call, the result with the answer."""
    calls = "\n".join(call_text(tool, arguments) for arguments in task.arguments)
    results = "\n".join(RESULT + result + RESULT_END for result in task.results)
    return (task.question, calls), (results, task.answer)


def calling(rng: Random) -> Example:
    """One to three tools, and a question for one of them."""
    tools = some_tools(rng)
    tool = rng.choice(tools)
    task = FAMILIES[tool.family].ask(rng, tool)
    return Example("calling", task.key, exchange(tool, task)[:1], tools=tuple(offered(rng, tool) for tool in tools))


def reporting(rng: Random) -> Example:
    """The same, and what the tool answered."""
    tools = some_tools(rng)
    tool = rng.choice(tools)
    task = FAMILIES[tool.family].ask(rng, tool)
    key = task.key and f"{task.key} {task.answer}"
    return Example("reporting", key, exchange(tool, task), tools=tuple(offered(rng, tool) for tool in tools))


def is_held_out(task: Task) -> bool:
    """Under either kind."""
    keys = (("calling", task.key), ("reporting", f"{task.key} {task.answer}"))
    return bool(task.key) and any(Example(kind, key, ()).is_held_out for kind, key in keys)


OTHER_PARTS: tuple[Callable[[Random], Example], ...] = (chatter, spelling, repeating, naming, story, poem)
"""What no tool does."""
SYSTEMS = ("You are a helpful assistant.", "Use the tools.", "Answer briefly.", "Be kind and helpful.")


def tool_chat(rng: Random) -> Example:
    """What is trained on: tools, one to three exchanges with them, and some that need none."""
    tools = some_tools(rng)
    families = {tool.family for tool in tools}
    others = list(OTHER_PARTS)
    if not families & {*OPERATIONS, "calculator"}:
        others += [arithmetic, numbers]
    if "person" not in families:
        others += [described, json_answer] if not families & {*OPERATIONS, "calculator", "capital"} else []
    if "capital" not in families:
        others.append(knowledge)
    turns: list[tuple[str, str]] = []
    system = rng.choice(("", "", "", *SYSTEMS))
    for _ in range(rng.choice((1, 2, 2, 3, 3))):
        if rng.random() < 0.2:
            part = draw(rng, kind=rng.choice(others))
            if not part.system:
                turns += part.turns
            continue
        tool = rng.choice(tools)
        task = FAMILIES[tool.family].ask(rng, tool)
        if not is_held_out(task):
            (question, call), told = exchange(tool, task)
            turns += [(question.rstrip(".?!") if rng.random() < 0.1 else question, call), told]
    if not turns:
        return tool_chat(rng)
    return Example("chat", "", tuple(turns), system=system, tools=tuple(offered(rng, tool) for tool in tools))


TOOL_KINDS: dict[Callable[[Random], Example], float] = {calling: 0.0, reporting: 0.0, json_answer: 6.0, brief: 2.0}
"""Further kinds and their share of the chats. Those with tools have chats of their own."""
