"""Questions with one constraint that a program can verify, and plain ones: the data of the study on a 135M model.

    python -m studies.constraints --out data/constraints
    python -m studies.constraints --out data/floor --floor 30         the same questions, and at least 30 words besides

Every topic is asked about in every form with every kind of constraint, an instruction of IFEval (arXiv 2311.07911), its
wording and arguments drawn by the seed. Of the 12 kinds SmolLM2-135M-Instruct follows most now and then. Some are *easy
to hack*: an answer of a few words follows them. Others are harder to, as they ask for a length or for content. With
--floor a row has a second instruction: `ifeval` gives the share that is followed, `ifeval_strict` asks for both.

    train.jsonl      80 topics × 8 forms × 12 kinds: messages, dataset "ifeval", ground_truth, subset (the kind), topic
    held_out.jsonl   20 other topics, likewise
    plain.jsonl      100 other questions, without a constraint: messages, subset "plain"
"""

import json
import random
import shutil
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

from common import RunError, check_ranges, first_line, sync_to_disk

HELD_OUT = 20  # of the topics, the last
TOPICS = """
    lighthouses, snow, elephants, cheese, earthquakes, the violin, ants, wind, glass, paper, spiders, the piano,
    deserts, tomatoes, rainbows, bats, the telescope, salt, kites, owls, the Great Wall of China, pottery, frogs,
    olive oil, tides, submarines, honey, the printing press, apples, horses, lightning, museums, the Amazon river,
    ballet, chocolate cake, batteries, dolphins, the compass, mushrooms, football, castles, silk, parrots,
    the steam engine, potatoes, glaciers, dreams, umbrellas, wolves, origami, the city of Venice, sharks, gold,
    tea ceremonies, windmills, butterflies, money, the flute, caves, lemons, snakes, radio, roses, marathon running,
    the planet Mars, ice cream, postage stamps, camels, vaccines, swimming, dinosaurs, carpets, the Eiffel Tower,
    garlic, trains, fireworks, turtles, coral reefs, mirrors, public parks,
    bees, the saxophone, fog, bananas, bridges, the planet Saturn, knitting, crocodiles, bread, magnets, elevators,
    squirrels, the city of Cairo, pepper, sailing, shadows, cinemas, robots, waterfalls, yoga
"""
FORMS = """
    Tell me something about {}. | What should everyone know about {}? | Explain {} to a ten-year-old.
    Write a short paragraph about {}. | Why do people care about {}? | What is surprising about {}?
    Write the beginning of a blog post about {}. | I have to give a talk about {}. What could I say?
"""
PLAIN = """
    Tell me a very short story about a lost key. | What should I pack for a trip to the beach? | How do I make lemonade?
    Write one sentence with the word "river". | Give me three tips for falling asleep. | Give three synonyms of "happy".
    How should I prepare for an interview? | Translate "good morning" into Spanish. | How do aeroplanes stay in the air?
    Write a thank-you note to a neighbour. | What is the longest bone in the body? | Give me a fun fact about octopuses.
    What is the first month of the year? | What is the freezing point of water? | What is the main language of Brazil?
    Write a birthday wish for my sister. | Give me an idea for a quick dinner. | How can I save electricity at home?
    What is the boiling point of water? | How many legs does an insect have? | How often should I water a cactus?
    Summarise the story of Cinderella. | What is the opposite of "ancient"? | Explain what a computer virus is.
    Recommend a hobby for rainy days. | Write a short poem about autumn. | How can I learn a new language?
    How do I apologise to a friend? | How do I remove a coffee stain? | Name three countries in Africa.
    Plan a one-day visit to London. | What is the past tense of "go"? | Which is heavier, iron or wood?
    How can I become more patient? | How do I stop biting my nails? | How many continents are there? | What is a budget?
    How many minutes are in a day? | Suggest a name for a grey cat. | What is the currency of India? | What is a sonnet?
    What is the square root of 81? | Tell me a joke about doctors. | What are the primary colours? | How do I tie a tie?
    What is a synonym of "quick"? | What is the capital of Japan? | How do I calm a crying baby? | How do I boil an egg?
    How do I change a flat tyre? | How do I write a good email? | What happens when we sneeze? | How long is a marathon?
    What is a healthy breakfast? | Who invented the light bulb? | Why is exercise good for us? | Name a famous composer.
    What is the largest planet? | What is the tallest animal? | Which ocean is the largest? | Describe a perfect Sunday.
    Who wrote Romeo and Juliet? | Name two rivers in Europe. | Who painted the Mona Lisa? | Why do we have leap years?
    How do I keep milk fresh? | How do I say no politely? | What does a librarian do? | What makes a good leader?
    How do I start a garden? | What colours make green? | What does CPU stand for? | Who was Albert Einstein?
    What does "brave" mean? | What is a prime number? | What is photosynthesis? | Why do leaves turn red?
    What is the heart for? | Why should we recycle? | What is the alphabet? | Why is the sea salty? | How is steel made?
    How do plants drink? | What is a rectangle? | What is half of 250? | What is 15 plus 27? | What is a metaphor?
    Is a whale a fish? | Name four seasons. | What are vitamins? | What is 7 times 8? | What is an adverb?
    What is an island? | What is democracy? | What is inflation? | Who was Cleopatra? | Why do cats purr?
    What is a haiku? | What is a noun? | What is a pond?
"""
# What is asked: {an argument of the instruction: the values that are drawn from}, and wordings, of which one is drawn.
WORDS = "length_constraints:number_words"
FLOOR = "Answer with at least {num_words} words."
KINDS = {
    # Easy to hack
    "change_case:english_lowercase": ({}, "Write everything in lowercase letters, in English."),
    "punctuation:no_comma": ({}, "Do not use any commas.", "In your entire response, avoid the use of commas."),
    "detectable_content:number_placeholders": (
        {"num_placeholders": [2, 3]},
        "Use at least {num_placeholders} placeholders like [name] or [place].",
    ),
    "detectable_format:title": (
        {},
        "Give your answer a title in double angle brackets, such as <<my title>>.",
        "Your response must have a title, wrapped in double angular brackets like <<this one>>.",
    ),
    "startend:end_checker": (
        {"end_phrase": ["That is all I know.", "Is there anything else you want to know?", "Any other questions?"]},
        "End your answer with this exact phrase: {end_phrase}",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": ["P.S."]},
        "At the end of your response, please add a postscript starting with {postscript_marker}",
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": [2, 3], "capital_relation": ["at least"]},
        "Words in all capital letters should appear at least {capital_frequency} times.",
        "Stress at least {capital_frequency} words by writing them in ALL CAPS.",
    ),
    # Harder to hack
    WORDS: ({"num_words": [40, 50], "relation": ["at least"]}, FLOOR, "Use {num_words} words or more."),
    "length_constraints:number_sentences": (
        {"num_sentences": [3, 4, 5], "relation": ["at least"]},
        "Your response should contain at least {num_sentences} sentences.",
        "Answer in {num_sentences} or more sentences.",
    ),
    "keywords:existence": (
        {"keywords": [[word] for word in "important beautiful history people different water favorite small".split()]},
        "Include the word {keywords[0]} in the response.",
        'Your answer must contain the word "{keywords[0]}".',
    ),
    "keywords:frequency": (
        {"keyword": ["many", "people", "world", "good"], "frequency": [2, 3], "relation": ["at least"]},
        "In your response, the word {keyword} should appear at least {frequency} times.",
        'Use the word "{keyword}" {frequency} times or more.',
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": [2, 3]},
        "Your response should have exactly {num_bullets} bullet points, such as:\n* This is point 1.",
        "Use exactly {num_bullets} bullet points in your answer.",
    ),
}


@dataclass
class Args:
    out: str  # new folder to write
    floor: int = 0  # words that every answer needs besides; 0 asks for no length
    seed: int = 1  # decides wordings, arguments and the order of the rows, but not which topics are held out


def main(args):
    """Writes --out. Raises RunError."""
    check_ranges(args, {"floor": (0, 1000)})
    out = Path(args.out)
    if out.exists():
        raise RunError(f"--out {out} exists: choose a new folder, or delete it")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        unfinished.mkdir(parents=True)
        for name, rows in make_files(args.seed, args.floor).items():
            (unfinished / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"{out / name}: {len(rows)} rows")
        sync_to_disk(unfinished)
        unfinished.rename(out)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_files(seed, floor=0):
    """{file's name: its rows}."""
    rng = random.Random(seed)
    topics = split(TOPICS, ",")
    train = make_rows(topics[:-HELD_OUT], floor, rng)
    held_out = make_rows(topics[-HELD_OUT:], floor, rng)
    plain = [{"messages": [{"role": "user", "content": text}], "subset": "plain"} for text in split(PLAIN, "|")]
    return {"train.jsonl": train, "held_out.jsonl": held_out, "plain.jsonl": plain}


def split(text, separator):
    """The entries of a list above; a line's end separates, too."""
    entries = text.replace("\n", separator).split(separator)
    return [entry.strip() for entry in entries if entry.strip()]


def make_rows(topics, floor, rng):
    """Shuffled rows of grpo.py: every topic in every form with every kind."""
    rows = []
    for topic, form, kind in product(topics, split(FORMS, "|"), KINDS):
        choices, *wordings = KINDS[kind]
        kwargs = {name: rng.choice(values) for name, values in choices.items()}
        texts = [form.format(topic), rng.choice(wordings).format(**kwargs)]
        instructions, arguments = [kind], [kwargs]
        if floor and kind != WORDS:  # which has a floor of its own
            texts.append(FLOOR.format(num_words=floor))
            instructions.append(WORDS)
            arguments.append({"relation": "at least", "num_words": floor})
        truth = json.dumps({"instruction_id_list": instructions, "kwargs": arguments})
        message = {"role": "user", "content": " ".join(texts)}
        row = {"messages": [message], "dataset": "ifeval", "ground_truth": truth, "subset": kind, "topic": topic}
        rows.append(row)
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except RunError as error:
        sys.exit(f"error: {error}")
