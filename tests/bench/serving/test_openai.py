"""Another package's client: it understands the server, and takes the same times as ours."""

import asyncio
import threading

import pytest

from jaxsys.bench.serving import client, http
from jaxsys.bench.serving.load import Prompt
from jaxsys.bench.serving.metrics import Trace
from jaxsys.bench.serving.protocol import Answer, event
from jaxsys.bench.serving.run import Load, load_server

openai = pytest.importorskip("openai", reason="pip install 'jaxsys[openai]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_it_gets_answers_streams_and_errors(url):
    with openai.OpenAI(base_url=url, api_key="none") as theirs:
        assert [model.id for model in theirs.models.list()] == ["toy"]
        fields = {"model": "toy", "max_tokens": 6, "temperature": 0, "seed": 1}
        whole = theirs.completions.create(prompt="abc", **fields)
        pieces = theirs.completions.create(prompt="abc", stream=True, **fields)
        assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
        messages = [{"role": "user", "content": "hi"}]
        chat = theirs.chat.completions.create(messages=messages, **fields)
        stream = theirs.chat.completions.create(messages=messages, stream=True, **fields)
        said = "".join(p.choices[0].delta.content or "" for p in stream)
        assert said == chat.choices[0].message.content
        assert chat.usage.completion_tokens == 6
        with pytest.raises(openai.NotFoundError, match="not served here"):
            theirs.completions.create(prompt="abc", **fields | {"model": "other"})
        with pytest.raises(openai.BadRequestError) as refused:
            theirs.completions.create(prompt="abc", **fields | {"max_tokens": 999})
        assert refused.value.code == "context_length_exceeded"


class Slow:
    """A server whose clock goes on by one with each piece, long before it sends the next."""

    def __init__(self, chat):
        self.now, self.answer = 0.0, Answer("x", "toy", 0, chat)
        self.listening = http.bind("127.0.0.1:0", expose=False)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        async def main():
            await asyncio.start_server(self._answer, sock=self.listening)
            await asyncio.Event().wait()

        self.loop.run_until_complete(main())

    async def _answer(self, reader, writer):
        await http.read_request(reader, writer, http.Limits())
        writer.write(http.head_of(200, "text/event-stream", None, False))
        if self.answer.chat:
            writer.write(http.chunked(event(self.answer.chunk("", first=True))))
        for i in range(4):
            await asyncio.sleep(0.3)
            self.now += 1 + (i == 3)  # the last gap is twice as long
            data = event(self.answer.chunk(" a", "length" if i == 3 else None))
            data += event(self.answer.usage(3, 4)) if i == 3 else b""
            writer.write(http.chunked(data))
            await writer.drain()
        writer.write(http.chunked(event("[DONE]")) + http.chunked(b""))
        await writer.drain()
        writer.close()


@pytest.mark.parametrize("chat", [False, True])
def test_both_take_the_same_times(chat, monkeypatch):
    slow = Slow(chat)
    url = f"http://127.0.0.1:{slow.listening.getsockname()[1]}/v1"
    fields = {"model": "toy", "max_tokens": 4, "stream": True,
              "stream_options": {"include_usage": True}}  # fmt: skip
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as theirs:
        times, made = [], 0
        if chat:
            messages = [{"role": "user", "content": "hi"}]
            stream = theirs.chat.completions.create(messages=messages, **fields)
        else:
            stream = theirs.completions.create(prompt="hi", **fields)
        for piece in stream:
            made = piece.usage.completion_tokens if piece.usage else made
            for choice in piece.choices:
                if choice.delta.content if chat else choice.text:
                    times.append(slow.now)
    slow.now = 0.0
    monkeypatch.setattr(client.time, "perf_counter", lambda: slow.now)
    target = client.target_of(url, "toy", chat=chat)
    found = asyncio.run(client.ask(target, {"prompt": "hi"}))
    assert isinstance(found, Trace)
    assert found.error == ""
    assert list(found.token_s) == times == [1.0, 2.0, 3.0, 5.0]
    assert (found.tokens, found.prompt_tokens) == (made, 3)
    assert found.ttft_s == times[0]
    assert found.tpot_s == (times[-1] - times[0]) / (made - 1) == 4 / 3
    assert found.itl_s == (1.0, 1.0, 2.0)


def test_ours_asks_the_chat_endpoint(url):
    load = Load(chat=True, ignore_eos=True)
    found = load_server(client.target_of(url, "toy", chat=True), [Prompt("hi", 5)], load)[0]
    assert (found.error, found.tokens, len(found.token_s)) == ("", 5, 5)
