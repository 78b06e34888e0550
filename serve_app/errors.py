"""The exception family. Knows the HTTP status and OpenAI error code of every failure; knows nothing of HTTP itself.

RaggedServeError                  500 internal_error
|- InvalidRequestError            400 invalid_request          the caller's mistake, the server goes on
|  |- InvalidParameterError       400 invalid_parameter        one field is out of its range
|  |- InvalidPromptError          400 invalid_prompt           empty, or a token id outside the vocabulary
|  |- ContextLengthError          400 context_length_exceeded  longer than the model's context
|  `- RequestTooLargeError        400 request_too_large        could never fit this replica's KV cache
|- DeadlineExceededError          504 deadline_exceeded
|- StepFailedError                500 step_failed              the model could not compute this request
|- EngineUnavailableError         503 engine_unavailable       stopping, draining or dead
`- StartupError                   500 startup_failed           the server must not start
   |- ConfigurationError              configuration_error      an option, or a combination, is wrong
   |- ModelNotFoundError              model_not_found          no such directory, or nothing in it
   |- UnsupportedModelError           model_unsupported        architecture, rope scaling, quantisation
   |- WeightsError                    weights_invalid          truncated, missing, unexpected or mis-shaped
   `- DeterminismError                determinism_unavailable  asked for by name, and this machine failed the proof
"""

from __future__ import annotations


class RaggedServeError(Exception):
    """Root of the family. ``status`` is the HTTP status, ``code`` the machine-readable OpenAI error code."""

    status: int = 500
    code: str = "internal_error"


class InvalidRequestError(RaggedServeError):
    status = 400
    code = "invalid_request"


class InvalidParameterError(InvalidRequestError):
    """A parameter outside its range. The message names the parameter, the value and what is allowed."""

    code = "invalid_parameter"

    def __init__(self, param: str, value: object, allowed: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{param} is {shown}; it must be {allowed}")
        self.param = param


class InvalidPromptError(InvalidRequestError):
    code = "invalid_prompt"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class RequestTooLargeError(InvalidRequestError):
    code = "request_too_large"


class DeadlineExceededError(RaggedServeError):
    status = 504
    code = "deadline_exceeded"


class StepFailedError(RaggedServeError):
    status = 500
    code = "step_failed"


class EngineUnavailableError(RaggedServeError):
    status = 503
    code = "engine_unavailable"


class StartupError(RaggedServeError):
    code = "startup_failed"


class ConfigurationError(StartupError):
    code = "configuration_error"


class ModelNotFoundError(StartupError):
    code = "model_not_found"


class UnsupportedModelError(StartupError):
    code = "model_unsupported"


class WeightsError(StartupError):
    code = "weights_invalid"


class DeterminismError(StartupError):
    code = "determinism_unavailable"
