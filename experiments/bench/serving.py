"""Serve a burst of requests with SmolLM2-135M on a CPU, beside transformers and llama.cpp.

    python experiments/bench/serving.py            about 4 minutes on 2 cores, idle
    python experiments/bench/serving.py --smoke    under 30 s: the model tiny, ours alone, not kept

All requests come at once; each has a made-up prompt and as many new tokens as every other. Ours
runs as `jaxsys bench serve --listen` in a process of its own and is asked over HTTP, and so is the
server of llama-cpp-python where it is installed, on the 4-bit file as it is (ours and transformers
compute with that file's weights as float32). transformers' `generate` gets the requests one by
one, and in one batch of all, whose requests all end together. The engines stay loaded and take
turns in shuffled order; ratios are of rounds. The target, 10 x transformers' generate, is one for
a GPU; here stands what two cores give. Written are results/serving.jsonl, .md and .png.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.bench.records import record
from jaxsys.bench.serving.client import target_of
from jaxsys.bench.serving.load import Prompt, synthetic_prompts
from jaxsys.bench.serving.metrics import Trace, summarise
from jaxsys.bench.serving.run import Load, layout_for, load_server, measure, open_served
from jaxsys.core.measure import machine, ratio, timing
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure, to_json

RESULTS = Path(__file__).parent / "results"
SLOTS, PROMPT_TOKENS = 16, 64


def transformers_side(folder: str) -> None:
    """Answer lines of {"prompts", "new", "batch"} with the seconds at which each request ended."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        begin_s, ended_s = time.perf_counter(), []
        for i in range(0, len(task["prompts"]), task["batch"]):
            given = tokenizer(task["prompts"][i : i + task["batch"]], return_tensors="pt",
                              padding=True)  # fmt: skip
            with torch.inference_mode():
                model.generate(
                    **given,
                    do_sample=False,
                    min_new_tokens=task["new"],
                    max_new_tokens=task["new"],
                    pad_token_id=tokenizer.pad_token_id,
                )
            ended_s += [time.perf_counter() - begin_s] * given["input_ids"].shape[0]
        print(json.dumps(ended_s), file=out, flush=True)


class Transformers:
    """`generate`, one request after another or in batches."""

    def __init__(self, process: subprocess.Popen, batch: int):
        self.process, self.batch = process, batch

    def run(self, prompts: list[Prompt]) -> list[Trace]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        texts, new = [p.text for p in prompts], prompts[0].max_tokens
        task = {"prompts": texts, "new": new, "batch": self.batch}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        # When its tokens came within that time, generate does not say.
        return [Trace(0.0, (), end_s, 0, new) for end_s in ended]


class Http:
    """A server of its own process."""

    def __init__(self, url: str, model: str, ignore_eos: bool):
        self.target, self.load = target_of(url, model), Load(ignore_eos=ignore_eos)

    def run(self, prompts: list[Prompt]) -> list[Trace]:
        return load_server(self.target, prompts, self.load)


def start_ours(folder: Path, context: int) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "jaxsys", "bench", "serve", str(folder), "--listen",
               "127.0.0.1:0", "--slots", str(SLOTS), "--context", str(context)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " at http://" in line:
            return process, line.split()[-1]
    raise RuntimeError("".join(lines))


def start_llama(path: Path, context: int, port: int) -> tuple[subprocess.Popen, str]:
    threads = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port),
               "--n_ctx", str(context), "--n_threads", threads, "--n_threads_batch", threads,
               "--model_alias", "smollm2", "--interrupt_requests", "false"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/models", timeout=1)
            return process, url
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.25)
    raise RuntimeError("llama.cpp's server did not start")


def engines(scratch: Path, given: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Start all that are installed."""
    from jaxsys.data.tokenizer import load_tokenizer, save_tokenizer
    from jaxsys.models import lm

    context = PROMPT_TOKENS + given.new + 16
    path, folder = lm.find_model("smollm2"), scratch / "smollm2"
    lm.convert(path, folder, dtype=np.float32)
    save_tokenizer(folder, load_tokenizer(path))
    process, url = start_ours(folder, context)
    found: dict[str, Any] = {"jaxsys": Http(url, str(folder), True)}
    processes = [process]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        command = [sys.executable, __file__, "--transformers", str(folder)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        found["transformers, one by one"] = Transformers(process, 1)
        found["transformers, one batch"] = Transformers(process, given.requests)
        processes.append(process)
    if all(importlib.util.find_spec(name) for name in ("llama_cpp", "uvicorn", "starlette")):
        process, url = start_llama(path, context, 8431)
        found["llama.cpp server, 4 bits"] = Http(url, "smollm2", False)
        processes.append(process)
    return found, processes


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a burst beside other engines.")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transformers", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.transformers:
        transformers_side(given.transformers)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if given.smoke:
            smoke(given)
            return
        found, processes = engines(Path(scratch), given)
        try:
            traces = run_rounds(found, given)
        finally:
            for process in processes:
                process.terminate()
                process.wait(60)
    write(traces, given)


def smoke(given: argparse.Namespace) -> None:
    served = open_served("tiny", layout_for(48, slots=4))
    prompts = synthetic_prompts(8, 16, 8, served.tokenizer, given.seed)
    row = measure(served, prompts, Load(ignore_eos=True))
    if row["failed"] or row["output_tokens"] != 64:
        raise RuntimeError(to_json(row))
    print(f"8 requests at once, {row['output_tokens_per_s']:.0f} tokens/s")


def run_rounds(found: dict[str, Any], given: argparse.Namespace) -> dict[str, list[list[Trace]]]:
    """Give every engine the same burst in every round, in shuffled order."""
    from jaxsys.data.tokenizer import load_tokenizer
    from jaxsys.models import lm

    tokenizer = load_tokenizer(lm.find_model("smollm2"))
    rng = np.random.default_rng(given.seed)
    traces: dict[str, list[list[Trace]]] = {name: [] for name in found}
    names = list(found)
    warm = synthetic_prompts(2, PROMPT_TOKENS, 4, tokenizer, given.seed + 999)
    for name in names:
        found[name].run(warm)
    for i in range(given.rounds):
        # New prompts in each round, so that no engine meets what it has read before.
        prompts = synthetic_prompts(
            given.requests, PROMPT_TOKENS, given.new, tokenizer, given.seed + i
        )
        for j in rng.permutation(len(names)):
            got = found[names[j]].run(prompts)
            failed = [trace.error for trace in got if trace.error]
            if failed:
                raise RuntimeError(f"{names[j]}: {failed[0]}")
            traces[names[j]].append(got)
            print(f"round {i + 1}, {names[j]}: {rate_of(got):.1f} tokens/s", flush=True)
    return traces


def rate_of(traces: list[Trace]) -> float:
    return summarise(traces)["output_tokens_per_s"] or 0.0


def write(traces: dict[str, list[list[Trace]]], given: argparse.Namespace) -> None:
    """Write rows, table and figure."""
    ours = timing("jaxsys", [1 / rate_of(burst) for burst in traces["jaxsys"]])
    rows, table = [], []
    fig, axes = figure()
    axis = axes[0, 0]
    for name, bursts in traces.items():
        whole = [trace for burst in bursts for trace in burst]
        found = summarise(whole)
        rates = [rate_of(burst) for burst in bursts]
        per_token = timing(name, [1 / rate for rate in rates])
        # A batch's pieces are not known one by one, and the rounds do not follow each other.
        timed = any(trace.token_s for trace in whole)
        blank = dict.fromkeys(("p50", "p90", "p99", "mean"))
        found |= {} if timed else dict.fromkeys(("ttft_s", "tpot_s", "itl_s"), blank)
        found |= {"output_tokens_per_s": float(np.median(rates)), "duration_s": None,
                  "requests_per_s": float(np.median(rates)) / given.new}  # fmt: skip
        flags = {"engine": name, "model": "smollm2", "rate": "inf", "requests": given.requests}
        flags |= {"new": given.new, "prompt_tokens": PROMPT_TOKENS, "rounds": given.rounds}
        rows.append(record("serve", given.seed, flags, **found, rounds_tokens_per_s=rates))
        row = {"engine": name, "tokens/s": f"{np.median(rates):.1f}"}
        if name != "jaxsys":
            row["jaxsys is faster by"] = f"{ratio(per_token, ours):.2f}"
        row |= {f"{label} {q} s": "" if found[part][q] is None else f"{found[part][q]:.3g}"
                for part, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E"))
                for q in ("p50", "p99")}  # fmt: skip
        table.append(row)
        seconds, shares = zip(*found["e2e_cdf"], strict=True)
        axis.step([0, *seconds], [0, *shares], where="post", label=name)
    axis.set_xlabel("seconds from the burst to the end of a request")
    axis.set_ylabel("share of the requests")
    axis.legend(fontsize=7)
    text = (
        f"# A burst of {given.requests} requests, {PROMPT_TOKENS} tokens in, {given.new} out\n\n"
        f"SmolLM2-135M on a CPU, {given.rounds} rounds in one interleaved run; ratios are medians "
        f"of rounds with 95 % intervals.\n\n{markdown_table(table)}\n"
        f"{machine()}\n\n`python experiments/bench/serving.py --requests {given.requests} --new "
        f"{given.new} --rounds {given.rounds} --seed {given.seed}`\n"
    )
    atomic_write(RESULTS / "serving.jsonl", "".join(to_json(row) + "\n" for row in rows))
    atomic_write(RESULTS / "serving.md", text)
    save_figure(fig, RESULTS / "serving.png")
    print(text)


if __name__ == "__main__":
    main()
