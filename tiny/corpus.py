"""The text and the pictures mtpress-tiny learns from and is judged on, made from a seed.

In: a split name and an index. Out: one `Document` (chat messages or plain text, with the pictures it shows).
The same (split, index) always gives the same document. Held-out material is disjoint from the training split by
construction: sums by their two numbers (`is_held_out_sum`), everything else by the seed of its split.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

SPLITS = {"train": 11, "held-out": 23, "calibration": 37, "evaluation": 53}

NAMES = [
    "Mia",
    "Tom",
    "Ada",
    "Leo",
    "Zoe",
    "Max",
    "Ivy",
    "Sam",
    "Nora",
    "Finn",
    "Lena",
    "Otto",
    "Ruby",
    "Hugo",
    "Ella",
    "Carl",
    "Rosa",
    "Emil",
    "Jane",
    "Paul",
]
ANIMALS = ["cat", "dog", "fox", "owl", "hen", "pig", "cow", "bee", "ant", "bear", "wolf", "frog", "duck", "goat", "hare"]
THINGS = [
    "book",
    "lamp",
    "kite",
    "drum",
    "ring",
    "coin",
    "bell",
    "map",
    "hat",
    "cup",
    "key",
    "box",
    "pen",
    "bag",
    "clock",
    "rope",
    "shell",
    "stone",
    "flute",
    "basket",
]
PLACES = [
    "market",
    "river",
    "garden",
    "forest",
    "harbor",
    "school",
    "mill",
    "tower",
    "bridge",
    "library",
    "station",
    "bakery",
    "field",
    "lake",
    "hill",
]
FOODS = ["bread", "soup", "cheese", "rice", "cake", "pears", "plums", "honey", "beans", "salad", "tea", "milk"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WEATHER = ["warm and sunny", "cold and windy", "grey and wet", "calm and clear", "dark and stormy"]
FEELINGS = ["happy", "tired", "proud", "hungry", "calm", "curious"]
TOWNS = [
    "Arlen",
    "Brook",
    "Corvin",
    "Dalmar",
    "Elsby",
    "Farrow",
    "Gorse",
    "Hollin",
    "Istra",
    "Jarrow",
    "Kelm",
    "Lorne",
    "Marsk",
    "Nimes",
    "Orrin",
    "Pelham",
    "Quill",
    "Rossal",
    "Selwin",
    "Tarn",
    "Umber",
    "Velden",
    "Wick",
    "Yarrow",
]
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLORS = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (36, 70, 200),
    "yellow": (242, 208, 30),
    "purple": (128, 40, 150),
    "orange": (245, 130, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
GROUNDS = [(120, 120, 120), (150, 170, 175), (170, 150, 140), (95, 105, 115)]

_world = random.Random(7)
RIVERS = {town: _world.choice(["Ald", "Bure", "Cole", "Dane", "Esk", "Fal"]) for town in TOWNS}
CRAFTS = {town: _world.choice(["glass", "wool", "paper", "silver", "clay", "oak chairs"]) for town in TOWNS}
RULERS = {town: _world.choice(NAMES) for town in TOWNS}


@dataclass(frozen=True)
class Picture:
    """What is drawn: (shape, color, center x, center y, radius) in pixels on a ground of `size` (width, height)."""

    size: tuple[int, int]
    ground: tuple[int, int, int]
    items: tuple[tuple[str, str, int, int, int], ...]
    noise_seed: int

    def draw(self) -> Image.Image:
        image = Image.new("RGB", self.size, self.ground)
        pen = ImageDraw.Draw(image)
        for shape, color, x, y, r in self.items:
            fill = COLORS[color]
            if shape == "circle":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            elif shape == "square":
                pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
            elif shape == "triangle":
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
            elif shape == "diamond":
                pen.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=fill)
            elif shape == "ring":
                pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(4, r // 3))
            else:
                bar = max(3, r // 3)
                pen.rectangle((x - bar, y - r, x + bar, y + r), fill=fill)
                pen.rectangle((x - r, y - bar, x + r, y + bar), fill=fill)
        dice = random.Random(self.noise_seed)
        for _ in range(self.size[0] * self.size[1] // 60):
            at = dice.randrange(self.size[0]), dice.randrange(self.size[1])
            tint = dice.randint(-14, 14)
            image.putpixel(at, tuple(min(255, max(0, v + tint)) for v in image.getpixel(at)))  # type: ignore[union-attr]
        return image


@dataclass(frozen=True)
class Document:
    """One training document: plain `text`, or `messages` in the chat format with their tools, mode and pictures."""

    kind: str
    text: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool | None = None
    pictures: tuple[Picture, ...] = ()


def is_held_out_sum(a: int, b: int) -> bool:
    """True for the fifth of all two-digit sums that no training document states, in either order."""
    low, high = sorted((a, b))
    return (low * 131 + high * 17) % 5 == 0


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def with_article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


# --- plain text -----------------------------------------------------------------------------------------------------


def story_sentences(dice: random.Random) -> tuple[list[str], dict[str, str]]:
    """A story whose later sentences follow from its earlier ones, and what is true at its end."""
    hero, friend = dice.sample(NAMES, 2)
    town, place, animal = dice.choice(TOWNS), dice.choice(PLACES), dice.choice(ANIMALS)
    thing, color = dice.choice(THINGS), dice.choice(list(COLORS))
    day, weather, food, feeling = dice.choice(DAYS), dice.choice(WEATHER), dice.choice(FOODS), dice.choice(FEELINGS)
    said = [f"{hero} lives in {town}, a small town on the river {RIVERS[town]}."]
    said.append(f"{hero} has {with_article(color)} {thing} and {with_article(animal)}.")
    said.append(
        dice.choice(
            [
                f"On {day} the weather was {weather}, so {hero} went to the {place} with the {animal}.",
                f"It was {day}, and it was {weather}. {hero} took the {animal} and went to the {place}.",
            ]
        )
    )
    said.append(dice.choice([f"At the {place} {hero} met {friend}.", f"There {hero} met {friend}, an old friend."]))
    holder = hero
    if dice.random() < 0.6:
        said.append(f'"I like your {color} {thing}," said {friend}.')
        said.append(dice.choice([f"{hero} smiled and gave it to {friend}.", f"So {hero} gave the {color} {thing} to {friend}."]))
        holder = friend
    else:
        said.append(f'"May I keep your {color} {thing}?" asked {friend}.')
        said.append(dice.choice([f"{hero} laughed and kept it.", f"But {hero} said no and kept the {color} {thing}."]))
    said.append(f"Then {hero} and {friend} sat down near the {place} and ate {food}.")
    if dice.random() < 0.5:
        said.append(f"The {animal} ate some {food} too.")
    said.append(f"In the evening {hero} walked home with the {animal}. {hero} was {feeling}.")
    said.append(f"Now {holder} has the {color} {thing}.")
    truth = {
        "hero": hero, "friend": friend, "town": town, "place": place, "animal": animal, "thing": thing,
        "color": color, "day": day, "food": food, "holder": holder, "feeling": feeling,
    }  # fmt: skip
    return said, truth


def story(dice: random.Random) -> Document:
    said, _ = story_sentences(dice)
    return Document("story", text=" ".join(said))


def town_sentences(town: str) -> list[str]:
    return [
        f"{town} lies on the river {RIVERS[town]}.",
        f"{town} is known for its {CRAFTS[town]}.",
        f"The mayor of {town} is {RULERS[town]}.",
    ]


def almanac(dice: random.Random) -> Document:
    return Document("almanac", text=" ".join(" ".join(town_sentences(t)) for t in dice.sample(TOWNS, 3)))


# --- chat -----------------------------------------------------------------------------------------------------------


def reading(dice: random.Random) -> Document:
    said, true = story_sentences(dice)
    ask, answer = dice.choice(
        [
            (f"Who has the {true['color']} {true['thing']} now?", f"{true['holder']} has the {true['color']} {true['thing']}."),
            (f"Where did {true['hero']} go?", f"{true['hero']} went to the {true['place']}."),
            (f"Where does {true['hero']} live?", f"{true['hero']} lives in {true['town']}."),
            (f"What did {true['hero']} and {true['friend']} eat?", f"They ate {true['food']}."),
            (f"Who did {true['hero']} meet?", f"{true['hero']} met {true['friend']}."),
            ("On which day did it happen?", f"It happened on {true['day']}."),
        ]
    )  # fmt: skip
    return Document("reading", messages=[user(" ".join(said) + "\n\n" + ask), assistant(answer)])


def summary(dice: random.Random) -> Document:
    said, t = story_sentences(dice)
    short = f"{t['hero']} went to the {t['place']} on {t['day']}, met {t['friend']} and ate {t['food']}."
    short += f" In the end {t['holder']} has the {t['color']} {t['thing']}."
    lead = dice.choice(["Summarize this story:", "Give a short summary:", "Sum up in two sentences:"])
    return Document("summary", messages=[user(f"{lead}\n\n{' '.join(said)}"), assistant(short)])


def tell(dice: random.Random) -> Document:
    said, t = story_sentences(dice)
    ask = f"Tell me a story about {t['hero']}, {t['friend']} and {with_article(t['color'])} {t['thing']} in {t['town']}."
    return Document("tell", messages=[user(ask), assistant(" ".join(said))])


def town_fact(dice: random.Random) -> Document:
    messages = []
    for town in dice.sample(TOWNS, dice.choice([1, 1, 2])):
        ask, answer = dice.choice(
            [
                (f"Which river is {town} on?", f"{town} lies on the river {RIVERS[town]}."),
                (f"What is {town} known for?", f"{town} is known for its {CRAFTS[town]}."),
                (f"Who is the mayor of {town}?", f"The mayor of {town} is {RULERS[town]}."),
                (f"Tell me about {town}.", " ".join(town_sentences(town))),
            ]
        )
        messages += [user(ask), assistant(answer)]
    return Document("town", messages=messages)


def sum_pair(dice: random.Random, held_out: bool) -> tuple[int, int]:
    while True:
        a, b = dice.randint(10, 99), dice.randint(10, 99)
        if is_held_out_sum(a, b) == held_out:
            return a, b


def sum_question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def sum_answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def sum_thought(a: int, b: int) -> str:
    """The sum digit by digit, ones first."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return (
        f"Ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}.\n"
        f"Tens: {a // 10} + {b // 10} + {carry} = {tens}.\nSo the sum is {a + b}."
    )


def direct_sums(dice: random.Random, held_out: bool = False) -> Document:
    messages = []
    for _ in range(3):
        a, b = sum_pair(dice, held_out)
        messages += [user(sum_question(a, b)), assistant(sum_answer(a, b))]
    return Document("sum", messages=messages)


def sum_table(dice: random.Random) -> Document:
    pairs = [sum_pair(dice, held_out=False) for _ in range(10)]
    return Document("sum", text="\n".join(sum_answer(a, b) for a, b in pairs))


def thought_sum(dice: random.Random, held_out: bool = False) -> Document:
    a, b = sum_pair(dice, held_out)
    messages = [user(sum_question(a, b)), assistant(sum_answer(a, b), reasoning_content=sum_thought(a, b))]
    if dice.random() < 0.3:
        return Document("thought", messages=[{"role": "system", "content": "<|think_on|>"}, *messages])
    return Document("thought", messages=messages, enable_thinking=True)


def thought_reading(dice: random.Random) -> Document:
    said, t = story_sentences(dice)
    thing = f"the {t['color']} {t['thing']}"
    gave = f"{t['hero']} gave it to {t['friend']}" if t["holder"] == t["friend"] else f"{t['hero']} kept it"
    thought = f"At first {t['hero']} has {thing}. Then {gave}. So {t['holder']} has it."
    messages = [
        user(" ".join(said) + f"\n\nWho has {thing} now?"),
        assistant(f"{t['holder']} has {thing}.", reasoning_content=thought),
    ]
    return Document("thought", messages=messages, enable_thinking=True)


def listing(dice: random.Random) -> Document:
    words = dice.sample(dice.choice([ANIMALS, THINGS, FOODS, PLACES]), dice.randint(3, 5))
    joined = ", ".join(words)
    ask, answer = dice.choice(
        [
            (f"Sort these words: {joined}", ", ".join(sorted(words))),
            (f"Reverse this list: {joined}", ", ".join(reversed(words))),
            (f"How many words are in this list: {joined}", f"There are {len(words)} words in the list."),
            (f"What is the first word of: {joined}", f"The first word is {words[0]}."),
            (f"What is the last word of: {joined}", f"The last word is {words[-1]}."),
            (f"Number these words: {joined}", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1))),
        ]
    )
    return Document("list", messages=[user(ask), assistant(answer)])


STEPS = {
    "make tea": ["Boil some water.", "Put the tea in a cup.", "Pour the water on the tea.", "Wait three minutes.", "Add milk or honey."],
    "bake bread": ["Mix flour, water and salt.", "Add the yeast.", "Let the dough rest for an hour.", "Heat the oven.", "Bake the bread for thirty minutes."],
    "fly a kite": ["Go to an open field.", "Wait for some wind.", "Hold the kite high.", "Run against the wind.", "Let the rope out slowly."],
    "clean a lamp": ["Turn the lamp off.", "Wait until it is cold.", "Wipe it with a dry cloth.", "Clean the glass with warm water.", "Turn the lamp on again."],
    "plant a tree": ["Dig a deep hole.", "Put the tree in the hole.", "Fill the hole with earth.", "Give it plenty of water.", "Tie it to a strong stick."],
}  # fmt: skip


def how_to(dice: random.Random) -> Document:
    task = dice.choice(list(STEPS))
    ask = dice.choice([f"How do I {task}?", f"Explain how to {task}.", f"What are the steps to {task}?"])
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(STEPS[task], 1))
    return Document("how-to", messages=[user(ask), assistant(f"Here is how to {task}:\n\n{steps}")])


OPERATIONS = {
    "adds": ("add", "+"), "subtracts": ("subtract", "-"), "multiplies": ("multiply", "*"), "divides": ("divide", "/"),
}  # fmt: skip


def code(dice: random.Random) -> Document:
    a, b = dice.sample(["a", "b", "x", "y", "n", "m"], 2)
    things = dice.choice(THINGS) + "s"
    verb, (name, sign) = dice.choice(list(OPERATIONS.items()))
    ask, lines = dice.choice(
        [
            (f"Write a Python function that {verb} {a} and {b}.", [f"def {name}({a}, {b}):", f"    return {a} {sign} {b}"]),
            (f"Write a Python function that counts the {things} in a list.", [f"def count_{things}({things}):", "    count = 0", f"    for item in {things}:", "        count += 1", "    return count"]),
            (f"Write a Python loop that prints the numbers from 1 to {a}.", [f"for i in range(1, {a} + 1):", "    print(i)"]),
            (f"Write a Python function that returns the largest of {a} and {b}.", [f"def largest({a}, {b}):", f"    if {a} > {b}:", f"        return {a}", f"    return {b}"]),
            (f"Write a Python class for {with_article(things[:-1])} with a color.", [f"class {things[:-1].title()}:", "    def __init__(self, color):", "        self.color = color"]),
        ]
    )  # fmt: skip
    return Document("code", messages=[user(ask), assistant("```python\n" + "\n".join(lines) + "\n```")])


def smalltalk(dice: random.Random) -> Document:
    name = dice.choice(NAMES)
    turns = [
        ("Hello!", "Hello! How can I help you?"),
        ("Who are you?", "I am mtpress-tiny, a very small language model."),
        (f"My name is {name}.", f"Nice to meet you, {name}."),
        ("How are you?", "I am fine, thank you. How are you?"),
        ("Thank you!", "You are welcome!"),
        ("Goodbye!", "Goodbye, and have a nice day!"),
    ]
    chosen = sorted(dice.sample(range(len(turns)), dice.randint(1, 3)))
    messages: list[dict[str, Any]] = []
    if dice.random() < 0.3:
        messages.append({"role": "system", "content": dice.choice(["You are a kind helper.", "Answer briefly.", "<|think_off|>"])})
    for i in chosen:
        messages += [user(turns[i][0]), assistant(turns[i][1])]
    if 2 in chosen:
        messages += [user("What is my name?"), assistant(f"Your name is {name}.")]
    return Document("smalltalk", messages=messages)


# --- tools ----------------------------------------------------------------------------------------------------------


def tool(function: str, what: str, /, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(schema)}
    return {"type": "function", "function": {"name": function, "description": what, "parameters": parameters}}


TOOLS = {
    "get_weather": tool("get_weather", "Get the weather in a town", town="string"),
    "add": tool("add", "Add two numbers", a="integer", b="integer"),
    "find_person": tool("find_person", "Find where a person is", name="string"),
    "buy": tool("buy", "Buy some food", food="string", count="integer"),
}


def tool_use(dice: random.Random) -> Document:
    wanted = dice.choice(list(TOOLS))
    town, name, food = dice.choice(TOWNS), dice.choice(NAMES), dice.choice(FOODS)
    weather, place, count = dice.choice(WEATHER), dice.choice(PLACES), dice.randint(2, 9)
    a, b = sum_pair(dice, held_out=False)
    ask, arguments, result, answer = {
        "get_weather": (f"What is the weather in {town}?", {"town": town}, weather, f"The weather in {town} is {weather}."),
        "add": (f"Use the tool to add {a} and {b}.", {"a": a, "b": b}, str(a + b), f"{a} + {b} = {a + b}."),
        "find_person": (f"Where is {name}?", {"name": name}, f"at the {place}", f"{name} is at the {place}."),
        "buy": (f"Please buy {count} {food}.", {"food": food, "count": count}, "done", f"I bought {count} {food}."),
    }[wanted]  # fmt: skip
    offered = sorted({wanted, dice.choice(list(TOOLS))})
    call = {"type": "function", "function": {"name": wanted, "arguments": arguments}}
    thinking = dice.random() < 0.15
    thought = {"reasoning_content": f"The user wants {wanted}. I call it."} if thinking else {}
    messages: list[dict[str, Any]] = [user(ask), assistant("", tool_calls=[call], **thought)]
    if not thinking and dice.random() < 0.7:
        messages += [{"role": "tool", "content": result}, assistant(answer)]
    return Document("tool", messages=messages, tools=[TOOLS[t] for t in offered], enable_thinking=thinking or None)


# --- pictures -------------------------------------------------------------------------------------------------------


def picture(dice: random.Random, num_items: int = 1) -> Picture:
    """One shape on a square of 64 or 96 pixels, or two side by side."""
    side = dice.choice([64, 96])
    shapes, colors = dice.sample(SHAPES, num_items), dice.sample(list(COLORS), num_items)
    items = []
    for i, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        r = dice.randint(side * 28 // 100, side * 42 // 100)
        room = side // 2 - r - 1
        x = i * side + side // 2 + dice.randint(-room, room)
        items.append((shape, color, x, side // 2 + dice.randint(-room, room), r))
    return Picture((side * num_items, side), dice.choice(GROUNDS), tuple(items), dice.randrange(1 << 30))


PICTURE_QUESTIONS = ("What is in the image?", "What do you see?", "Describe the picture.", "Name the shape and its color.")


def picture_answer(shown: Picture) -> str:
    named = [with_article(f"{color} {shape}") for shape, color, *_ in shown.items]
    text = " and ".join(named) + "."
    return text[0].upper() + text[1:]


def see(dice: random.Random, num_items: int | None = None) -> Document:
    shown = picture(dice, num_items or dice.choice([1, 1, 1, 2]))
    ask = dice.choice(PICTURE_QUESTIONS)
    messages = [user([{"type": "image"}, {"type": "text", "text": ask}]), assistant(picture_answer(shown))]
    if len(shown.items) == 1 and dice.random() < 0.3:
        shape, color = shown.items[0][:2]
        follow = dice.choice([("What color is it?", f"It is {color}."), ("What shape is it?", f"It is a {shape}.")])
        messages += [user(follow[0]), assistant(follow[1])]
    return Document("picture", messages=messages, pictures=(shown,))


MIXTURE: list[tuple[float, Callable[[random.Random], Document]]] = [
    (0.10, story), (0.02, almanac), (0.08, reading), (0.05, summary), (0.04, tell), (0.07, town_fact),
    (0.08, direct_sums), (0.10, sum_table), (0.05, thought_sum), (0.03, thought_reading), (0.05, listing),
    (0.03, how_to), (0.04, code), (0.03, smalltalk), (0.04, tool_use), (0.19, see),
]  # fmt: skip


def document(split: str, index: int, kinds: tuple[str, ...] = ()) -> Document:
    """The document number `index` of a split, of one of `kinds` (function names) where given."""
    dice = random.Random(SPLITS[split] * 1_000_003 + index)
    makers = [(w, f) for w, f in MIXTURE if not kinds or f.__name__ in kinds]
    maker = dice.choices([f for _, f in makers], [w for w, _ in makers])[0]
    return maker(dice)


def documents(split: str, start: int = 0, kinds: tuple[str, ...] = ()) -> Iterator[Document]:
    """The endless sequence of documents of a split."""
    index = start
    while True:
        yield document(split, index, kinds)
        index += 1
