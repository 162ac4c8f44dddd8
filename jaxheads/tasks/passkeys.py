"""Passkeys: sequences of words told in a long text, one of which is asked for."""

import numpy as np

from jaxheads.tasks.checks import at_least
from jaxheads.tasks.example import Example
from jaxheads.tasks.haystack import sentence

WORDS = (
    "Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliet",
    "Kilo", "Lima", "Mike", "November", "Oscar", "Papa", "Quebec", "Romeo", "Sierra", "Tango",
    "Uniform", "Victor", "Whiskey", "Xray", "Yankee", "Zulu",
)  # fmt: skip
"""The spelling alphabet."""
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
)  # fmt: skip


def passkeys(
    count: int, *, seed: int, keys: int = 5, words: int = 8, sentences: int = 16
) -> list[Example]:
    """Prompts that ask for one of several passkeys told in a text of template sentences.

    After the synthetic data of DuoAttention (Xiao et al. 2024), which has 10 passkeys of 32 words
    in up to 32,000 tokens of a book and asks for all of them in turn. With the defaults a prompt
    has about 350 tokens for SmolLM2.

    Args:
      count: number of examples.
      seed: decides everything.
      keys: passkeys of a text, the first, the second, ..., each after another sentence, in order.
      words: of a passkey, drawn from the 26 of the spelling alphabet.
      sentences: filler sentences of a text.

    Returns:
      `count` examples; example i asks for passkey i mod `keys`. The answer is its words, `needle`
      where they stand in the text, `group` the words, `wrong` another passkey of the text (None
      where there is one only).

    Raises:
      ValueError: a number below 1, more keys than ordinals or than there are sentences, too few
        words for the passkeys of a text to differ.
    """
    for name, number in (("count", count), ("keys", keys), ("words", words)):
        at_least(name, number, 1)
    if keys > len(ORDINALS):
        raise ValueError(f"keys must be at most {len(ORDINALS)}, got {keys}")
    if sentences < keys:
        raise ValueError(f"sentences must be at least as many as the {keys} keys, got {sentences}")
    if keys > len(WORDS) ** words:
        raise ValueError(f"{words} words make fewer than {keys} different passkeys")
    rng = np.random.default_rng(seed)
    return [_example(rng, i % keys, keys, words, sentences) for i in range(count)]


def _example(
    rng: np.random.Generator, asked: int, keys: int, words: int, sentences: int
) -> Example:
    drawn = _different(rng, keys, words)
    after = np.sort(rng.choice(sentences, keys, replace=False))
    text, needle = "", (0, 0)
    for place in range(sentences):
        text += f"{sentence(rng)} "
        for index in np.flatnonzero(after == place):
            start = f"{text.rstrip()}\nThe {ORDINALS[index]} passkey is: "
            text = f"{start}{drawn[index]}.\n"
            if index == asked:
                needle = (len(start), len(start) + len(drawn[index]))
    name = ORDINALS[asked]
    prompt = (
        f"{text.rstrip()}\n\nQuestion: What is the {name} passkey?\nAnswer: The {name} passkey is:"
    )
    wrong = f" {drawn[(asked + 1) % keys]}" if keys > 1 else None
    return Example(prompt, f" {drawn[asked]}", needle, group=drawn[asked], wrong=wrong)


def _different(rng: np.random.Generator, keys: int, words: int) -> list[str]:
    """Passkeys, no two of them the same."""
    found: dict[str, None] = {}
    while len(found) < keys:
        found[" ".join(rng.choice(WORDS, words))] = None
    return list(found)
