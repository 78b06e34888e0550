"""The exception family. Knows the HTTP status and OpenAI error code of every failure; knows nothing of HTTP itself.

RaggedServeError                  500 internal_error
|- InvalidRequestError            400 invalid_request          the caller's mistake, the server goes on
|  |- InvalidBodyError            400 invalid_body             not a JSON object in UTF-8
|  |- InvalidParameterError       400 invalid_parameter        one field is out of its range
|  |- UnknownParameterError       400 unknown_parameter        there is no such field
|  |- UnsupportedParameterError   400 unsupported_parameter    the field is known, and this server does not have it
|  |- InvalidPromptError          400 invalid_prompt           empty, or a token id outside the vocabulary
|  |- ContextLengthError          400 context_length_exceeded  longer than the model's context
|  |- RequestTooLargeError        400 request_too_large        could never fit this replica's KV cache
|  |- InvalidApiKeyError          401 invalid_api_key          no key, or none of ours
|  |- UnknownModelError           404 model_not_found          no model of that name is served
|  |- RequestNotFoundError        404 request_not_found        no request of that id is remembered
|  |- NotEnabledError             404 not_enabled              the server can do it, and was not told to
|  |- InvalidEventIdError         400 invalid_event_id         Last-Event-ID is none of ours, or of another request
|  |- UnknownStreamError          404 stream_not_found         it began with another body or another key
|  |- StreamResumedError          409 stream_resumed           its client goes on reading it somewhere else
|  |- StreamGoneError             410 stream_gone              nothing is kept of it any more
|  `- BodyTooLargeError           413 body_too_large           more bytes than a body may have
|- DeadlineExceededError          504 deadline_exceeded
|- StepFailedError                500 step_failed              the model could not compute this request
|- DeviceLostError                503 device_lost              the GPU computes nothing any more: the engine must end
|- SlowReaderError                408 slow_reader              the client reads too slowly
|- ReplicaKillerError             500 replica_killer           replicas die of this request
|- EngineUnavailableError         503 engine_unavailable       stopping, draining or dead
|  `- ServerDrainingError          503 engine_unavailable       the server, or this ingress of it, ends
|- OverloadedError                429 overloaded               no room, and the queue is full or the wait too long
|- LeaseRefusedError              503 lease_refused            the replica's pool has less room than was booked
|- IngressStalledError            503 ingress_stalled          an ingress took no outputs, so its requests were ended
|- ReplicaLostError               503 replica_lost             it died, or it is to be treated as if it had
|  |- ReplicaUnreachableError     503 replica_lost             no answer; it may live, and the call may have run
|  |- ChannelLostError            503 replica_lost             the replica lives and has given this channel up
|  |- ReplicaDrainedError         503 replica_drained          the replica leaves, and its time is over
|  `- IngressStoppingError        503 engine_unavailable       this ingress ends, with what is left on it
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

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross processes. Made again from what they hold: an ``__init__`` may ask for other arguments."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(family: type[RaggedServeError], args: tuple[object, ...], state: dict[str, object]) -> RaggedServeError:
    error = family.__new__(family)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidRequestError(RaggedServeError):
    status = 400
    code = "invalid_request"


class InvalidBodyError(InvalidRequestError):
    code = "invalid_body"


class InvalidParameterError(InvalidRequestError):
    """A parameter outside its range. The message names the parameter, the value and what is allowed."""

    code = "invalid_parameter"

    def __init__(self, param: str, value: object, allowed: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{param} is {shown}; it must be {allowed}")
        self.param = param


class UnknownParameterError(InvalidRequestError):
    """``nearest``: the known name that the given one may stand for."""

    code = "unknown_parameter"

    def __init__(self, param: str, nearest: str | None = None) -> None:
        shown = param if len(param) <= 80 else param[:77] + "..."
        hint = "" if nearest is None else f"; did you mean {nearest!r}?"
        super().__init__(f"unknown parameter {shown!r}{hint}")
        self.param = shown


class UnsupportedParameterError(InvalidRequestError):
    """``reason`` follows the parameter's name in the message."""

    code = "unsupported_parameter"

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param} {reason}")
        self.param = param


class InvalidPromptError(InvalidRequestError):
    code = "invalid_prompt"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class RequestTooLargeError(InvalidRequestError):
    code = "request_too_large"


class InvalidApiKeyError(InvalidRequestError):
    status = 401
    code = "invalid_api_key"


class UnknownModelError(InvalidRequestError):
    """``served``: the names a request may use."""

    status = 404
    code = "model_not_found"

    def __init__(self, model: str, served: tuple[str, ...] = ()) -> None:
        shown = model if len(model) <= 80 else model[:77] + "..."
        names = ", ".join(served)
        super().__init__(f"there is no model {shown!r} here" + (f"; served: {names}" if names else ""))
        self.param = "model"


class RequestNotFoundError(InvalidRequestError):
    status = 404
    code = "request_not_found"

    def __init__(self, request_id: str) -> None:
        shown = request_id if len(request_id) <= 160 else request_id[:157] + "..."
        super().__init__(
            f"no request {shown!r} of yours is known: it must be the X-Request-Id or the answer's id of a recent or running"
            " request, made with the same API key"
        )
        self.param = "id"


class NotEnabledError(InvalidRequestError):
    """``option``: what would have to be true, in the configuration."""

    status = 404
    code = "not_enabled"

    def __init__(self, option: str) -> None:
        super().__init__(f"this is off; {option}: true in the configuration of the server switches it on")
        self.param = option


class InvalidEventIdError(InvalidRequestError):
    """``reason`` follows "Last-Event-ID" in the message."""

    code = "invalid_event_id"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Last-Event-ID {reason}")
        self.param = "Last-Event-ID"


class UnknownStreamError(InvalidRequestError):
    status = 404
    code = "stream_not_found"


class StreamResumedError(InvalidRequestError):
    """``ticket``: of the resume that is the latest one."""

    status = 409
    code = "stream_resumed"

    def __init__(self, message: str, ticket: int = 0) -> None:
        super().__init__(message)
        self.ticket = ticket


class StreamGoneError(InvalidRequestError):
    status = 410
    code = "stream_gone"


class BodyTooLargeError(InvalidRequestError):
    status = 413
    code = "body_too_large"


class DeadlineExceededError(RaggedServeError):
    status = 504
    code = "deadline_exceeded"


class StepFailedError(RaggedServeError):
    status = 500
    code = "step_failed"


class DeviceLostError(RaggedServeError):
    """No step can succeed any more in this process."""

    status = 503
    code = "device_lost"


class ReplicaKillerError(RaggedServeError):
    """Said to this request alone; the others that ran beside it go on."""

    status = 500
    code = "replica_killer"


class SlowReaderError(RaggedServeError):
    """The client does not take what it asked for, and nothing may be kept for it without a limit."""

    status = 408
    code = "slow_reader"


class EngineUnavailableError(RaggedServeError):
    status = 503
    code = "engine_unavailable"


class _WithRetryAfter(Exception):
    """``retry_after``: whole seconds, at least 1: the header Retry-After."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerDrainingError(_WithRetryAfter, EngineUnavailableError):
    """After ``retry_after`` another server may be there."""


class OverloadedError(_WithRetryAfter, RaggedServeError):
    """After ``retry_after`` room is likely."""

    status = 429
    code = "overloaded"


class LeaseRefusedError(RaggedServeError):
    status = 503
    code = "lease_refused"


class IngressStalledError(RaggedServeError):
    status = 503
    code = "ingress_stalled"


class ReplicaLostError(RaggedServeError):
    """Its requests can go on elsewhere, from the tokens that have arrived.

    ``may_be_a_death``: the replica may have died, and of one of its requests.
    """

    status = 503
    code = "replica_lost"
    may_be_a_death = True


class ReplicaUnreachableError(ReplicaLostError):
    """Worth another try, if the call may run twice."""


class ChannelLostError(ReplicaLostError):
    """What ran in it was aborted. The replica takes a new channel."""

    may_be_a_death = False


class ReplicaDrainedError(ReplicaLostError):
    """It ended what was left on it, as it was asked to: no request is to blame, and the replica is not dead."""

    code = "replica_drained"
    may_be_a_death = False


class IngressStoppingError(ReplicaLostError):
    """The ingress itself ends: the replicas are well, and there is nowhere to go on."""

    code = "engine_unavailable"
    may_be_a_death = False


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
