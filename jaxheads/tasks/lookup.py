"""Looking a value up in a JSON object: the probe that finds retrieval heads."""

import json

import numpy as np

from jaxheads.names import choose
from jaxheads.tasks.checks import at_least, different
from jaxheads.tasks.example import Example

VALUES = ("sentence", "hex", "word")

_HEX = np.array(list("0123456789abcdef"))
_NOUNS = [
    "river",
    "table",
    "garden",
    "window",
    "bottle",
    "engine",
    "letter",
    "mountain",
    "castle",
    "forest",
    "bridge",
    "market",
    "kitchen",
    "village",
    "candle",
    "blanket",
    "mirror",
    "basket",
    "ladder",
    "hammer",
    "pencil",
    "carpet",
    "pillow",
    "curtain",
]
_VERBS = [
    "found",
    "painted",
    "carried",
    "lifted",
    "opened",
    "washed",
    "moved",
    "sold",
    "counted",
    "hidden",
    "dropped",
]
_ADJECTIVES = [
    "red",
    "small",
    "old",
    "quiet",
    "bright",
    "heavy",
    "round",
    "wooden",
    "empty",
    "golden",
    "narrow",
    "soft",
]
# One token each after a quotation mark, in common byte-pair vocabularies.
_WORDS = (
    "river", "table", "window", "engine", "letter", "castle", "forest", "bridge", "market",
    "apple", "house", "water", "music", "paper", "stone", "light", "green", "horse", "field",
    "train", "bird", "book", "gold", "iron",
)  # fmt: skip
_INSTRUCTION = (
    "Please extract the value corresponding to the specified key from the JSON object below."
)


def lookup(
    count: int,
    *,
    seed: int,
    pairs: int = 8,
    shots: int = 3,
    digits: int = 8,
    values: str = "sentence",
) -> list[Example]:
    """Prompts that ask for one value of a JSON object of random keys and values.

    The form of the few-shot lookup of AttentionInfluence (three worked questions, then
    one more, about a single object), at a size small models can do: the defaults make
    about 270 tokens for SmolLM2. Prompts end with the opening quote, so the answer has
    the very tokens of its needle, the value inside the object. The corrupted prompt asks
    for another key of the same object, one that no worked question is about, and the wrong
    answer is that key's value. Keys differ in tokens: `single_token` keeps the pairs of
    equal length.

    Args:
      count: number of examples.
      seed: decides everything.
      pairs: entries of the object, all with different keys and values.
      shots: worked questions before the last, each about another key of the object.
      digits: hexadecimal digits of each key (and value, if those are "hex").
      values: "sentence" for short made-up sentences, as in AttentionInfluence, "hex" for
        random digits, which only the purest copying heads can follow, or "word" for
        answers of a single token.

    Returns:
      `count` examples with a needle; `group` is the key asked for. `wrong` and
      `corrupted` are None where the questions use up all keys, `pairs` = `shots` + 1.

    Raises:
      ValueError: `count` or `pairs` below 1, `shots` below 0 or not below `pairs`,
        `digits` below 1 or too few for that many different strings, unknown `values`, or
        more `pairs` than there are words.
    """
    choose("values", values, VALUES)
    at_least("count", count, 1)
    at_least("pairs", pairs, 1)
    at_least("shots", shots, 0)
    at_least("digits", digits, 1)
    if 2 * pairs > 16**digits:
        raise ValueError(
            f"pairs is {pairs}, but {digits} hexadecimal digits make only {16**digits} different "
            "strings for keys and values"
        )
    if values == "word" and pairs > len(_WORDS):
        raise ValueError(f"pairs is {pairs}, but there are only {len(_WORDS)} words for values")
    if shots >= pairs:
        raise ValueError(
            f"shots must be less than pairs ({pairs}), since every question is about "
            f"another key, got {shots}"
        )
    rng = np.random.default_rng(seed)
    return [_example(rng, pairs, shots, digits, values) for _ in range(count)]


def _example(rng: np.random.Generator, pairs: int, shots: int, digits: int, values: str) -> Example:
    def random_hex() -> str:
        return "".join(rng.choice(_HEX, digits))

    def random_sentence() -> str:
        noun, place = rng.choice(_NOUNS, 2, replace=False)
        return f"the {rng.choice(_ADJECTIVES)} {noun} was {rng.choice(_VERBS)} near the {place}"

    def random_word() -> str:
        return _WORDS[rng.integers(len(_WORDS))]

    value_of = {"sentence": random_sentence, "hex": random_hex, "word": random_word}[values]
    keys = different(random_hex, pairs)
    table = dict(zip(keys, different(value_of, pairs), strict=True))
    asked = [keys[i] for i in rng.permutation(pairs)]
    worked, key = asked[:shots], asked[shots]
    other = asked[shots + 1] if shots + 1 < pairs else None
    head = f"{_INSTRUCTION}\n\n"
    body = json.dumps(table, indent=0)
    questions = "".join(f'{_ask(k)}{table[k]}"\n' for k in worked)
    before = f"{head}{body}\n\n{questions}"
    value = table[key]
    # Found through its key: the value alone might also end another string.
    start = len(head) + body.index(f'"{key}": "{value}"') + len(f'"{key}": "')
    return Example(
        prompt=before + _ask(key),
        answer=value,
        needle=(start, start + len(value)),
        group=key,
        wrong=None if other is None else table[other],
        corrupted=None if other is None else before + _ask(other),
    )


def _ask(key: str) -> str:
    return f'Key: "{key}"\nValue: "'
