"""The server over real sockets: answers, refusals, and clients that misbehave."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import jax
import pytest

from jaxsys.bench.serving import client
from jaxsys.bench.serving.http import Limits, bind
from jaxsys.bench.serving.load import Prompt
from jaxsys.bench.serving.run import Load, load_server, measure, served_here
from jaxsys.core.errors import UserError
from jaxsys.evaluate import Sampling, generate

from .conftest import Text


def ask(url, path, body=None, headers=None, method=None):
    """Send one request; status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if headers is None else headers
    method = method or ("GET" if data is None else "POST")
    connection.request(method, path, data, kind)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def complete(url, **fields):
    status, _, body = ask(url, "/v1/completions", {"model": "toy", "temperature": 0} | fields)
    return status, json.loads(body)


def metric(url, name):
    lines = ask(url, "/metrics")[2].decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"jaxsys_{name} ")).split()[-1])


def until(holds):
    """Wait for something that other threads do soon."""
    for _ in range(500):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def test_answers_are_those_of_generate(url, alone):
    text = Text()
    prompt = "Once upon"
    ids = text.encode(prompt).tolist()
    greedy = generate(alone, [ids], max_tokens=9, tokenizer=text)
    status, found = complete(url, prompt=prompt, max_tokens=9)
    assert (status, found["choices"][0]["text"]) == (200, greedy.texts[0])
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    drawn = generate(alone, [ids], max_tokens=9, tokenizer=text, key=jax.random.key(5),
                     sampling=Sampling(temperature=0.8, top_p=0.9))  # fmt: skip
    law = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    assert complete(url, prompt=ids, max_tokens=9, **law)[1]["choices"][0]["text"] == drawn.texts[0]
    chat = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3,
            "temperature": 0}  # fmt: skip
    found = json.loads(ask(url, "/v1/chat/completions", chat)[2])
    same = complete(url, prompt="u:hi\n", max_tokens=3)[1]["choices"][0]["text"]
    assert found["choices"][0]["message"] == {"role": "assistant", "content": same}


def test_streams_hold_the_same_text_and_the_counts(url):
    whole = complete(url, prompt="abc", max_tokens=7)[1]["choices"][0]["text"]
    fields = {"model": "toy", "prompt": "abc", "max_tokens": 7, "temperature": 0, "stream": True,
              "stream_options": {"include_usage": True}}  # fmt: skip
    status, headers, body = ask(url, "/v1/completions", fields)
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    events = [line[6:] for line in body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(e) for e in events[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole
    assert len(chunks) == 8
    assert chunks[-1]["usage"]["completion_tokens"] == 7


def test_a_stop_string_ends_an_answer(url):
    whole = complete(url, prompt="abc", max_tokens=12)[1]["choices"][0]["text"]
    stop = next(c for c in whole if c.isascii())
    found = complete(url, prompt="abc", max_tokens=12, stop=[stop])[1]["choices"][0]
    assert (found["text"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")


BAD = [
    (400, b"{", "not JSON"),
    (400, b"[" * 4000, "nested too deeply|not JSON"),
    (400, b"[]", "JSON list"),
    (400, b"\xff\xfe", "not JSON"),
    (400, {"prompt": "a", "temperature": float("nan")}, "not a number"),
    (400, {"prompt": 5}, "prompt must be"),
    (400, {"prompt": ["a", "b"]}, "several prompts"),
    (400, {"prompt": [1, True]}, "prompt must be"),
    (400, {"prompt": [999]}, "outside the model's vocabulary"),
    (400, {"prompt": [10**30]}, "outside the vocabulary"),
    (400, {"prompt": "a", "max_tokens": 0}, "max_tokens must be"),
    (400, {"prompt": "a", "max_tokens": 10**40}, "max_tokens must be"),
    (400, {"prompt": "a", "max_tokens": 2**31 - 1}, "64 tokens of a request"),
    (400, {"prompt": "a" * 80}, "the prompt has 80"),
    (400, {"prompt": "a", "max_tokens": "9"}, "max_tokens must be"),
    (400, {"prompt": "a", "temperature": -1}, "temperature must be"),
    (400, {"prompt": "a", "top_p": True}, "top_p must be"),
    (400, {"prompt": "a", "n": 2}, "n is not served"),
    (400, {"prompt": "a", "stop": ["a"] * 5}, "stop must be"),
    (400, {"prompt": "a", "stop": [""]}, "each text of stop"),
    (400, {"prompt": "a", "stream": 1}, "stream must be"),
    (400, {"prompt": "a", "surprise": 1}, "'surprise' is not a field"),
    (400, {"prompt": "\ud800", "max_tokens": 1}, "surrogate"),
    (404, {"prompt": "a", "model": "other"}, "not served here"),
    (413, {"prompt": "a" * 9000}, "4096 at most"),
]


def test_bad_requests_are_refused_and_leave_nothing_behind(url):
    for status, body, told in BAD:
        fields = {"model": "toy"} | body if isinstance(body, dict) else body
        got, _, answer = ask(url, "/v1/completions", fields)
        error = json.loads(answer)["error"]
        assert got == status, (body, error)
        assert any(part in error["message"] for part in told.split("|")), error
        assert set(error) == {"message", "type", "param", "code"}
    chat = {"model": "toy", "messages": [{"role": "nobody", "content": "x"}]}
    assert ask(url, "/v1/chat/completions", chat)[0] == 400
    for messages in ([], "x", [{"role": "user"}], [{"role": "user", "content": [{"type": "a"}]}]):
        fields = {"model": "toy", "messages": messages}
        assert ask(url, "/v1/chat/completions", fields)[0] == 400
    assert ask(url, "/nowhere")[0] == 404
    assert ask(url, "/v1/completions")[0] == 405
    assert ask(url, "/health", {})[0] == 405
    assert ask(url, "/v1/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert ask(url, "/health", headers={"X": "y" * 20_000})[0] == 431
    assert ask(url, "/health")[0] == 200
    assert [m["id"] for m in json.loads(ask(url, "/v1/models")[2])["data"]] == ["toy"]
    assert metric(url, "engine_running") == metric(url, "engine_pages_held") == 0


def raw(url):
    host, port = urlsplit(url).netloc.split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def post(fields):
    body = json.dumps({"model": "toy", "temperature": 0} | fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/3.0\r\n\r\n", 505),
        (b"GET /health HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
    ],
)
def test_what_is_no_http_is_refused(url, data, status):
    with raw(url) as connection:
        connection.sendall(data)
        assert connection.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_client_that_goes_frees_its_slot_and_pages(url):
    with raw(url) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 60, "stream": True}))
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    with raw(url) as connection:  # one that goes before its answer is there
        connection.sendall(post({"prompt": "b", "max_tokens": 60}))
    until(lambda: metric(url, "engine_running") == metric(url, "engine_waiting") == 0)
    assert metric(url, "engine_pages_held") == 0


def test_a_full_queue_is_told(make_served):
    with (
        served_here(make_served(), Limits(requests=1)) as url,
        ThreadPoolExecutor(12) as pool,
    ):
        found = list(pool.map(lambda i: complete(url, prompt=f"{i}", max_tokens=60), range(12)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    refused = next(body for status, body in found if status == 429)
    assert refused["error"]["type"] == "rate_limit_error"


def test_a_client_that_does_not_read_stalls_nobody(make_served, monkeypatch):
    # Each piece fills the buffers, so the slow client's answer cannot be written.
    from jaxsys.bench.serving import server

    plain = server.event
    monkeypatch.setattr(server, "event", lambda data: plain(data) + b":" * (1 << 20) + b"\n\n")
    limits = Limits(slow_s=1.0, write_bytes=1 << 10)
    with served_here(make_served(), limits) as url, raw(url) as slow:
        slow.sendall(post({"prompt": "a", "max_tokens": 60, "stream": True}))
        until(lambda: metric(url, "engine_running") + metric(url, "answer_tokens_total") > 0)
        status, found = complete(url, prompt="b", max_tokens=5)
        assert (status, found["usage"]["completion_tokens"]) == (200, 5)
        until(lambda: metric(url, "connections") == 1)  # the slow one was dropped
        assert metric(url, "engine_pages_held") == 0


def test_many_at_once_are_served_and_measured(make_served):
    prompts = [Prompt("once upon a time"[: 1 + i % 16], 1 + i % 9) for i in range(40)]
    row = measure(make_served(), prompts, Load(ignore_eos=True), slo={"e2e_s": 1e6})
    assert (row["kind"], row["requests"], row["failed"]) == ("serve", 40, 0)
    assert (
        row["output_tokens"] == row["engine"]["output_tokens"] == sum(p.max_tokens for p in prompts)
    )
    assert row["counted"]["given_tokens"] == row["output_tokens"]
    assert row["goodput_per_s"] == row["requests_per_s"]
    assert row["engine"]["ttft_s"]["mean"] <= row["ttft_s"]["mean"]


def test_ports_and_addresses_are_checked():
    with bind("127.0.0.1:0", expose=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be taken"):
            bind(f"127.0.0.1:{port}", expose=False)
    with pytest.raises(UserError, match="reached from other machines"):
        bind("0.0.0.0:0", expose=False)
    bind("0.0.0.0:0", expose=True).close()
    for wrong in ("127.0.0.1", ":80", "127.0.0.1:99999", "127.0.0.1:x", "no.such.host.invalid:1"):
        with pytest.raises(UserError):
            bind(wrong, expose=False)


def test_a_server_that_is_not_there_is_an_error_of_each_request():
    target = client.target_of("http://127.0.0.1:9/v1", "toy")
    assert "Connect" in load_server(target, [Prompt("a", 1)], Load())[0].error


@pytest.mark.slow
def test_a_thousand_connections_at_once(make_served):
    prompts = [Prompt(f"{i}", 4) for i in range(1000)]
    row = measure(make_served(), prompts, Load(ignore_eos=True))
    assert (row["failed"], row["output_tokens"]) == (0, 4000)


@pytest.mark.slow
def test_sigterm_ends_what_is_open_first(tmp_path):
    command = [sys.executable, "-m", "jaxsys", "bench", "serve", "tiny", "--listen", "127.0.0.1:0",
               "--context", "64", "--slots", "2"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        url = next(line for line in process.stderr if "http://" in line).split()[-1]
        with raw(url) as connection:
            fields = {"model": "tiny", "prompt": "a", "max_tokens": 40, "stream": True,
                      "ignore_eos": True}  # fmt: skip
            connection.sendall(post(fields))
            got = connection.recv(20)
            process.send_signal(signal.SIGTERM)
            while data := connection.recv(1 << 16):
                got += data
        assert b"[DONE]" in got
        assert process.wait(60) == 0
