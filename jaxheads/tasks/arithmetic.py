"""Arithmetic: sums of two digits after a few worked ones."""

import numpy as np

from jaxheads.tasks.checks import at_least, different
from jaxheads.tasks.example import Example

_SUMS = tuple((a, b) for a in range(1, 9) for b in range(1, 10 - a))
"""Operands from 1 whose sum is a single digit."""


def arithmetic(count: int, *, seed: int, shots: int = 3) -> list[Example]:
    r"""Additions whose result is a single digit.

    "2 + 3 = 5\n4 + 4 = 8\n3 + 4 = " is followed by "7". The prompt ends in the space, for
    tokenizers that write it as a token of its own and each digit as one. In the corrupted
    prompt one operand of the last sum, the first and the second equally often, is another,
    and its result is the wrong answer (after Zhang et al. 2024, who replace more).

    Args:
      count: number of examples, all with different prompts.
      seed: decides operands and worked sums.
      shots: worked sums before the last; none has the operands of the last one, clean or
        corrupted, in either order.

    Returns:
      `count` examples; `group` is the pair of operands whatever their order.

    Raises:
      ValueError: `count` below 1 or more than so many shots allow, or `shots` below 1.
    """
    at_least("count", count, 1)
    at_least("shots", shots, 1)
    rng = np.random.default_rng(seed)
    return different(lambda: _example(rng, shots), count, key=lambda e: e.prompt)


def _example(rng: np.random.Generator, shots: int) -> Example:
    clean = _SUMS[rng.integers(len(_SUMS))]
    # One operand changes: the sums that share the other one.
    changed = [new for new in _SUMS if (new[0] == clean[0]) != (new[1] == clean[1])]
    corrupted = changed[rng.integers(len(changed))]
    taken = (_group(clean), _group(corrupted))
    free = [pair for pair in _SUMS if _group(pair) not in taken]
    worked = [free[i] for i in rng.integers(len(free), size=shots)]
    before = "".join(f"{_ask(pair)}{sum(pair)}\n" for pair in worked)
    return Example(
        prompt=before + _ask(clean),
        answer=str(sum(clean)),
        group=_group(clean),
        wrong=str(sum(corrupted)),
        corrupted=before + _ask(corrupted),
    )


def _ask(pair: tuple[int, int]) -> str:
    return f"{pair[0]} + {pair[1]} = "


def _group(pair: tuple[int, int]) -> str:
    return f"{min(pair)}+{max(pair)}"
