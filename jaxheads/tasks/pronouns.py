"""Subject pronouns: she or he, by the name."""

import numpy as np

from jaxheads.tasks.checks import count_of
from jaxheads.tasks.example import Example

SHE = (
    "Mary", "Sarah", "Anna", "Emma", "Alice", "Laura", "Julia", "Emily", "Jane", "Susan",
    "Linda", "Lisa", "Kate", "Rachel", "Helen", "Margaret",
)  # fmt: skip
HE = (
    "John", "James", "Robert", "Michael", "David", "Peter", "Paul", "Mark", "Tom", "George",
    "Henry", "William", "Richard", "Thomas", "Charles", "Daniel",
)  # fmt: skip
NOUNS = ("friend", "neighbor", "person", "colleague", "student", "cook", "driver", "singer")
"""All, like the names, one token of common byte-pair vocabularies."""


def pronouns(count: int, *, seed: int) -> list[Example]:
    """Tag questions whose pronoun must agree with the name of the subject.

    "So, Mary really is a great friend, isn't" is followed by " she" and not by " he",
    after Dunefsky and Cohan 2023 (observable propagation), with more nouns. Each name is
    paired with one of the other gender, which stands in the corrupted prompt; " she" and
    " he" are right equally often, within one example.

    Args:
      count: number of examples, all different.
      seed: decides pairs of names and nouns.

    Returns:
      `count` examples; `group` is the pair of names.

    Raises:
      ValueError: `count` below 1 or above the number of different prompts.
    """
    shape = (len(SHE), len(NOUNS))
    prompts = int(np.prod(shape))
    count_of(count, 2 * prompts, "choices of name and noun")
    rng = np.random.default_rng(seed)
    partners = rng.permutation(len(HE))
    # Each gender has its own order of prompts, and they take turns.
    orders = np.stack([rng.permutation(prompts), rng.permutation(prompts)], axis=1).ravel()
    examples = []
    for i, drawn in enumerate(orders[:count]):
        pair, noun = np.unravel_index(drawn, shape)
        she, he = (SHE[pair], " she"), (HE[partners[pair]], " he")
        (name, answer), (other, wrong) = (she, he) if i % 2 == 0 else (he, she)
        prompt, corrupted = (
            f"So, {person} really is a great {NOUNS[noun]}, isn't" for person in (name, other)
        )
        group = f"{she[0]}|{he[0]}"
        examples.append(Example(prompt, answer, group=group, wrong=wrong, corrupted=corrupted))
    return examples
