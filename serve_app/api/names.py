"""Names that clients send to OpenAI or vLLM and that are no fields here: of no effect, not implemented, or renamed. Knows no
model of a request.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.api.request_model import IgnoredField, Unimplemented

WITHOUT_EFFECT: Mapping[str, IgnoredField] = {
    "user": IgnoredField("a string", lambda v: type(v) is str, "OpenAI uses it to find abuse"),
    "safety_identifier": IgnoredField("a string", lambda v: type(v) is str, "the same, under its new name"),
    "metadata": IgnoredField(
        "an object of strings",
        lambda v: type(v) is dict and all(type(x) is str for x in v.values()),
        "OpenAI shows it beside stored answers",
    ),
    "store": IgnoredField("false", lambda v: v is False, "answers are not stored here"),
    "service_tier": IgnoredField("'auto'", lambda v: v == "auto", "there is one tier; see priority"),
    "prompt_cache_key": IgnoredField(
        "a string", lambda v: type(v) is str, "equal prefixes meet without it; to keep them apart, see cache_salt"
    ),
}
"""Accepted by completions and chat, without effect."""

UNIMPLEMENTED: Unimplemented = {
    "allowed_tools": (),
    "bad_words": ([],),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}

RENAMED: Mapping[str, str] = {
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
}
"""vLLM's own names before it renamed them."""

COMPLETION_UNIMPLEMENTED: Unimplemented = {**UNIMPLEMENTED, "prompt_embeds": ([],), "suffix": ("",)}

CHAT_UNIMPLEMENTED: Unimplemented = {
    **UNIMPLEMENTED,
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "return_prompt_text": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
