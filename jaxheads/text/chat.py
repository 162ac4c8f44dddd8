"""Rendering a conversation with a model's own chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


class _Generation(Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, which only marks the model's turns."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """Renders a conversation as transformers' `apply_chat_template` does.

    Templates come with downloaded models, so they run in a sandbox.

    Args:
      template: jinja2 source.
      messages: the turns, each a mapping with a "role" and usually a "content".
      add_generation_prompt: whether to open the model's next turn at the end.
      variables: everything else the template may read, e.g. `bos_token`, `tools`.

    Returns:
      The prompt as text, special tokens written out.

    Raises:
      ValueError: no messages, a message without a role, or the template cannot be
        parsed or refuses the conversation.
    """
    if not messages:
        raise ValueError("messages is empty: a chat needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"messages[{index}] must be a mapping with a 'role', got {message!r}")
    seen = {"tools": None, "documents": None, **variables}
    seen |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        return _environment().from_string(template).render(seen)
    except TemplateError as error:
        raise ValueError(f"the chat template failed: {error}") from error


def default_template(value: str | Sequence[Mapping[str, str]] | None) -> str | None:
    """The chat template of a tokenizer_config.json, which holds one or several by name."""
    if value is None or isinstance(value, str):
        return value
    return next((entry["template"] for entry in value if entry["name"] == "default"), None)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
