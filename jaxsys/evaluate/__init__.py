"""Score, question and sample language models: any model that fits `Model`, or one of ours."""

from jaxsys.evaluate.choice import Choices, multiple_choice
from jaxsys.evaluate.exact import Prompt, exact_match
from jaxsys.evaluate.generate import Generated, Piece, generate
from jaxsys.evaluate.metrics import Accuracy, accuracy
from jaxsys.evaluate.perplexity import Perplexity, perplexity
from jaxsys.evaluate.protocol import Model, from_forward, from_lm
from jaxsys.evaluate.sampling import Sampling
from jaxsys.evaluate.score import Request, Scores, encode_pair, score
from jaxsys.evaluate.tasks import Task, load_task, task_names

__all__ = [
    "Accuracy",
    "Choices",
    "Generated",
    "Model",
    "Perplexity",
    "Piece",
    "Prompt",
    "Request",
    "Sampling",
    "Scores",
    "Task",
    "accuracy",
    "encode_pair",
    "exact_match",
    "from_forward",
    "from_lm",
    "generate",
    "load_task",
    "multiple_choice",
    "perplexity",
    "score",
    "task_names",
]
