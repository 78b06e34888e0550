"""ServedModel: what the HTTP face must know of the model, and how it is read from its files. Knows no request, no route.
Loads no torch.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from serve_app import hub
from serve_app.config import ServeArgs
from serve_app.logs import get_logger
from serve_app.text.chat_template import ChatTemplate
from serve_app.text.output_format import OutputFormat
from serve_app.text.pooling_config import PoolingConfig, load_pooling_config
from serve_app.text.tokenizer import Tokenizer

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What the HTTP face must know of the model."""

    names: tuple[str, ...]
    """A request may use any; answers carry the one it used."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    default_chat_max_tokens: int
    created: int
    """Seconds since 1970, for /v1/models."""
    output_format: OutputFormat = dataclasses.field(default_factory=OutputFormat)
    """How it writes tool calls and reasoning."""
    pooling: PoolingConfig = dataclasses.field(default_factory=PoolingConfig)
    """For /v1/embeddings."""


def load_served_model(args: ServeArgs) -> ServedModel:
    """Reads tokenizer, template and generation_config.json. Raises a StartupError that says what is wrong."""
    model = args.model
    revision = None if model.tokenizer else model.revision
    directory = hub.resolve_model(model.tokenizer or model.source, revision, hub.TEXT_FILES)
    tokenizer = Tokenizer.from_directory(directory)
    text = args.api.chat_template_text()
    source = text if text is not None else tokenizer.chat_templates
    output_format = OutputFormat.of(tokenizer, args.api.tool_parser, args.api.reasoning_parser, text)
    logger.info(
        "tool calls are read as %s, reasoning as %s (api.tool_parser, api.reasoning_parser)",
        output_format.tools.name if output_format.tools is not None else "none",
        output_format.reasoning.name if output_format.reasoning is not None else "none",
    )
    return ServedModel(
        names=model.names,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source, tokenizer.special_tokens) if source else None,
        default_chat_max_tokens=args.api.default_chat_max_tokens,
        created=int(time.time()),
        output_format=output_format,
        pooling=_load_pooling_config(args, directory),
    )


def _load_pooling_config(args: ServeArgs, directory: Path) -> PoolingConfig:
    """``directory``: of the tokenizer."""
    model = args.model
    if model.runner == "simulated":
        return PoolingConfig(model.pooling or "last")
    if model.tokenizer:
        directory = hub.resolve_model(model.source, model.revision, hub.TEXT_FILES)
    return load_pooling_config(directory, model.pooling)
