"""OpenAI's completions and chat, as far as they are served: checked requests, answers, errors.

Reference: OpenAI's API reference, "Completions" and "Chat"; `ignore_eos` is vLLM's addition, for
measurements that need answers of a given length.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

MOST_STOPS, LONGEST_STOP = 4, 256
# Fields that are known and not served, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
}
_IGNORED = ("user", "metadata", "store", "service_tier")


class Refusal(Exception):
    """Say why a request is not served, in OpenAI's form.

    Args:
      status: of HTTP.
      message: one sentence for the caller.
      code: OpenAI's short word for it, or None.
      param: the field at fault, or None.

    >>> Refusal(404, "no such model", "model_not_found", "model").status
    404
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """Give the answer's body."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        found = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": found}


@dataclass(frozen=True)
class Wanted:
    """Hold a checked request, before its text is turned into tokens.

    Attributes:
      chat: of the chat endpoint.
      prompt: text, ids, or the messages of a chat.
      max_tokens: None for as many as there is room for.
      temperature: 0 takes the most likely token.
      top_p: keeps the fewest most likely tokens that together reach it.
      seed: of the draws; None for any.
      stop: texts that end the answer.
      stream: token by token.
      include_usage: a streamed answer ends with its counts.
      ignore_eos: the end token ends nothing.

    >>> Wanted(False, "Once", 16).stream
    False
    """

    chat: bool
    prompt: str | tuple[int, ...] | tuple[Mapping[str, str], ...]
    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    ignore_eos: bool = False


def parse(body: bytes, *, chat: bool, model: str) -> Wanted:
    """Check a request's body.

    Args:
      body: JSON as it came.
      chat: of the chat endpoint.
      model: the name that is served.

    Raises:
      Refusal: what is wrong with it, with status 400, or 404 for another model.

    >>> parse(b'{"model": "tiny", "prompt": "Once", "max_tokens": 4}', chat=False, model="tiny")
    Wanted(chat=False, prompt='Once', max_tokens=4, temperature=1.0, top_p=1.0, seed=None, ...)
    >>> parse(b'[', chat=False, model="tiny")
    Traceback (most recent call last):
    ...
    jaxsys.bench.serving.protocol.Refusal: the body is not JSON...
    """
    fields = _object(body)
    prompt = "messages" if chat else "prompt"
    lengths = ("max_tokens", "max_completion_tokens") if chat else ("max_tokens",)
    numbers = ("temperature", "top_p", "seed")
    known = {"model", prompt, *lengths, *numbers, "stop", "stream", "stream_options", "ignore_eos"}
    for name, value in fields.items():
        if name not in known and name not in _NEUTRAL and name not in _IGNORED:
            _refuse(f"{name[:80]!r} is not a field of this request; leave it out", name[:80])
        if name in _NEUTRAL and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            _refuse(f"{name} is not served; leave it out", name)
    _check_model(fields.get("model"), model)
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        _refuse("stream_options must be an object", "stream_options")
    asked = {name: _whole(fields, name, 1, 2**31 - 1) for name in lengths}
    length = next((n for n in asked.values() if n is not None), None if chat else 16)
    return Wanted(
        chat=chat,
        prompt=_messages(fields) if chat else _prompt(fields),
        max_tokens=length,
        temperature=_number(fields, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(fields, "top_p", 0.0, 1.0, 1.0) or 1e-9,
        seed=_whole(fields, "seed", -(2**63), 2**63 - 1),
        stop=_stops(fields),
        stream=_flag(fields, "stream"),
        include_usage=_flag(options or {}, "include_usage"),
        ignore_eos=_flag(fields, "ignore_eos"),
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        found = json.loads(body, parse_constant=refuse_constant)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair has no encoding
    except UnicodeEncodeError:
        _refuse("the body holds half of a surrogate pair")
    except RecursionError:
        _refuse("the body is nested too deeply")
    except ValueError as error:
        _refuse(f"the body is not JSON ({str(error)[:120]})")
    if not isinstance(found, dict):
        _refuse(f"the body is a JSON {type(found).__name__}; it must be an object")
    return found


def _refuse(message: str, param: str | None = None) -> NoReturn:
    raise Refusal(400, message, None, param)


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        _refuse(f"model must be the name of a model, such as {model!r}", "model")
    if name != model:
        message = f"the model {name[:80]!r} is not served here; ask for {model!r}"
        raise Refusal(404, message, "model_not_found", "model")


def _whole(fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(f"{name} must be a whole number from {low} to {high}", name)
    return value


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        _refuse(f"{name} must be a number from {low:g} to {high:g}", name)
    return float(value) if math.isfinite(value) else default


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(f"{name} must be true or false", name)
    return bool(value)


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop")
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MOST_STOPS:
        _refuse(f"stop must be a text or a list of {MOST_STOPS} texts at most", "stop")
    if any(not isinstance(s, str) or not 0 < len(s) <= LONGEST_STOP for s in found):
        _refuse(f"each text of stop must have 1 to {LONGEST_STOP} characters", "stop")
    return tuple(found)


def _prompt(fields: Mapping[str, Any]) -> str | tuple[int, ...]:
    value = fields.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            if not all(0 <= i < 2**31 for i in value):
                _refuse("prompt has token ids outside the vocabulary", "prompt")
            return tuple(value)
        if all(isinstance(i, str | list) for i in value):
            _refuse("prompt holds several prompts; send each by itself", "prompt")
    _refuse("prompt must be a text or a list of token ids", "prompt")


def _messages(fields: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        _refuse("messages must be a list of one message at least", "messages")
    return tuple(_message(i, message) for i, message in enumerate(value))


def _message(i: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        _refuse(f"messages[{i}] must be an object with a role and a content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(content):
            content = "".join(texts)
    if not isinstance(content, str):
        _refuse(f"messages[{i}].content must be a text, or a list of texts", "messages")
    return {"role": message["role"], "content": content}


@dataclass(frozen=True)
class Answer:
    """Write the parts of an answer.

    Attributes:
      ident: of the answer, such as cmpl-7.
      model: the name that is served.
      created: seconds since 1970.
      chat: of the chat endpoint.

    >>> Answer("cmpl-7", "tiny", 0, chat=False).whole(" upon", "stop", 3, 1)["choices"][0]["text"]
    ' upon'
    """

    ident: str
    model: str
    created: int
    chat: bool

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chat = {"whole": "chat.completion", "chunk": "chat.completion.chunk"}
        found = chat[kind] if self.chat else "text_completion"
        return {"id": self.ident, "object": found, "created": self.created, "model": self.model,
                "choices": choices}  # fmt: skip

    def whole(self, text: str, finish: str, prompt: int, made: int) -> dict[str, Any]:
        """Write an answer at once, with its counts of tokens."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return self._frame("whole", [choice]) | {"usage": _usage(prompt, made)}

    def chunk(self, text: str, finish: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """Write a piece of a streamed answer; `first` opens a chat's, before any token."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if not self.chat:
            choice["text"] = text
        else:
            choice["delta"] = {"role": "assistant", "content": ""} if first else {"content": text}
        return self._frame("chunk", [choice])

    def usage(self, prompt: int, made: int) -> dict[str, Any]:
        """Write the counts that end a streamed answer."""
        return self._frame("chunk", []) | {"usage": _usage(prompt, made)}


def _usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def event(data: Any) -> bytes:
    """Write one server-sent event.

    >>> event({"a": 1})
    b'data: {"a":1}\\n\\n'
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
