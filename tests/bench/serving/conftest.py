"""One small random model, its engine and its server, for all tests of serving."""

import jax
import pytest

from jaxsys.bench.serving.engine import Engine
from jaxsys.bench.serving.http import Limits
from jaxsys.bench.serving.run import Served, layout_for, served_here
from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer
from jaxsys.evaluate import from_lm
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 256, 32, 2, 4, 2, 8, 48, 256)
LAYOUT = layout_for(64, slots=3, pages=20, page_tokens=4, prompt_rows=3, row_tokens=5)


class Text(ByteTokenizer):
    """Bytes, with a chat template that puts roles before the contents."""

    bos_id, eos_id = 1, None

    def apply_chat_template(self, messages):
        if any(message["role"] == "nobody" for message in messages):
            raise UserError("the chat template refuses the conversation")
        return "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages)


@pytest.fixture(scope="session")
def params():
    # Larger weights than usual: fresh ones give nearly the same logits for every token.
    fresh = lm.init(jax.random.key(0), CONFIG)
    return jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, fresh)


@pytest.fixture(scope="session")
def alone(params):
    """The same model for `evaluate.generate`."""
    return from_lm(params, CONFIG)


@pytest.fixture(scope="session")
def make_served(params):
    def make(layout=LAYOUT, end_ids=frozenset()):
        return Served(Engine(params, CONFIG, layout), Text(), "toy", end_ids)

    return make


@pytest.fixture
def url(make_served):
    """A server of its own for each test; the programs are compiled once."""
    limits = Limits(requests=8, connections=32, body_bytes=4096, head_s=5.0, slow_s=1.0)
    with served_here(make_served(), limits) as found:
        yield found
