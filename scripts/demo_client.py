"""Two completions through the OpenAI client, one of them streamed, and the server's expert load."""

import sys
import urllib.request

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families


def main() -> None:
    base = sys.argv[1]
    client = OpenAI(base_url=f"{base}/v1", api_key="none")
    model = client.models.list().data[0].id
    write = sys.stdout.write

    answer = client.completions.create(
        model=model, prompt="def __init__(self", max_tokens=48, temperature=0
    )
    write(f"def __init__(self{answer.choices[0].text}\n[{answer.usage}]\n\n")

    prompt = "import os\nimport sys\n\n"
    write(prompt)
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=96, temperature=0.7, seed=1, stream=True
    )
    for chunk in stream:
        write(chunk.choices[0].text)
        sys.stdout.flush()
    write("\n\n")

    text = urllib.request.urlopen(f"{base}/metrics").read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    total: dict[str, float] = {}
    for sample in samples:
        total[sample.name] = total.get(sample.name, 0) + sample.value
    layers = len({s.labels["layer"] for s in samples if s.name == "moeyard_expert_tokens_total"})
    routed, tokens = total["moeyard_expert_tokens_total"], total["moeyard_moe_tokens_total"]
    top_k = total["moeyard_moe_top_k"]
    write(f"routed rows {routed:.0f} = {tokens:.0f} tokens x {top_k:.0f} x {layers} layers\n")
    if routed != tokens * top_k * layers:
        sys.exit("error: routed rows do not add up")
    for sample in samples:
        if sample.name == "moeyard_expert_load_max_over_mean":
            write(f"layer {sample.labels['layer']}: max/mean load {sample.value:.2f}\n")
    names = ("hits_total", "misses_total")
    hits, misses = (total[f"moeyard_expert_cache_{name}"] for name in names)
    write(
        f"expert cache: {hits:.0f} hits, {misses:.0f} misses, "
        f"{total['moeyard_expert_bytes_read_total'] / 1e6:.1f} MB read, "
        f"{total['moeyard_expert_stall_seconds_total']:.3f} s waited\n"
    )


if __name__ == "__main__":
    main()
