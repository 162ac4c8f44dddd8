"""Tokenizers from the fields of GGUF files, one builder for each kind of vocabulary.

What the fields mean is llama.cpp's doing (src/llama-vocab.cpp); what a tokenizer makes of a
text is that of the library which trained it: SentencePiece (Kudo & Richardson 2018) for
"llama" and "t5", WordPiece as in BERT for "bert", byte-level BPE for "gpt2".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers
from gguf import TokenType
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from jaxheads.names import choose
from jaxheads.text.frame import frame
from jaxheads.text.gguf_pre import PRE
from jaxheads.text.gguf_vocabulary import Vocabulary, add_tokens, read_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFReader

_SPACE = "▁"  # U+2581, which stands for a space in SentencePiece's pieces.


def gguf_tokenizer(reader: GGUFReader) -> tuple[tokenizers.Tokenizer, Mapping[str, str]]:
    """The tokenizer that an open GGUF file describes.

    Returns:
      The `tokenizers` object and the text of the token in each role.

    Raises:
      ValueError: a kind of vocabulary, a pre-tokenizer or a table that is not known here
        or that the library cannot take; or missing fields. The message names it.
    """
    vocabulary = read_vocabulary(reader)
    build = {
        "gpt2": _byte_level,
        "llama": _sentencepiece_bpe,
        "bert": _wordpiece,
        "t5": _sentencepiece_unigram,
    }[vocabulary.model]
    return build(vocabulary), vocabulary.special


def _byte_level(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    # A file without a name, or named "default", was split in ways that differ by reader.
    name = vocabulary.fields.get("ggml.pre", "(not named)")
    pre = PRE[choose("GGUF pre-tokenizer", name, PRE)]
    if "ggml.merges" not in vocabulary.fields:
        raise ValueError("the GGUF file has no tokenizer.ggml.merges")
    merges = [merge.partition(" ") for merge in vocabulary.fields["ggml.merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=_ids(vocabulary.tokens),
            merges=[(left, right) for left, _, right in merges],
            ignore_merges=pre.ignore_merges,
        )
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.split
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, vocabulary, takes_space_before=frozenset({pre.mask or ""}))
    _frame_text(backend, vocabulary, adds_bos=pre.adds_bos, adds_eos=False)
    return backend


def _sentencepiece_bpe(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    tokens, scores = vocabulary.tokens, vocabulary.scores()
    merged = [kind in (TokenType.NORMAL, TokenType.USER_DEFINED) for kind in vocabulary.types]
    if len(set(scores)) == 1:
        raise ValueError(f"every entry of tokenizer.ggml.scores is {scores[0]}: no order to merge")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=_ids(tokens),
            merges=merges_of_scores(tokens, scores, merged),
            unk_token=vocabulary.role("unk_token"),
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(_escape(prefix))
    backend.decoder = _unescape(prefix)
    # Phi-3's markers swallow the line break after them; their files do not say so.
    markers = set(vocabulary.of_type(TokenType.CONTROL, TokenType.USER_DEFINED))
    markers -= {"<unk>", "<s>", "<|endoftext|>"}
    after = frozenset(markers if vocabulary.architecture == "phi3" else ())
    # SentencePiece looks for user-defined pieces where spaces are ▁ already. With a prefix
    # that would prefix the pieces themselves; such models have no pieces of spaces.
    add_tokens(backend, vocabulary, normalized=not prefix, takes_space_after=after)
    _frame_text(backend, vocabulary, adds_bos=True, adds_eos=False)
    return backend


def merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float], merged: Sequence[bool]
) -> list[tuple[str, str]]:
    """SentencePiece's BPE as an ordered list of merges.

    SentencePiece joins the two neighbours whose union has the best score, the leftmost two
    among equals, however the union splits; a list of merges has one rank for each split.
    Among equal scores the longer left half comes first here: so a run of one character
    grows from its left end, which is what the leftmost rule makes of it.

    Args:
      tokens: the vocabulary.
      scores: of each token, greater is better.
      merged: whether each token can come from a merge or go into one.

    Returns:
      Pairs of tokens, the first to merge first.
    """
    pieces = {token: score for token, score, use in zip(tokens, scores, merged, strict=True) if use}
    merges = [
        (-score, -cut, token)
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    return [(token[:-cut], token[-cut:]) for _, cut, token in sorted(merges)]


def _sentencepiece_unigram(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece's Unigram.

    Equal to SentencePiece but for splits of exactly equal probability, where SentencePiece's
    32-bit sums decide, and text that spells a byte token, such as <0x41>, with characters
    which the vocabulary lacks.
    """
    scores = vocabulary.scores()
    usable = [kind in (TokenType.NORMAL, TokenType.USER_DEFINED) for kind in vocabulary.types]
    # Control tokens and bytes are no pieces of text: any other way to write it is likelier.
    worst = min((score for score, use in zip(scores, usable, strict=True) if use), default=0.0)
    never = worst - 1e4
    pieces = [
        (token, score if use else never)
        for token, score, use in zip(vocabulary.tokens, scores, usable, strict=True)
    ]
    unknown = _ids(vocabulary.tokens)[vocabulary.role("unk_token")]
    falls_back = TokenType.BYTE in vocabulary.types
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unknown, falls_back))
    steps: list[normalizers.Normalizer] = []
    charsmap = vocabulary.fields.get("ggml.precompiled_charsmap")
    if charsmap:
        steps.append(_charsmap(bytes(entry % 256 for entry in charsmap)))
    if vocabulary.flag("remove_extra_whitespaces", False):
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    prefix = vocabulary.flag("add_space_prefix", False)
    backend.normalizer = normalizers.Sequence(steps + _escape(prefix))
    backend.decoder = _unescape(prefix)
    add_tokens(backend, vocabulary)
    _frame_text(backend, vocabulary, adds_bos=False, adds_eos=True)
    return backend


def _charsmap(table: bytes) -> normalizers.Normalizer:
    try:
        return normalizers.Precompiled(table)
    except Exception as error:  # The library raises bare Exception.
        raise ValueError(
            f"tokenizer.ggml.precompiled_charsmap of {len(table)} bytes is damaged: {error}"
        ) from error


def _wordpiece(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordPiece(_ids(vocabulary.tokens), unk_token=vocabulary.role("unk_token"))
    )
    # A file that does not say is of a lower-casing model, unless its own words have capitals.
    cased = any(
        token != token.lower() for token in vocabulary.of_type(TokenType.NORMAL) if token[0] != "["
    )
    lowercase = vocabulary.flag("normalizer.lowercase", not cased)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=vocabulary.flag("normalizer.strip_accents", lowercase)
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    add_tokens(backend, vocabulary)
    frame(
        backend,
        vocabulary.role("cls_token") if vocabulary.flag("add_bos_token", True) else None,
        vocabulary.role("sep_token") if vocabulary.flag("add_sep_token", True) else None,
    )
    return backend


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _escape(prefix: bool) -> list[normalizers.Normalizer]:
    """Spaces as SentencePiece writes them, one more before a text that is not empty."""
    before: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if prefix else []
    return [*before, normalizers.Replace(" ", _SPACE)]


def _unescape(prefix: bool) -> decoders.Decoder:
    """Undoes `_escape`, and joins the bytes of characters that are not in the vocabulary."""
    after: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefix else []
    return decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


def _frame_text(
    backend: tokenizers.Tokenizer, vocabulary: Vocabulary, *, adds_bos: bool, adds_eos: bool
) -> None:
    """Adds BOS and EOS where the file says so, or by default where it is silent."""
    bos = vocabulary.flag("add_bos_token", adds_bos)
    eos = vocabulary.flag("add_eos_token", adds_eos)
    frame(
        backend,
        vocabulary.role("bos_token") if bos else None,
        vocabulary.role("eos_token") if eos else None,
    )
