"""`jaxheads generate` and `jaxheads chat`, on a tiny random model whose tokens are bytes."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers

import jaxheads as jh
from jaxheads.cli import chat, generate
from jaxheads.cli.app import _guarded
from jaxheads.text import Tokenizer

NEW = 6
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}<s>assistant:"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    config = jh.ModelConfig(
        n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_model=24, d_mlp=32,
        vocab_size=len(vocabulary), context_length=200,
    )  # fmt: skip
    model = jh.Transformer.random(config, jax.random.key(0))
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, TEMPLATE)
    return jh.save(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny")


def run(command: Any, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """The exit code and what was printed."""
    code = _guarded(command.main, list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Library:
    """What the library says, to compare with."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = jh.load(folder)
        assert self.tokenizer is not None

    def texts(self, prompt: str, **options: Any) -> tuple[str, ...]:
        batch = self.tokenizer(prompt)
        options = {"max_new_tokens": NEW, "key": jax.random.key(0), "stop": [1], **options}
        made = jh.generate(self.model, batch, tokenizer=self.tokenizer, **options)
        assert made.texts is not None
        return made.texts

    def answer(self, *turns: str, **options: Any) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return self.texts(self.tokenizer.chat(messages), **options)[0]


@pytest.fixture(scope="module")
def library(tiny: Path) -> Library:
    return Library(tiny)


# generate


def test_options_are_those_of_the_library(
    tiny: Path, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(tiny), "Hello", "--max-new-tokens", str(NEW)]
    options = {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "samples": 2}
    flags = ["--temperature", "1", "--min-p", ".05", "--repetition-penalty", "1.2"]
    expected = library.texts("Hello", **options, chunk=3)
    out = run(generate, capsys, *argv, *flags, "--samples", "2", "--chunk", "3")[1]
    assert out == "".join(f"[sample {i + 1}]{text}\n" for i, text in enumerate(expected))
    whole = library.texts("Hello")[0]
    stopped = run(generate, capsys, *argv, "--stop", "unseen", "--stop", whole[2:4])[1]
    assert stopped == whole[:2] + "\n"


def test_logprobs_are_printed_by_token(
    tiny: Path, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = library.tokenizer("Hello")
    made = jh.generate(library.model, batch, max_new_tokens=NEW, stop=[1])
    argv = [str(tiny), "Hello", "--max-new-tokens", str(NEW), "--logprobs"]
    out = run(generate, capsys, *argv)[1]
    for value in made.logprobs[0, : int(made.lengths[0])].tolist():
        assert f"{value:.4f}" in out


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_there(
    tiny: Path,
    library: Library,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt_at_first_text(monkeypatch)
    code, out, err = run(generate, capsys, str(tiny), "Hello", "--max-new-tokens", "60")
    assert (code, err) == (130, "error: interrupted\n")
    assert len(out) > 1
    whole = library.texts("Hello", max_new_tokens=60)[0]
    assert whole.startswith(out[:-1])
    assert len(out) < len(whole)


def interrupt_at_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal, sent while the first text is printed."""
    pressed: list[int] = []

    def printed(*args: Any, **kwargs: Any) -> None:
        print(*args, **kwargs)
        if kwargs.get("end") == "" and not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "print", printed, raising=False)


BAD = {
    "min_p": (["--min-p", "2"], r"min_p must lie in [0, 1], got 2.0"),
    "stop": (["--stop", ""], "a stop string is empty"),
    "special": (["--stop", "</s>"], "holds a special token, which is not text: stop at its id, 1"),
    "samples": (["--samples", "2"], "samples=2 at temperature 0 would all be the same"),
    "chunk": (["--chunk", "0"], "chunk must be at least 1, got 0"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told(name: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[name]
    code, out, err = run(generate, capsys, str(tiny), "a", *flags)
    assert (code, out) == (2, "")
    assert message in err


# chat


Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Types lines; returns the exit code and what was printed."""

    def typed(lines: list[str], *argv: str, model: Path = tiny) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run(chat, capsys, str(model), "--max-new-tokens", str(NEW), *argv)

    return typed


@pytest.fixture
def masked(library: Library, tmp_path: Path) -> tuple[jh.Edits, Path]:
    """Edits that change what is said, and their file."""
    config = library.model.config
    edits = jh.mask_heads(config, [(0, 1), (0, 2), (1, 0), (1, 3)], "zero")
    edits.save(tmp_path / "edits.safetensors")
    assert library.answer("Hi") != library.answer("Hi", edits=edits)
    return edits, tmp_path / "edits.safetensors"


def test_a_conversation_remembers_and_edits_switch_between_turns(
    library: Library, masked: tuple[jh.Edits, Path], talk: Talk
) -> None:
    edits, path = masked
    one = library.answer("Hi")
    two = library.answer("Hi", one, "And?", edits=edits)
    three = library.answer("Hi", one, "And?", two, "So?")
    fresh = library.answer("Hi", edits=edits)
    lines = ["Hi", f"/edits {path}", "And?", "", "/edits off", "So?", "/reset", "/edits on", "Hi"]
    expected = [
        one, "(edits on)", two, "(edits off)", three, "(a new conversation)", "(edits on)", fresh,
        "(edits on)", "",
    ]  # fmt: skip
    found = talk([*lines, "/edits", "/quit", "not read"])
    assert found == (0, "\n".join(expected), "")


def test_edits_of_the_command_line_act_from_the_first_turn(
    library: Library, masked: tuple[jh.Edits, Path], talk: Talk
) -> None:
    edits, path = masked
    out = talk(["Hi"], "--edits", str(path))[1]
    assert out == library.answer("Hi", edits=edits) + "\n"


def test_a_system_message_comes_first(library: Library, talk: Talk) -> None:
    messages = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": "Hi"}]
    expected = library.texts(library.tokenizer.chat(messages))[0]
    assert talk(["Hi"], "--system", "Be odd.")[1] == expected + "\n"


MISTAKES = {
    "/edit off": "unknown command '/edit'. Did you mean '/edits'",
    "/edits on": "there are no edits to switch on: name a file",
    "/edits absent.st": "no edits at absent.st",
    "/edits {tiny}/jaxheads.json": "not a readable",
    "x" * 300: "more than the 194 that leave room for an answer: ask less, or /reset",
}


def test_mistakes_in_a_turn_are_told_and_the_talk_goes_on(
    tiny: Path, library: Library, talk: Talk
) -> None:
    lines = [line.format(tiny=tiny) for line in MISTAKES]
    code, out, err = talk([*lines, "Hi", "/help"])
    assert code == 0
    assert out.startswith(library.answer("Hi") + "\n/edits")
    for line, message in zip(err.splitlines(), MISTAKES.values(), strict=True):
        assert message in line


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_an_answer_and_keeps_what_is_there(
    library: Library, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at_first_text(monkeypatch)
    code, out, err = talk(["Hi", "And?"], "--max-new-tokens", "40")
    assert (code, err) == (0, "")
    whole = library.answer("Hi", max_new_tokens=40)
    kept = next(whole[:n] for n in range(len(whole), 0, -1) if out.startswith(whole[:n]))
    assert len(kept) < len(whole)
    second = library.answer("Hi", kept, "And?", max_new_tokens=40)
    assert out == f"{kept}\n{second}\n"


CHAT_BAD = {
    "top_p": (["--top-p", "0"], "top_p must lie in (0, 1], got 0.0"),
    "too long": (["--max-new-tokens", "200"], "--max-new-tokens must lie in 1..199, got 200"),
    "edits": (["--edits", "absent.st"], "no edits at absent.st"),
}


@pytest.mark.parametrize("name", CHAT_BAD)
def test_what_no_turn_could_do_is_told_at_once(name: str, talk: Talk) -> None:
    flags, message = CHAT_BAD[name]
    code, out, err = talk(["Hi"], *flags)
    assert (code, out) == (2, "")
    assert message in err


def test_a_model_without_a_chat_template_is_refused(
    library: Library, tmp_path: Path, talk: Talk
) -> None:
    bare = Tokenizer(library.tokenizer.backend, library.tokenizer.special_tokens)
    code, out, err = talk(["Hi"], model=jh.save(library.model, bare, tmp_path / "m"))
    assert (code, out) == (2, "")
    assert "no chat template" in err
