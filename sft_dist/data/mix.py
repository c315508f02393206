"""Synthetic chat rows for the tutorial: arithmetic, fixed phrases in four languages, definitions, rewriting, follow-ups.

What can be computed is computed, and the rest is taken from the tables below, so every answer is right.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

# Term, one-sentence definition, example or further sentence.
TERMS = (
    ("a large language model", "A large language model is a neural network trained on a great deal of text to predict the next token.", "For example, given 'The sky is', it gives 'blue' a high probability."),
    ("a thread", "A thread is a path of execution inside a process; the threads of a process share its memory.", "For example, a browser may draw the page in one thread and load images in another."),
    ("a process", "A process is a running program with a memory of its own, kept apart from other processes.", "For example, two terminals that both run Python are two processes."),
    ("fine-tuning", "Fine-tuning is further training of a trained model on a smaller set of examples for one purpose.", "For example, a general chat model can be fine-tuned to sort customer mail."),
    ("overfitting", "Overfitting means that a model has learned its training examples by heart and does worse on new ones.", "For example, the training loss goes on falling while the loss on held-out rows rises."),
    ("a token", "A token is a piece of text, often a word or a part of one, that a language model reads as one unit.", "For example, 'unhappiness' may be split into 'un' and 'happiness'."),
    ("a learning rate", "A learning rate is the size of the step by which training changes the weights.", "For example, 0.00002 is a common learning rate for fine-tuning a whole model."),
    ("gradient accumulation", "Gradient accumulation adds up the gradients of several small batches before one change of the weights.", "For example, eight batches of one row act like one batch of eight rows."),
    ("a cache", "A cache is a small, fast store that keeps results which are likely to be needed again.", "For example, a browser keeps images so that it need not load them twice."),
    ("recursion", "Recursion is a way to solve a problem by having a function call itself on a smaller part of it.", "For example, the factorial of 4 is 4 times the factorial of 3."),
    ("an API", "An API is a fixed set of calls through which one program uses another.", "For example, a weather app asks a weather service for tomorrow's forecast."),
    ("a hash function", "A hash function turns data of any length into a short value of fixed length.", "For example, SHA-256 turns a file of any size into 256 bits."),
    ("a deadlock", "A deadlock is a state in which two tasks wait for each other, so neither goes on.", "For example, each of two tasks holds one lock and waits for the other's."),
    ("photosynthesis", "Photosynthesis is how plants use light to make sugar from water and carbon dioxide.", "For example, a leaf in the sun takes in carbon dioxide and gives off oxygen."),
    ("evaporation", "Evaporation is the change of a liquid into a gas at its surface, below its boiling point.", "For example, a puddle disappears on a dry day."),
    ("inflation", "Inflation is a rise of the general level of prices over time, so that money buys less.", "For example, at two percent a year, a basket of 100 euros costs 102 euros a year later."),
    ("a prime number", "A prime number is a whole number above 1 that only 1 and itself divide without a remainder.", "For example, 7 is prime, but 9 is not, since 3 divides it."),
    ("a median", "A median is the middle value of a list of numbers in order of size.", "For example, the median of 1, 5 and 30 is 5."),
)  # fmt: skip
DEFINITION_QUESTIONS = (
    "What is {term}?",
    "Explain {term} in one sentence.",
    "Can you tell me what {term} is?",
    "Give me a short definition of {term}.",
    "What do people mean by {term}?",
    "In simple words, what is {term}?",
)
DIFFERENCES = (
    ("a thread and a process", "A process has memory of its own; threads run inside a process and share its memory."),
    ("training and inference", "Training changes a model's weights to fit examples; inference uses the weights as they are to give answers."),
    ("a list and a tuple in Python", "A list can be changed after it is made; a tuple cannot."),
    ("a compiler and an interpreter", "A compiler translates a whole program before it runs; an interpreter carries it out step by step."),
    ("weather and climate", "Weather is the state of the air on a given day; climate is its average over many years."),
    ("RAM and a disk", "RAM is fast and loses its content without power; a disk is slower and keeps it."),
    ("latency and throughput", "Latency is how long one request takes; throughput is how many are done in a given time."),
    ("a git commit and a git branch", "A commit is a saved state of the files; a branch is a name that points to the newest commit of a line of work."),
)  # fmt: skip
DIFFERENCE_QUESTIONS = (
    "What is the difference between {pair}?",
    "How do {pair} differ?",
    "Compare {pair} in one sentence.",
)
LANGUAGES = ("French", "German", "Spanish", "Italian")
PHRASES = {
    "Good morning": ("Bonjour", "Guten Morgen", "Buenos días", "Buongiorno"),
    "Good night": ("Bonne nuit", "Gute Nacht", "Buenas noches", "Buonanotte"),
    "Thank you very much": ("Merci beaucoup", "Vielen Dank", "Muchas gracias", "Grazie mille"),
    "See you tomorrow": ("À demain", "Bis morgen", "Hasta mañana", "A domani"),
    "Where is the station?": ("Où est la gare ?", "Wo ist der Bahnhof?", "¿Dónde está la estación?", "Dov'è la stazione?"),
    "I am tired": ("Je suis fatigué", "Ich bin müde", "Estoy cansado", "Sono stanco"),
    "How are you?": ("Comment allez-vous ?", "Wie geht es Ihnen?", "¿Cómo está?", "Come sta?"),
    "I do not understand": ("Je ne comprends pas", "Ich verstehe nicht", "No entiendo", "Non capisco"),
    "The bill, please": ("L'addition, s'il vous plaît", "Die Rechnung, bitte", "La cuenta, por favor", "Il conto, per favore"),
    "Happy birthday": ("Joyeux anniversaire", "Alles Gute zum Geburtstag", "Feliz cumpleaños", "Buon compleanno"),
    "I love music": ("J'aime la musique", "Ich liebe Musik", "Me encanta la música", "Amo la musica"),
    "Have a good trip": ("Bon voyage", "Gute Reise", "Buen viaje", "Buon viaggio"),
}  # fmt: skip
TRANSLATION_QUESTIONS = (
    "Translate into {language}: {phrase}",
    'How do you say "{phrase}" in {language}?',
    "{phrase} - in {language}, please.",
)
NAMES = ("Maria", "Ben", "Aisha", "Tom", "Yuki", "Elena", "Sam", "Priya", "Lars", "Rosa")
VERBS = (
    ("walks", "walked"),
    ("drives", "drove"),
    ("runs", "ran"),
    ("cycles", "cycled"),
    ("goes", "went"),
    ("hurries", "hurried"),
)
PLACES = ("the station", "the market", "school", "the library", "work", "the beach", "the harbour", "the lake")
WORDS = (
    "apple",
    "river",
    "candle",
    "garden",
    "music",
    "window",
    "tiger",
    "orange",
    "lemon",
    "bridge",
    "paper",
    "eagle",
    "violin",
)
POLITE = (
    ("Send me the file.", "Could you please send me the file?"),
    ("Fix this today.", "Could you please fix this today?"),
    ("You are late again.", "I noticed that you were late again."),
    ("I need an answer now.", "I would be grateful for an answer as soon as possible."),
    ("Wrong number, check it.", "The number seems to be wrong; could you please check it?"),
    ("Move the meeting to Friday.", "Would it be possible to move the meeting to Friday?"),
    ("Stop calling me.", "I would prefer not to be called, please."),
    ("Your report is too long.", "Your report might gain from being a little shorter."),
)  # fmt: skip
POLITE_QUESTIONS = ("Make this more polite: {text}", 'Write "{text}" in a friendlier way.', "Rewrite politely: {text}")

Turns = list[str]


def mix(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """`rows` different chat rows, {"messages": [...], "category": kind}, the same for the same seed.

    The kinds take turns. The tables hold a few hundred different rows; beyond, arithmetic fills up. Sets of different
    seeds share rows, since phrases and definitions are few: for held-out scores take `tickets`.
    """
    rng = random.Random(f"mix {seed}")
    seen: set[tuple[str, ...]] = set()
    for kind in itertools.islice(itertools.cycle(KINDS), rows):
        turns = KINDS[kind](rng)
        for _ in range(50):
            if tuple(turns) not in seen:
                break
            turns = KINDS[kind](rng)
        while tuple(turns) in seen:
            kind, turns = "arithmetic", _arithmetic(rng)
        seen.add(tuple(turns))
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        yield {"messages": messages, "category": kind}


def _arithmetic(rng: random.Random) -> Turns:
    a, b = rng.randint(2, 999), rng.randint(2, 999)
    c, d = rng.randint(2, 30), rng.randint(2, 30)
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    return rng.choice(
        [
            [f"What is {a} + {b}?", f"{a} + {b} = {a + b}."],
            [f"Subtract {b} from {a + b}.", f"{a + b} - {b} = {a}."],
            [f"Multiply {c} by {d}.", f"{c} x {d} = {c * d}."],
            [f"What is {c * d} divided by {d}?", f"{c * d} / {d} = {c}."],
            [f"A box holds {c} pencils. How many are in {d} boxes?", f"{d} x {c} = {c * d}, so {c * d} pencils."],
            [f"{name} has {a} euros and earns {b} more. How many now?", f"{a} + {b} = {a + b}, so {a + b} euros."],
            [f"{name} rides {c} km to {place} and back again. How far is that?", f"2 x {c} = {2 * c}, so {2 * c} km."],
        ]
    )


def _translation(rng: random.Random) -> Turns:
    phrase = rng.choice(list(PHRASES))
    language = rng.randrange(len(LANGUAGES))
    question = rng.choice(TRANSLATION_QUESTIONS).format(language=LANGUAGES[language], phrase=phrase)
    return [question, PHRASES[phrase][language]]


def _explanation(rng: random.Random) -> Turns:
    if rng.random() < 0.2:
        pair, answer = rng.choice(DIFFERENCES)
        return [rng.choice(DIFFERENCE_QUESTIONS).format(pair=pair), answer]
    term, definition, _ = rng.choice(TERMS)
    return [rng.choice(DEFINITION_QUESTIONS).format(term=term), definition]


def _rewriting(rng: random.Random) -> Turns:
    choice = rng.randrange(3)
    if choice == 0:
        text, polite = rng.choice(POLITE)
        return [rng.choice(POLITE_QUESTIONS).format(text=text), polite]
    if choice == 1:
        words = rng.sample(WORDS, k=4)
        return [f"Put these words in alphabetical order: {', '.join(words)}.", f"{', '.join(sorted(words))}."]
    name, (now, then), place = rng.choice(NAMES), rng.choice(VERBS), rng.choice(PLACES)
    return [f"Put this into the past tense: {name} {now} to {place}.", f"{name} {then} to {place}."]


def _follow_up(rng: random.Random) -> Turns:
    choice = rng.randrange(4)
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    if choice == 0:
        total = a + b
        return [
            *(f"What is {a} + {b}?", f"{a} + {b} = {total}."),
            *(f"Now multiply that by {c}.", f"{total} x {c} = {total * c}."),
            *(f"And take away {a}.", f"{total * c} - {a} = {total * c - a}."),
        ]
    if choice == 1:
        term, definition, example = rng.choice(TERMS)
        question = rng.choice(DEFINITION_QUESTIONS).format(term=term)
        return [question, definition, rng.choice(("Can you give an example?", "An example, please.")), example]
    if choice == 2:
        phrase = rng.choice(list(PHRASES))
        first, second = rng.sample(range(len(LANGUAGES)), k=2)
        question = rng.choice(TRANSLATION_QUESTIONS).format(language=LANGUAGES[first], phrase=phrase)
        return [question, PHRASES[phrase][first], f"And in {LANGUAGES[second]}?", PHRASES[phrase][second]]
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    return [
        *(f"My name is {name}, and I am {a + 16} years old.", f"Nice to meet you, {name}."),
        *(f"Today I am going to {place}.", f"Enjoy your trip to {place}, {name}."),
        *rng.choice(
            (("How old am I?", f"You are {a + 16} years old."), ("Where am I going?", f"You are going to {place}."))
        ),
    ]


KINDS = {
    "arithmetic": _arithmetic,
    "translation": _translation,
    "explanation": _explanation,
    "rewriting": _rewriting,
    "follow_up": _follow_up,
}
