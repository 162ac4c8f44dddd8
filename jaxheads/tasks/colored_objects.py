"""Colored Objects: which of three colours has the object that is asked for?"""

import numpy as np

from jaxheads.tasks.checks import at_least, different
from jaxheads.tasks.example import Example

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
OBJECTS = (
    "pencil", "notebook", "pen", "cup", "plate", "bowl", "puzzle", "textbook", "bottle", "ball",
    "envelope", "lamp", "ring", "bag", "key", "clock", "necklace",
)  # fmt: skip
"""Each, like the colours, one token of common byte-pair vocabularies."""

_PLACES = ("table", "desk", "floor")
_VIEWS = ("there is", "you see", "I see")
_ITEMS = 3


def colored_objects(count: int, *, seed: int, shots: int = 2) -> list[Example]:
    r"""Scenes of three objects of different colours, and a question about one of them.

    "Q: On the table, I see a red pen, a blue cup, and a green bag. What color is the
    cup?\nA:" is followed by " Blue". The task of Merullo et al. 2024, whose circuit in
    GPT2-Medium shares most heads with that of `ioi`. The corrupted prompt asks about
    another of the three objects, whose colour is the wrong answer.

    Args:
      count: number of examples, all with different prompts.
      seed: decides scenes and questions.
      shots: answered questions before the last one.

    Returns:
      `count` examples; `needle` is the colour in the last scene (which the answer repeats
      with a capital), `group` the object that is asked for.

    Raises:
      ValueError: `count` below 1 or `shots` below 0.
    """
    at_least("count", count, 1)
    at_least("shots", shots, 0)
    rng = np.random.default_rng(seed)
    return different(lambda: _example(rng, shots), count, key=lambda e: e.prompt)


def _example(rng: np.random.Generator, shots: int) -> Example:
    before = ""
    for _ in range(shots):
        scene, objects, colors = _scene(rng)
        asked = rng.integers(_ITEMS)
        before += f"{scene} {_ask(objects[asked])} {colors[asked].capitalize()}\n"
    scene, objects, colors = _scene(rng)
    asked, other = rng.choice(_ITEMS, 2, replace=False)
    start = len(before) + scene.index(f"{colors[asked]} {objects[asked]}")
    return Example(
        prompt=f"{before}{scene} {_ask(objects[asked])}",
        answer=f" {colors[asked].capitalize()}",
        needle=(start, start + len(colors[asked])),
        group=objects[asked],
        wrong=f" {colors[other].capitalize()}",
        corrupted=f"{before}{scene} {_ask(objects[other])}",
    )


def _scene(rng: np.random.Generator) -> tuple[str, list[str], list[str]]:
    objects = [OBJECTS[i] for i in rng.choice(len(OBJECTS), _ITEMS, replace=False)]
    colors = [COLORS[i] for i in rng.choice(len(COLORS), _ITEMS, replace=False)]
    first, second, third = (
        f"{'an' if color[0] == 'o' else 'a'} {color} {thing}"
        for color, thing in zip(colors, objects, strict=True)
    )
    place, view = rng.choice(_PLACES), rng.choice(_VIEWS)
    return f"Q: On the {place}, {view} {first}, {second}, and {third}.", objects, colors


def _ask(thing: str) -> str:
    return f"What color is the {thing}?\nA:"
