"""Predict what a plan takes, for a decoded token or a prompt, and how often experts are found."""

from math import comb

from jaxsys.offload.choose import decide
from jaxsys.offload.cost import accelerator_s, cpu_s, link_s
from jaxsys.offload.types import Machine, Plan, Terms


def predict(
    plan: Plan, machine: Machine, tokens: int = 1, *, filled: float | int = 0.5
) -> tuple[float, Terms]:
    """Predict one pass of tokens through the layers.

    Layers follow one another. A layer takes its attention and then the longest of what the CPU, the
    link, the accelerator and the CPU's memory spend on its MLP or experts. Without a trace, a
    single token's experts count by how many of them are resident: each of the k hits with the share
    of the activations whose experts are resident as a whole, independently, and every number of
    misses is decided about at best; misses count as experts of average residency. Where an expert
    is used by many tokens, each has its expected number of them.

    Reconstruction: the paper's predictor is not known.

    Args:
        plan: where everything is.
        machine: rates.
        tokens: in this pass: 1 decodes, more read a prompt (attention's products with past keys
            and values are not counted).
        filled: share of the cache that is read.

    Returns:
        Seconds and the four terms, each summed over the layers.

    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(1.0, 99.0, 9.0), Processor(8.0, 99.0, 9.0), 2.0)
    >>> parts = (Part(0, "attention", 8, 0.0), Part(0, "mlp", 12, 0.0, 12))
    >>> predict(Plan(parts, (1, 4), (0, 4), ("accelerator",)), machine)
    (5.0, Terms(cpu_s=4.0, link_s=2.0, accelerator_s=2.0, dram_s=0.0))
    """
    by_layer: dict[int, list[int]] = {}
    for i, part in enumerate(plan.parts):
        by_layer.setdefault(part.layer, []).append(i)
    total, terms = 0.0, Terms()
    seen: dict[tuple, tuple[float, Terms]] = {}
    for layer, members in by_layer.items():
        # Layers that look alike are predicted once.
        key = (
            plan.cache_on[layer] if layer >= 0 else "",
            *((plan.parts[i]._replace(layer=0), plan.resident[i], plan.stream[i]) for i in members),
        )
        if key not in seen:
            seen[key] = _layer_s(plan, machine, members, tokens, filled)
        seconds, more = seen[key]
        total += seconds
        terms = _add(terms, more)
    return total, terms


def predicted_prefill_s(plan: Plan, machine: Machine, n: int, *, chunk: int | None = None) -> float:
    """Predict the seconds of reading a prompt.

    Args:
        plan: where everything is.
        machine: rates.
        n: tokens of the prompt.
        chunk: tokens of one pass; all at once by default.

    Returns:
        Seconds, the sum over the passes.

    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(4.0, 2.0, 9.0))
    >>> plan = Plan((Part(0, "mlp", 8, 4.0, 4),), (0,), (0,), ("cpu",))
    >>> predicted_prefill_s(plan, machine, 5), predicted_prefill_s(plan, machine, 5, chunk=2)
    (10.0, 10.0)
    """
    chunk = chunk or max(n, 1)
    passes, rest = divmod(n, chunk)
    seconds = passes * predict(plan, machine, chunk)[0] if passes else 0.0
    return seconds + (predict(plan, machine, rest)[0] if rest else 0.0)


def hit_rate(plan: Plan) -> float:
    """Give the share of the experts' activated bytes that a plan keeps resident; nan without any.

    >>> from jaxsys.offload.types import Part
    >>> experts = tuple(Part(0, "expert", 8, 4.0, 4, e, f) for e, f in ((0, 0.75), (1, 0.25)))
    >>> hit_rate(Plan(experts, (4, 0), (0, 0), ("cpu",)))
    0.75
    """
    used = found = 0.0
    for part, here in zip(plan.parts, plan.resident, strict=True):
        if part.kind == "expert":
            used += part.frequency * part.n_bytes
            found += part.frequency * part.n_bytes * here / max(part.columns, 1)
    return found / used if used else float("nan")


def _layer_s(plan, machine, members: list[int], tokens: int, filled):
    """Predict one layer, or what stands outside the layers (there one part after another)."""
    total, terms = 0.0, Terms()
    experts = [i for i in members if plan.parts[i].kind == "expert"]
    for i in members:
        part = plan.parts[i]
        if part.kind == "expert":
            continue
        if part.kind == "mlp":
            _, seconds, more = decide(plan, machine, [(i, tokens)])
        else:
            reads = filled * plan.cache_bytes if part.kind == "attention" else 0.0
            # The head needs each row's last token only.
            n = tokens if part.kind in ("attention", "embed") else 1
            more = part_terms(plan, machine, i, n, reads)
            seconds = more.cpu_s + max(more.link_s, more.accelerator_s)
        total, terms = total + seconds, _add(terms, more)
    if experts:
        seconds, more = _experts(plan, machine, experts, tokens)
        total, terms = total + seconds, _add(terms, more)
    return total, terms


def part_terms(
    plan: Plan, machine: Machine, i: int, tokens: int, cache_read_bytes: float | int = 0.0
) -> Terms:
    """Predict an uncut part (attention, embedding, norms, head) where the plan has it.

    Args:
        plan: where everything is.
        machine: rates.
        i: place of the part in the plan.
        tokens: that pass it.
        cache_read_bytes: keys and values that are read beside its weights.

    Returns:
        The terms; they follow one another.

    >>> from jaxsys.offload.types import Part, Processor
    >>> plan = Plan((Part(0, "attention", 8, 1.0),), (0,), (0,), ("cpu",))
    >>> part_terms(plan, Machine(Processor(4.0, 9.0, 9.0)), 0, 1).cpu_s
    2.0
    """
    part = plan.parts[i]
    if plan.on_cpu(i):
        cached = cache_read_bytes / machine.cpu.rates(part.kind).bytes_per_s
        return Terms(cpu_s=cpu_s(part, machine, 1.0, tokens) + cached)
    assert machine.accelerator is not None
    cached = cache_read_bytes / machine.accelerator.rates(part.kind).bytes_per_s
    return Terms(
        link_s=link_s(part, machine, plan.stream[i]),
        accelerator_s=accelerator_s(part, machine, 1.0, tokens) + cached,
    )


def _experts(plan: Plan, machine: Machine, experts: list[int], tokens: int) -> tuple[float, Terms]:
    often = [plan.parts[i].frequency for i in experts]
    if tokens > 1:
        return decide(plan, machine, _active(experts, often, tokens))[1:]
    return _misses(plan, machine, experts, sum(often))


def _active(experts: list[int], often: list[float], tokens: int) -> list[tuple[int, int]]:
    """Guess which experts a chunk uses: as many as expected, the most frequent, and how much."""
    expected = sum(1 - (1 - min(f, 1.0)) ** tokens for f in often)
    order = sorted(range(len(experts)), key=lambda j: -often[j])[: max(1, round(expected))]
    return [(experts[j], max(1, round(tokens * often[j]))) for j in order]


def _misses(plan: Plan, machine: Machine, experts: list[int], activations: float):
    """Average over how many of a token's k experts miss."""
    k = max(1, round(activations))
    shares = {i: plan.resident[i] / max(plan.parts[i].columns, 1) for i in experts}
    here = [i for i in experts if shares[i] == 1]
    # Those of average residency stand for all that are not whole.
    cold = [i for i in experts if shares[i] < 1]
    mean = sum(shares[i] for i in cold) / max(len(cold), 1)
    cold.sort(key=lambda i: abs(shares[i] - mean))
    found = sum(plan.parts[i].frequency for i in here)
    hit = min(1.0, found / activations) if activations else 0.0
    total, terms, chances = 0.0, Terms(), 0.0
    for m in range(max(0, k - len(here)), min(k, len(cold)) + 1):
        chance = comb(k, m) * (1 - hit) ** m * hit ** (k - m)
        if chance:
            active = [(i, 1) for i in (*here[: k - m], *cold[:m])]
            _, seconds, more = decide(plan, machine, active)
            total, chances = total + chance * seconds, chances + chance
            terms = _add(terms, Terms(*(chance * t for t in more)))
    scale = 1 / chances if chances else 0.0
    return total * scale, Terms(*(scale * t for t in terms))


def _add(a: Terms, b: Terms) -> Terms:
    return Terms(*(x + y for x, y in zip(a, b, strict=True)))
