"""CLIP against transformers on random weights, and OpenAI's form against torch's own attention."""

import json

import jax
import numpy as np
import pytest

from jaxsys.core.checkpoint import write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.models import clip
from jaxsys.models.clip.tokens import byte_characters
from jaxsys.models.encoder import unit

transformers = pytest.importorskip("transformers", reason="pip install 'jaxsys[parity]'")
torch = pytest.importorskip("torch", reason="pip install 'jaxsys[parity]'")
pytestmark = pytest.mark.filterwarnings("ignore")

TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 12}
VISION = TOWER | {"hidden_size": 24, "intermediate_size": 40, "image_size": 16, "patch_size": 8}
TEXT = TOWER | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 10,
}


def _theirs(eos: int, act: str):
    torch.manual_seed(eos)
    more = {"hidden_act": act, "layer_norm_eps": 1e-4}
    config = transformers.CLIPConfig(
        text_config=TEXT | more | {"eos_token_id": eos, "bos_token_id": 1, "pad_token_id": 0},
        vision_config=VISION | more,
        projection_dim=12,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("eos", "act"), [(29, "quick_gelu"), (2, "gelu")])
def test_both_towers_tokens_and_logits_are_those_of_transformers(tmp_path, eos, act):
    theirs = _theirs(eos, act)
    theirs.save_pretrained(tmp_path / "theirs")
    params, config = clip.load(tmp_path / "theirs")
    assert (config.eos_id, config.vision.activation, config.vision.norm_eps) == (eos, act, 1e-4)
    clip.save(tmp_path / "ours", params, config)
    again = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()

    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    ids = rng.integers(3, 29, (4, 7))
    ids[[0, 1, 2, 3], [6, 3, 4, 2]] = 29
    run = jax.jit(lambda p, x, t: (clip.encode_image(p, config, x), clip.encode_text(p, config, t)))
    picture, text = run(params, images, ids)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for model in (theirs, again):
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(ids), pixel_values=pixels)
        seen, read = out.vision_model_output, out.text_model_output
        for got, wanted in (
            (picture.tokens, seen.last_hidden_state),
            (unit(picture.features), out.image_embeds),
            (text.tokens, read.last_hidden_state),
            (unit(text.features), out.text_embeds),
            (
                clip.logits(picture.features, text.features, params["logit_scale"]),
                out.logits_per_image,
            ),
        ):
            np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_openais_form_computes_what_its_modules_do(tmp_path):
    torch.manual_seed(0)
    width, heads, depth = 128, 2, 2
    attention = [torch.nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(depth)]

    def draw(*shape):
        return 0.1 * torch.randn(*shape)

    visual = {"class_embedding": draw(width), "positional_embedding": draw(5, width)}
    visual |= {"conv1.weight": draw(width, 3, 4, 4), "proj": draw(width, 6)}
    tensors = {f"visual.{name}": x for name, x in visual.items()}
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        tensors |= {f"{norm}.weight": 1 + draw(width), f"{norm}.bias": draw(width)}
    for tower in ("visual.transformer", "transformer"):
        for i in range(depth):
            block = f"{tower}.resblocks.{i}"
            for name, x in attention[i].state_dict().items():
                tensors[f"{block}.attn.{name}"] = x.clone() + (0 if "weight" in name else 0.1)
            for norm in ("ln_1", "ln_2"):
                tensors |= {f"{block}.{norm}.weight": 1 + draw(width)}
                tensors |= {f"{block}.{norm}.bias": draw(width)}
            tensors |= {f"{block}.mlp.c_fc.weight": draw(64, width)}
            tensors |= {f"{block}.mlp.c_fc.bias": draw(64)}
            tensors |= {f"{block}.mlp.c_proj.weight": draw(width, 64)}
            tensors |= {f"{block}.mlp.c_proj.bias": draw(width)}
    tensors |= {"token_embedding.weight": draw(20, width), "positional_embedding": draw(6, width)}
    tensors |= {"text_projection": draw(width, 6), "logit_scale": torch.tensor(1.0)}
    arrays = {name: x.detach().numpy() for name, x in tensors.items()}
    write_safetensors(tmp_path, arrays, arrays.get)
    params, config = clip.load(tmp_path)
    assert (config.vision.heads, config.text.heads, config.image_size) == (2, 2, 8)

    functional = torch.nn.functional

    def norm(x, name):
        return functional.layer_norm(
            x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        )

    def blocks(x, tower, mask):
        for i in range(depth):
            block = f"{tower}.resblocks.{i}"
            state = {n: tensors[f"{block}.attn.{n}"] for n in attention[i].state_dict()}
            attention[i].load_state_dict(state)
            y = norm(x, f"{block}.ln_1")
            x = x + attention[i](y, y, y, need_weights=False, attn_mask=mask)[0]
            y = norm(x, f"{block}.ln_2")
            y = y @ tensors[f"{block}.mlp.c_fc.weight"].T + tensors[f"{block}.mlp.c_fc.bias"]
            y = y * torch.sigmoid(1.702 * y)
            y = y @ tensors[f"{block}.mlp.c_proj.weight"].T + tensors[f"{block}.mlp.c_proj.bias"]
            x = x + y
        return x

    images, ids = draw(2, 3, 8, 8), torch.tensor([[18, 4, 5, 19, 0, 0], [18, 19, 3, 3, 0, 0]])
    with torch.no_grad():
        x = functional.conv2d(images, visual["conv1.weight"], stride=4).flatten(2).transpose(1, 2)
        first = visual["class_embedding"].expand(2, 1, width)
        x = torch.cat([first, x], 1) + visual["positional_embedding"]
        x = blocks(norm(x, "visual.ln_pre"), "visual.transformer", None)
        seen = norm(x[:, 0], "visual.ln_post") @ visual["proj"]
        mask = torch.full((6, 6), -torch.inf).triu(1)
        x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
        x = norm(blocks(x, "transformer", mask), "ln_final")
        read = x[torch.arange(2), ids.argmax(-1)] @ tensors["text_projection"]
    pixels = images.permute(0, 2, 3, 1).numpy()
    got = jax.jit(lambda p, x: clip.encode_image(p, config, x).features)(params, pixels)
    np.testing.assert_allclose(got, seen, atol=1e-4)
    got = jax.jit(lambda p, t: clip.encode_text(p, config, t).features)(params, ids.numpy())
    np.testing.assert_allclose(got, read, atol=1e-4)


@pytest.mark.parametrize("shape", [(50, 40), (33, 97), (20, 21), (16, 16)])
def test_pictures_are_prepared_as_transformers_does_with_pillow(shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = clip.ClipConfig(clip.Tower(8, 1, 2, 8), clip.Tower(8, 1, 2, 8), 4, 16, 8)
    wanted = np.asarray(theirs(image, return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(
        clip.preprocess([image], config), wanted.transpose(0, 2, 3, 1), atol=1e-5
    )


TEXTS = [
    "The chair's legs: wooden, wood & 12 brown-ish!!",
    "a round  TABLE with caf\u00e9 \U0001f600 \u6905\u5b50, it isn't 3.14",
    "naive text \u2014 with dashes\u2026 and \u00bd",
]


def test_tokens_are_those_of_transformers(tmp_path):
    """On the real merges where open_clip_torch lies beside us, else on a few of our own."""
    try:
        ours = clip.load_tokenizer()
        vocab, merges = _parts(ours)
        assert ours.vocab_size == 49408
    except UserError:
        merges = [("t", "h"), ("th", "e</w>"), ("o", "o"), ("w", "oo"), ("woo", "d</w>")]
        names = list(byte_characters().values())
        names += [name + "</w>" for name in names] + ["".join(pair) for pair in merges]
        names += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {name: i for i, name in enumerate(names)}
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("v\n" + "\n".join(map(" ".join, merges)))
        ours = clip.load_tokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        wanted = theirs(text)["input_ids"]
        assert ours.encode([text], len(wanted))[0].tolist() == wanted


def _parts(tokenizer):
    model = json.loads(tokenizer.tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
