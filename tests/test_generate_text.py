"""Stop strings and streaming: what the text of a known answer is, however it tokenises."""

import signal

import jax
import numpy as np
import pytest
import tokenizers
from flax import struct
from tiny import tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.decode.text import find_stop, text_so_far
from jaxheads.text import Tokenizer

WORDS = ["</s>", "He", "llo", "Ġwor", "ld", "!", "Ċ", "ĊĊ", "User", ":", "Ã", "©", "l"]
END, WIDTH = 0, 5


def make_tokenizer() -> Tokenizer:
    """Tokens of several letters, two that are half of é, and the bytes."""
    alphabet = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(WORDS))
    vocabulary = {token: index for index, token in enumerate([*WORDS, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


TOKENIZER = make_tokenizer()


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


HELLO = ids("He", "llo", "Ġwor", "ld", "!", "ĊĊ", "User", ":", "</s>", "He", "He", "He")
CAFE = ids("llo", "Ã", "©", "l", "Ã", "©", "!", "Ċ", "Ċ", "User", "He", "He")


@struct.dataclass
class Say:
    """Makes the model say tokens [B,N] after prompts of `WIDTH` tokens."""

    tokens: jax.Array

    def __call__(self, value, context):
        at = context.positions - (WIDTH - 1)
        wanted = jax.numpy.take_along_axis(self.tokens, at.clip(0, self.tokens.shape[1] - 1), 1)
        return value + 1e4 * jax.nn.one_hot(wanted, value.shape[-1])


def say(*rows: list[int], **options) -> jh.Generated:
    model = tiny_model(vocab_size=270)
    options = {"max_new_tokens": len(rows[0]), "tokenizer": TOKENIZER, **options}
    edits = jh.Edits(logits=Say(np.asarray(rows)))
    return jh.generate(model, tiny_tokens(len(rows), WIDTH), edits=edits, **options)


CASES = {  # stop strings, the texts of both rows, the tokens of both
    "none": (["#"], "Hello world!\n\nUser:", "lloélé!\n\nUserHeHe", 9, 12),
    "a token": ([" wor"], "Hello", "lloélé!\n\nUserHeHe", 3, 12),
    "over several tokens": (["o world!"], "Hell", "lloélé!\n\nUserHeHe", 5, 12),
    "within a token": (["or"], "Hello w", "lloélé!\n\nUserHeHe", 3, 12),
    "from token to token, in both": (["lo"], "Hel", "l", 2, 1),
    "one token or two": (["\n\n"], "Hello world!", "lloélé!", 6, 9),
    "half a token": (["!\n"], "Hello world", "lloélé", 6, 8),
    "a character of two tokens": (["é"], "Hello world!\n\nUser:", "llo", 9, 3),
    "after such a character": (["él"], "Hello world!\n\nUser:", "llo", 9, 4),
    "the first of several": (["User", "!", "ld!"], "Hello wor", "lloélé", 5, 7),
    "at once": (["He"], "", "lloélé!\n\nUser", 1, 11),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_ends_before_a_stop_string(name):
    stops, first, second, *counts = CASES[name]
    made = say(HELLO, CAFE, stop=[END, *stops])
    assert made.texts == (first, second)
    assert made.lengths.tolist() == counts
    assert made.rows() == [row[:n] for row, n in zip((HELLO, CAFE), counts, strict=True)]
    assert not made.interrupted


@pytest.mark.parametrize("name", CASES)
def test_streamed_pieces_are_the_text(name):
    stops, first, second, *_ = CASES[name]
    told: list[tuple[int, str]] = []
    made = say(HELLO, CAFE, stop=[END, *stops], on_text=lambda row, text: told.append((row, text)))
    assert made.texts == (first, second)
    for row, text in enumerate(made.texts):
        pieces = [piece for at, piece in told if at == row]
        assert "".join(pieces) == text
        assert "" not in pieces
    if name == "none":
        assert len(told) > 4


def test_what_was_held_back_is_shown_at_the_end():
    """What may begin a stop string, and bytes that never became a character."""
    first, second = [ids(*["He"] * 11, last) for last in ("!", "Ã")]
    told = {0: "", 1: ""}

    def on_text(row, text):
        told[row] += text

    made = say(first, second, stop=["!!"], on_text=on_text)
    assert made.texts == (told[0], told[1]) == ("He" * 11 + "!", "He" * 11 + "\ufffd")


def test_what_is_shown_never_changes_and_never_holds_a_part_of_a_stop_string():
    stops = ["!\n\nUs", "ll!"]
    for row in (HELLO, CAFE):
        before = ""
        for count in range(len(row) + 1):
            if find_stop(TOKENIZER, row[:count], stops) is not None:
                break
            text = text_so_far(TOKENIZER, row[:count], stops)
            assert text.startswith(before)
            assert "\ufffd" not in text
            before = text
        ending = find_stop(TOKENIZER, row, stops)
        assert ending is not None
        assert ending.text.startswith(before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_returns_what_is_there():
    told = []

    def on_text(row, text):
        told.append(text)
        if len(told) == 2:
            signal.raise_signal(signal.SIGINT)

    made = say(HELLO, CAFE, on_text=on_text)
    assert made.interrupted
    count = int(made.lengths[0])
    assert 0 < count < len(HELLO)
    assert made.rows() == [HELLO[:count], CAFE[:count]]
    assert made.texts == tuple(TOKENIZER.decode(row[:count]) for row in (HELLO, CAFE))
    assert made.texts[1].startswith(told[1])


def test_ctrl_c_without_a_listener_is_raised():
    class Interrupting(Tokenizer):
        def decode(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        say(HELLO, CAFE, tokenizer=Interrupting(TOKENIZER.backend))


def test_streaming_compiles_nothing_of_its_own():
    """Looks, stop strings and their number share the programs of generation at once."""
    traces = []

    def counting(value, context):
        traces.append(context.phase)
        return value

    edits = jh.Edits(mlp_out=jax.tree_util.Partial(counting))

    def run(**options):
        model = tiny_model(vocab_size=270)
        jh.generate(model, tiny_tokens(1, WIDTH), edits=edits, max_new_tokens=12, **options)
        return len(traces)

    first = run()
    assert set(traces) == {"prefill", "decode"}
    assert run(tokenizer=TOKENIZER, on_text=lambda row, text: None) == first
    assert run(tokenizer=TOKENIZER, stop=["a", "zzz"]) == first


BAD = {
    "empty": (["a", ""], "a stop string is empty"),
    "special": (["a</s>b"], "stop string 'a</s>b' holds a special token, .* stop at its id, 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_stop_strings_are_refused(name):
    stops, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        say(HELLO, stop=stops)
