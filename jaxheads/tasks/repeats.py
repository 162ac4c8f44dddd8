"""Random tokens twice over: the probe for induction, duplicate and previous-token heads."""

import numpy as np

from jaxheads.tasks.checks import at_least


def repeated_tokens(
    count: int, *, length: int = 64, seed: int, vocab_size: int, first_id: int
) -> np.ndarray:
    """Rows of `length` random tokens followed by the same tokens again.

    Tokens of a row are all different, so each has exactly one earlier occurrence and
    one token that followed it.

    Args:
      count: number of rows.
      length: tokens before the repeat starts.
      seed: decides the tokens.
      vocab_size: ids are drawn from [0, vocab_size) except `first_id`.
      first_id: the id in front of each row, so that no counted token stands first.

    Returns:
      int32 [count, 1 + 2*length]; slot t >= 1 + length repeats slot t - length.

    Raises:
      ValueError: `count` or `length` below 1, `first_id` outside the vocabulary, or a
        vocabulary too small for `length` different tokens.
    """
    at_least("count", count, 1)
    at_least("length", length, 1)
    if not 0 <= first_id < vocab_size:
        raise ValueError(f"first_id must lie in [0, vocab_size={vocab_size}), got {first_id}")
    if length > vocab_size - 1:
        raise ValueError(
            f"length must be at most vocab_size - 1 = {vocab_size - 1} for the tokens of a row "
            f"to differ, got {length}"
        )
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(vocab_size - 1, length, replace=False) for _ in range(count)])
    tokens = drawn + (drawn >= first_id)  # steps over first_id
    first = np.full((count, 1), first_id)
    return np.concatenate([first, tokens, tokens], axis=1).astype(np.int32)
