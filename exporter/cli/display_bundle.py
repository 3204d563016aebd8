"""How the command line shows a bundle: what a build made of it, and all that it holds."""

from collections.abc import Iterator
from typing import Any

from wanexport.exporter.cli.terminal import in_bytes, in_short, out, short, write
from wanexport.runtime.bundle.manifest import DENOISER

_SHOWN = 8  # of a Program's states


def show_build(record: dict[str, Any]) -> None:
    """The engines and weights that a build made or reused."""
    for engine in record["engines"]:
        geometry, proof = engine["geometry"], engine["proof"]
        size = sum(file["size"] for file in engine["files"].values())
        write(
            out,
            (record["bundle"], "bold"),
            f": {short(record['model'])}, height {geometry['height']}, width {geometry['width']}, "
            f"{geometry['frames']} frames, {record['tokens']} tokens{_chunks(geometry)}",
        )
        write(out, f"  engine {engine['name']}: {in_bytes(size)}")
        if attention := _attention(engine):
            write(out, f"  attention: {attention}")
        if "attention_expected" in engine["build"]:
            write(out, f"  {_plan(engine['build'])}")
        write(out, f"  {_proof(proof)}")
    for name, file in record["weights"].items():
        write(out, f"  weights {name}: {in_bytes(file['size'])}{_origin(record['sources'][name])}")
    if record["reused"]:
        write(out, f"  reused: {', '.join(record['reused'])}")
    write(out, f"  {record['seconds']} s, peak memory {in_bytes(record['peak_rss_bytes'])}")


def _chunks(geometry: dict[str, Any]) -> str:
    """The latent frames of a call and of the cache, of a causal engine."""
    if not geometry["chunk"]:
        return ""
    return f", chunk {geometry['chunk']} and cache {geometry['cache']} latent frames"


def _origin(source: dict[str, Any]) -> str:
    """What was read of a checkpoint that is quantised or has two models, and the LoRAs merged."""
    told = f", of {short(source['generator'])}" if source.get("generator") else ""
    if source.get("stored"):
        told += f", from {short(source['stored'])}: their precision is the file's"
    for lora in _loras(source):
        told += f", with {_lora(lora)}"
    return told


def _loras(source: dict[str, Any]) -> list[dict[str, Any]]:
    """The LoRAs that a source says were merged, those that have the form of this version's."""
    found = source.get("lora")
    return [lora for lora in found if isinstance(lora, dict)] if isinstance(found, list) else []


def _lora(lora: dict[str, Any]) -> str:
    """A LoRA: its file, strength, and what it changes."""
    changes = lora.get("changes")
    kinds = changes.items() if isinstance(changes, dict) else ()
    counts = ", ".join(f"{short(count)} {short(kind)}" for kind, count in kinds)
    unused = f", {short(lora['unused'])} keys left out" if lora.get("unused") else ""
    return (
        f"LoRA {short(lora.get('path', '-'))} at {short(lora.get('strength', '-'))} "
        f"({counts}{unused})"
    )


def show_add(record: dict[str, Any]) -> None:
    """The files of a weights set that was added."""
    recipe = f", recipe {record['recipe']}" if record["recipe"] else ""
    write(out, (record["bundle"], "bold"), f": weights set {short(record['name'])}{recipe}")
    for label, weights in record["weights"].items():
        size = in_bytes(weights["file"]["size"])
        write(out, f"  weights {short(label)}: {size}{_origin(weights['source'])}")
    if record["reused"]:
        write(out, f"  reused: {', '.join(record['reused'])}")
    write(out, f"  peak memory {in_bytes(record['peak_rss_bytes'])}")


def show_ls(record: dict[str, Any]) -> None:
    """The sets and engines of a bundle, a line each, with the files of a set below it."""
    write(
        out, (record["bundle"], "bold"), f": {short(record['model'])}, {in_bytes(record['bytes'])}"
    )
    for own in record["sets"]:
        recipe = f", recipe {short(own['recipe'])}" if own["recipe"] else ""
        role = own["role"].replace("_", " ")
        role = "" if own["role"] == DENOISER else f" of the {short(role)}"
        write(out, f"  set {short(own['name'])}{role}: {in_bytes(own['bytes'])}{recipe}")
        for file in own["files"]:
            expert = f"{short(file['expert'])} " if file["expert"] else ""
            write(out, f"    {expert}{file['dtype']}: {in_bytes(file['bytes'])}, {_from(file)}")
    for engine in record["engines"]:
        write(out, f"  engine {short(engine['name'])}: {in_bytes(engine['bytes'])}")
        if engine["unusable"]:
            write(out, f"    not usable: {engine['unusable']}")


def _from(file: dict[str, Any]) -> str:
    """Where a file of a set comes from: a checkpoint, a preset or the base set, and LoRAs."""
    source = file["source"]
    keys = "path hub file low_noise preset random_seed set generator stored".split()
    told = [f"{key} {short(source[key])}" for key in keys if key in source]
    told += [_lora(lora) for lora in _loras(source)]
    return f"from {', '.join(told)}; sha256 {file['sha256'][:12]}"


def show_remove(record: dict[str, Any]) -> None:
    """What went."""
    write(
        out, (record["bundle"], "bold"), f": removed {record['name']}, {in_bytes(record['bytes'])}"
    )
    for path in record["files"]:
        write(out, f"  {path}")


def _proof(proof: dict[str, Any]) -> str:
    method, blocks, tokens = (
        short(proof.get(name, "-")) for name in ("method", "blocks", "tokens")
    )
    error, gate = in_short(proof.get("error")), in_short(proof.get("gate"))
    return (
        f"proof: {method}, {blocks} blocks at {tokens} tokens; relative L2 error {error}, "
        f"gate {gate}"
    )


def _attention(engine: dict[str, Any]) -> str:
    """The kernel of each kind of attention, or the operator that stands for all."""
    attention = _details(engine).get("attention", "")
    if not isinstance(attention, dict):
        return short(attention)
    return ", ".join(f"{short(name)} ({short(kind)})" for kind, name in attention.items())


def _details(engine: dict[str, Any]) -> dict[str, Any]:
    """An engine's details, none where they have a form of a later version."""
    details = engine["details"]
    return details if isinstance(details, dict) else {}


def _plan(build: dict[str, Any]) -> str:
    """What is known of a TensorRT plan: its attention, memory and build."""
    found, expected = build.get("attention_layers", "-"), build["attention_expected"]
    known = [f"{found} of {expected} attention layers native"]
    if build.get("attention_kernels") is not None:
        known.append(f"{build['attention_kernels']} attention kernels")
    if build.get("activation_bytes") is not None:
        known.append(f"activations {in_bytes(build['activation_bytes'])}")
    if "plan_seconds" in build:
        peak = in_bytes(build.get("plan_peak_rss_bytes", 0))
        known.append(f"built in {build['plan_seconds']} s at {peak}")
    return f"plan: {', '.join(known)}"


def show_inspect(record: dict[str, Any]) -> None:
    """The model, its weights, and a few lines for each engine."""
    config, parameters = record["config"], record["parameters"]
    size = f"{parameters / 1e9:.2f} billion parameters, " if parameters else ""
    experts = f", experts {' and '.join(record['experts'])}" if record["experts"] else ""
    write(
        out,
        (record["bundle"], "bold"),
        f": {short(record['model'])}, family {short(record['family'])}{experts}, {size}dim "
        f"{config['dim']}, {config['num_heads']} heads, {config['num_layers']} blocks; "
        f"{in_bytes(record['bytes'])}, built by wanexport {short(record['wanexport'])}",
    )
    for name, weights in record["weights"].items():
        write(out, f"  weights {name}: {_weights(weights)}")
    for engine in record["engines"]:
        for line in _engine_lines(engine):
            write(out, line)
    for engine in record["unread"]:
        write(out, f"  {engine['unusable']}")
    if not record["problems"]:
        checked = "every hash" if record["verified"] else "sizes, headers and engines"
        write(out, f"{checked} verified")


def _weights(weights: dict[str, Any]) -> str:
    """A file of a weights set: which part it is, how large, and where it comes from."""
    part = f"set {weights['name']} ({weights['role']})"
    expert = f", expert {weights['expert']}" if weights["expert"] else ""
    hidden = ("files", "lora")
    stated = {key: value for key, value in weights["source"].items() if key not in hidden}
    source = ", ".join(f"{short(key)} {short(value)}" for key, value in stated.items())
    source += "".join(f", with {_lora(lora)}" for lora in _loras(weights["source"]))
    return (
        f"{part}{expert}, {weights['dtype']}, layout {weights['layout'][:12]}, "
        f"{in_bytes(weights['file']['size'])}, from {source}"
    )


def _engine_lines(engine: dict[str, Any]) -> Iterator[str]:
    flops = engine["build"].get("flops_per_forward", 0) / 1e12
    yield (
        f"  engine {engine['name']}: {engine['tokens']} tokens, {in_bytes(engine['bytes'])}, "
        f"{flops:.3g} TFLOPs a forward{_chunks(engine['geometry'])}"
    )
    if engine["unusable"]:
        yield f"    not usable: {engine['unusable']}"
    target = ", ".join(f"{name} {short(value)}" for name, value in engine["target"].items())
    yield f"    target: {target}; reads weights of layout {engine['layout'][:12]}"
    yield from _program_lines(engine["program"])
    yield from _detail_lines(engine)
    yield from (f"    {line}" for line in card_lines(engine["cards"]))
    if engine["proof"]:
        yield f"    {_proof(engine['proof'])}"
    yield f"    parity: {_parity(engine['parity'])}"
    yield f"    lint: {sum(engine['lint'].values())} findings"
    if engine["role"] == DENOISER:
        yield f"    sampling: {_sampling(engine['sampling'])}"


def card_lines(cards: list[dict[str, Any]]) -> Iterator[str]:
    """How a model fits on GPUs, the smallest first; a larger one that changes nothing is none."""
    before: tuple[Any, ...] = ()
    for row in cards:
        places = (row["offload"], row["resident_blocks"], row["vae"], row["text"])
        if places == before:
            continue
        before = places
        held = "all weights stay"
        if row["offload"] == "experts":
            held = "--offload experts"
        if row["offload"] == "blocks":
            seconds = row["copy_seconds"]["PCIe 4 x16"]
            held = (
                f"--offload blocks, {row['resident_blocks']} of {row['blocks']} stay, "
                f"{in_bytes(row['streamed'])} a forward take {seconds:.1f} s at PCIe 4"
            )
        vae = {"whole": "VAE whole", "tiles": "VAE in tiles", "cpu": "VAE on the CPU"}[row["vae"]]
        text = {"gpu": "text encoder beside it", "cpu": "text encoder on the CPU"}[row["text"]]
        yield f"GPU of {row['card'] / (1 << 30):.3g} GiB: {held}; {vae}, {text}"


def _program_lines(program: dict[str, Any]) -> Iterator[str]:
    """What the engine is called with, and what it calls."""
    inputs = (f"{name} {list(spec['shape'])}" for name, spec in program["inputs"].items())
    yield f"    inputs: {', '.join(inputs)}"
    calls = [
        f"{call['name']} x {call['repeat']}" if call["repeat"] > 1 else call["name"]
        for call in program["calls"]
    ]
    state = f"; state: {', '.join(program['state'])}" if program["state"] else ""
    if len(program["state"]) > _SHOWN:
        state = f"; state: {len(program['state'])} tensors"
    yield f"    calls: {', '.join(calls)}{state}"


def _detail_lines(engine: dict[str, Any]) -> Iterator[str]:
    if attention := _attention(engine):
        yield f"    attention: {attention}"
    others = {name: v for name, v in _details(engine).items() if name != "attention" and v}
    if isinstance(sizes := others.pop("sizes", None), dict):
        others |= sizes
    if others:
        yield f"    {', '.join(f'{short(name)} {short(value)}' for name, value in others.items())}"


def _parity(parity: dict[str, Any]) -> str:
    if not parity:
        return "not compared yet"
    verdict = "passed" if parity.get("passed") else "failed"
    weights = f" with weights {short(parity['weights'])}" if parity.get("weights") else ""
    reference, error = short(parity.get("reference", "-")), in_short(parity.get("error"))
    return f"{verdict} against {reference}{weights}; error {error}"


def _sampling(sampling: dict[str, Any]) -> str:
    guidance = ", ".join(f"{g:g}" for g in dict.fromkeys(sampling["guidance"]))
    boundary = f", experts meet at {sampling['boundary']}" if sampling["boundary"] else ""
    return (
        f"{sampling['solver']}, {sampling['steps']} steps, shift {sampling['shift']:g}, "
        f"guidance {guidance}{boundary}, {sampling['fps']} fps"
    )


def show_report(record: dict[str, Any]) -> None:
    """What the page shows, where it is, and which saved figures are of no engine that is there."""
    found = ", ".join(f"{number} of {kind}" for kind, number in record["shown"].items())
    write(out, (record["bundle"], "bold"), f": {len(record['engines'])} engines; figures: {found}")
    for path in record["left_out"]:
        write(out, ("note: ", "yellow"), f"{path} is of an engine that is not there: left out")
    write(out, f"saved {record['page']}, {in_bytes(record['bytes'])}")
