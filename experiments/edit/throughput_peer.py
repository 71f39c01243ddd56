"""Edit with the released MEMIT code, in an environment of its own (extra `peers`, transformers).

    python throughput_peer.py CODE WORK        called by throughput.py

CODE is a checkout of kmeng01/memit. It was written for older libraries and one GPU; a copy in
WORK/peer is changed in the places listed in `CHANGES`, which say what and why, and in nothing else.
WORK holds the model as a Hugging Face folder, `task.json` (facts, prefixes, settings) and
`moments.npz`. For each batch the wall time of `execute_memit` is printed and kept in
`peer_N.json`; the changes of the weights go to `peer_N.npz`, to be held against ours.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

TENSOR = "(cur_out[0] if isinstance(cur_out, tuple) else cur_out)"
CHANGES = [
    # file, old, new: why
    ("rome/__init__.py", None, ""),  # imports ROME, and with it `datasets`, which is not used
    ("memit/__init__.py", None, ""),
    ("util/__init__.py", None, ""),
    ("util/globals.py", None, 'STATS_DIR = ""\n'),  # folders of its own configuration file
    ("memit/memit_main.py", "from rome.layer_stats import layer_stats\n", ""),
    # No GPU here.
    ("memit/memit_main.py", '"cuda"', '"cpu"'),
    ("memit/compute_z.py", '"cuda"', '"cpu"'),
    # GPT-2's name of the width.
    ("memit/compute_z.py", "model.config.n_embd", "model.config.hidden_size"),
    # A block of a present-day transformers returns a tensor and not a tuple.
    ("memit/compute_z.py", "cur_out[0][0, lookup_idxs[0]]", f"{TENSOR}[0, lookup_idxs[0]]"),
    ("memit/compute_z.py", "cur_out[0][i, idx, :] += delta", f"{TENSOR}[i, idx, :] += delta"),
    (
        "memit/compute_z.py",
        ".format(loss_layer)].output[0][",
        ".format(loss_layer)].output[",
    ),
    # A slice of an encoded batch is a dict by now.
    (
        "rome/repr_tools.py",
        "batch_tok[i : i + n] for i",
        'batch_tok["input_ids"][i : i + n] for i',
    ),
]


def patched(code: Path, work: Path) -> Path:
    """Copy the code and change it."""
    copy = work / "peer"
    shutil.rmtree(copy, ignore_errors=True)
    for part in ("memit", "rome", "util"):
        shutil.copytree(code / part, copy / part)
    for name, old, new in CHANGES:
        file = copy / name
        text = file.read_text()
        if old is not None and old not in text:
            raise SystemExit(f"{name} holds no {old!r}: another version of the code than was read")
        file.write_text(new if old is None else text.replace(old, new))
    return copy


def main() -> None:
    """Edit each batch and write how long it took."""
    code, work = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(patched(code, work)))
    import torch
    from memit import memit_main
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = json.loads((work / "task.json").read_text())
    moments = np.load(work / "moments.npz")
    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "model", padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    memit_main.CONTEXT_TEMPLATES_CACHE = [["{}"], [f"{p}. {{}}" for p in task["prefixes"]]]
    memit_main.get_cov = lambda model, tok, name, *_, **__: torch.from_numpy(
        moments[name.split(".")[2]]
    )
    settings = memit_main.MEMITHyperParams(
        **task["settings"],
        layer_selection="all",
        fact_token="subject_last",
        v_loss_layer=model.config.num_hidden_layers - 1,
        mom2_adjustment=True,
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}",
        mlp_module_tmp="model.layers.{}.mlp",
        attn_module_tmp="model.layers.{}.self_attn",
        ln_f_module="model.norm",
        lm_head_module="model.embed_tokens" if model.config.tie_word_embeddings else "lm_head",
        mom2_dataset="",
        mom2_n_samples=0,
        mom2_dtype="float32",
    )
    for count in task["peer_batches"]:
        begin_s = time.perf_counter()
        deltas = memit_main.execute_memit(model, tokenizer, task["facts"][:count], settings)
        seconds = time.perf_counter() - begin_s
        arrays = {}
        for name, (key, residual) in deltas.items():
            arrays[name] = (residual @ key.T).numpy().astype(np.float32)
        np.savez(work / f"peer_{count}.npz", **arrays)
        kept = {"batch": count, "seconds": seconds, "torch": torch.__version__}
        (work / f"peer_{count}.json").write_text(json.dumps(kept))
        print(f"PEER {count} {seconds}", flush=True)


if __name__ == "__main__":
    main()
