"""Do the tests detect deliberate defects?

    python benchmarks/mutations.py [WORD]

Breaks one line at a time in a copy of the project and runs the tests that should fail, which must
pass first. WORD selects defects in files whose path contains it; the record is written only without
WORD.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_results

ROOT = Path(__file__).parent.parent
EQUAL, STORE = "tests/parallel", "tests/serving/test_store.py"
SHARED = "tests/parallel/test_shared_memory.py"
CPP = "tests/kernels -k cpp"
QUANTIZED = "tests/kernels/test_quantized.py"
AHEAD = "tests/serving/test_prefetch.py"
RESUME = "tests/training/test_training.py -k"

# what is broken, file, the line, what it becomes, the tests that should notice
MUTATIONS = [
    (
        "expert gradients are not reduced",
        "parallel/dense/gradients.py",
        "self._expert_sum.all_reduce()",
        "pass",
        EQUAL,
    ),
    (
        "expert gradients are not reduced between hosts",
        "parallel/dense/gradients.py",
        "_all_reduce(self._expert_flat, self._mesh.edp_group)",
        "pass",
        EQUAL,
    ),
    (
        "a shared sum is read before it is whole",
        "parallel/host/group.py",
        "                other.copy_(total)\n        self._host.barrier()",
        "                other.copy_(total)",
        SHARED,
    ),
    (
        "an exchange overwrites what is still read",
        "parallel/experts/exchange.py",
        "self._turn += 1",
        "pass",
        SHARED,
    ),
    (
        "the clip norm counts replicated experts twice",
        "parallel/dense/gradients.py",
        "group = self._mesh.experts_group",
        "group = self._mesh.dp_group",
        EQUAL,
    ),
    (
        "the owners of experts do not send the new weights",
        "training/optimizers/optimizer.py",
        "self._shards.share(h.parameter for h in self._held if h.owned is not None)",
        "pass",
        EQUAL,
    ),
    (
        "Muon mixes the experts of a stack",
        "training/optimizers/newton_schulz.py",
        "torch.linalg.matrix_norm(y, keepdim=True)",
        "y.norm()",
        "tests/training/test_optimizers.py",
    ),
    (
        "FRUGAL keeps the moments of other columns",
        "training/optimizers/frugal.py",
        "moment.zero_()",
        "pass",
        "tests/training/test_optimizers.py",
    ),
    (
        "routing weights get no gradient from other ranks",
        "parallel/experts/all_to_all.py",
        "return grad_x_TD, grad_weights_TK, None, None",
        "return grad_x_TD, grad_weights_TK * 0, None, None",
        EQUAL,
    ),
    (
        "the last micro-batch is added twice",
        "parallel/dense/replicated.py",
        "grad.zero_()",
        "pass",
        EQUAL,
    ),
    (
        "the balance loss sees one rank's counts",
        "moe/routers/losses.py",
        "return _together(here, parts, reduce)",
        "return _together(here, parts, lambda x: x)",
        EQUAL,
    ),
    (
        "the loss has a constant factor",
        "training/micro_batches.py",
        "else loss_sum / self._divisor",
        "else loss_sum / (2 * self._divisor)",
        "tests/training/test_gradients.py",
    ),
    (
        "rows without an expert reach the routing gradient",
        "kernels/torch_ops/experts.py",
        "part_TD = part_TD.masked_fill(absent_TK[:, k : k + 1], 0)",
        "pass",
        "tests/kernels",
    ),
    (
        "lines without an expert are combined",
        "kernels/torch_ops/experts.py",
        "present_TK = ~absent_TK",
        "present_TK = torch.ones_like(absent_TK)",
        "tests/kernels",
    ),
    (
        "gradients of experts without rows are left over from the last step",
        "kernels/torch_ops/loop.py",
        "        _zero_others(sums, spans, experts.num_slots)",
        "        pass",
        "tests/kernels",
    ),
    (
        "slots are not aligned",
        "kernels/values/expert_weights.py",
        "stride = -(-rows * columns // unit) * unit",
        "stride = rows * columns",
        "tests/kernels",
    ),
    (
        "products of rows have any size",
        "kernels/torch_ops/row_stable.py",
        "padded_NP.split(BLOCK_ROWS)",
        "padded_NP.split(BLOCK_ROWS * 13)",
        "tests/kernels",
    ),
    (
        "the random state is not restored",
        "training/saves.py",
        "self._generator.set_state(state)",
        "pass",
        f"{RESUME} resumed",
    ),
    (
        "checkpoint hashes are not compared",
        "training/checkpoints/files.py",
        "if sha256_of(file) != digest:",
        "if False:",
        f"{RESUME} damaged",
    ),
    (
        "experts in use are put out",
        "serving/experts/policies/lru.py",
        "if key not in protected:",
        "if True:",
        AHEAD,
    ),
    (
        "a hit does not refresh an expert",
        "serving/experts/policies/lru.py",
        "self._by_age.move_to_end(key)",
        "pass",
        STORE,
    ),
    (
        "an early read that became urgent may be laid aside",
        "serving/experts/read_queue.py",
        "read.is_urgent = True",
        "pass",
        AHEAD,
    ),
    (
        "finished reads are booked late",
        "serving/experts/layer_reads.py",
        "        self._filler.book_finished(wanted=self.reading)\n        full = set[int]()",
        "        full = set[int]()",
        AHEAD,
    ),
    (
        "what is needed first is put out first",
        "serving/experts/expectations.py",
        "return reversed(self._expected)",
        "return iter(self._expected)",
        AHEAD,
    ),
    (
        "closing the store leaves readers waiting",
        "serving/experts/read_queue.py",
        "                self._drop(read)\n            self._waiting = _Waiting()",
        "                pass\n            self._waiting = _Waiting()",
        AHEAD,
    ),
    (
        "the router weighs with its bias",
        "kernels/torch_ops/router.py",
        "weights_TK = scores_TE.gather(-1, chosen_TK)",
        "weights_TK = selection_TE.gather(-1, chosen_TK)",
        "tests/moe",
    ),
    (
        "the bias is never moved",
        "training/step.py",
        "router.after_step(layer, counts)",
        "pass",
        "tests/training/test_bias.py",
    ),
    (
        "a pre-gate reads its own layer's input",
        "moe/models/decoder_layer.py",
        "next_routing = choose(*following, mlp_input_TD, batch)",
        "next_routing = None",
        "tests/moe",
    ),
    (
        "a replay chooses anew",
        "moe/models/routed.py",
        "if batch.routes is None:",
        "if True:",
        "tests/moe",
    ),
    (
        "a damaged chunk of routes is read",
        "moe/routes/reader.py",
        "if checksum(head[:-4], payload) != crc:",
        "if False:",
        "tests/moe",
    ),
    (
        "sharded gradients are averaged",
        "parallel/dense/fsdp.py",
        "unit.set_gradient_divide_factor(1.0)",
        "unit.set_gradient_divide_factor(2.0)",
        EQUAL,
    ),
    (
        "workers outlive their agent",
        "parallel/parent.py",
        "ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)",
        "pass",
        "tests/training/test_kills.py -k lose_their_agent",
    ),
    (
        "what is left of a row behind whole vectors is not multiplied",
        "kernels/cpu/src/products.h",
        "int64_t rest = width - at;",
        "int64_t rest = 0;",
        CPP,
    ),
    (
        "choices of no expert are combined",
        "kernels/cpu/src/experts.h",
        "if (a.experts[r] < 0) continue;",
        "",
        CPP,
    ),
    (
        "expert ids out of range are computed with",
        "kernels/cpu/src/expert_order.h",
        "if (expert < -1 || expert >= a.num_experts) return r;",
        "if (expert < -1 || expert >= a.num_experts) continue;",
        CPP,
    ),
    (
        "equal scores go to the higher expert",
        "kernels/cpu/src/router.h",
        "if (values[e] > values[best]) best = e;",
        "if (values[e] >= values[best]) best = e;",
        CPP,
    ),
    (
        "the second half of an expert's many rows begins its gradient anew",
        "kernels/cpu/src/panels.h",
        "if (!is_first)\n",
        "if (!is_first && !is_empty)\n",
        CPP,
    ),
    (
        "keys are rotated the other way",
        "kernels/cpu/src/attention.h",
        "first * widen(cosine[i]) - second * widen(sine[i])",
        "first * widen(cosine[i]) + second * widen(sine[i])",
        "tests/moe/test_decode_step.py",
    ),
    (
        "rows of an adapter of attention take torch's path",
        "moe/attention/parts.py",
        "new = prepare_rows(some.caches or (), some.lengths)",
        "new = None",
        "tests/moe/test_exact_rows.py",
    ),
    (
        "a window ends at its panel",
        "kernels/cpu/src/attention_panels.h",
        "j < seen.from - first * PANEL",
        "j < 0",
        "tests/moe/test_decode_families.py",
    ),
    (
        "a key's scale is that of the first position",
        "kernels/cpu/src/cached_attention.h",
        "scales[j] = keys.scale(p + j)",
        "scales[j] = keys.scale(p)",
        "tests/moe/test_exact_rows.py",
    ),
    (
        "bytes hold the odd input low",
        "kernels/values/quantize.py",
        "values_QP[:, ::2] | values_QP[:, 1::2] << 4",
        "values_QP[:, 1::2] | values_QP[:, ::2] << 4",
        QUANTIZED,
    ),
    (
        "4-bit groups are not clipped where that serves them",
        "kernels/values/quantize.py",
        "is_better_QG1 = error_QG1 < least_QG1",
        "is_better_QG1 = error_QG1 < -least_QG1",
        QUANTIZED,
    ),
    (
        "sums of few bits do not begin with what the zero point adds",
        "kernels/cpu/src/int_rows.h",
        "sums[lane] -= WEIGHT_ZERO<Bits> * values",
        "sums[lane] -= 0 * values",
        CPP,
    ),
    (
        "a group that goes on for several steps has the scale of its number",
        "kernels/cpu/src/quantized.h",
        "widen(weights[matrix.steps[first + i].group])",
        "widen(weights[(first + i) % matrix.groups])",
        CPP,
    ),
    (
        "the second chunk of a step is left out of a single row",
        "kernels/cpu/src/quantized.h",
        "sums[m][n] = both_sums(sums[m][n], others[m][n]);",
        "sums[m][n] = both_sums(sums[m][n], no_int_sum());",
        CPP,
    ),
    (
        "groups of one chunk share a scale",
        "kernels/cpu/src/int_vectors.h",
        "Groups == 2 ? 3 : 2",
        "4",
        CPP,
    ),
    (
        "the compiled backward forgets that sums are added to",
        "kernels/cpu/ops.py",
        "out_bias1_SH, out_bias2_SD), is_empty=not add)",
        "out_bias1_SH, out_bias2_SD), is_empty=True)",
        CPP,
    ),
    (
        "up rows get the bias of gates",
        "kernels/cpu/src/experts.h",
        "add_bias(a.fc1_bias, block.slot, up_from, num_outputs, ups",
        "add_bias(a.fc1_bias, block.slot, from, num_outputs, ups",
        CPP,
    ),
    (
        "the routing gradient forgets the bias of the output",
        "kernels/cpu/src/expert_backward.h",
        "part_of(block.from + m, 0) += values[0];",
        "",
        CPP,
    ),
    (
        "the gradient of an idle expert's bias is left undefined",
        "kernels/cpu/src/expert_backward.h",
        "zero(a.grad_fc1_bias, fc1_rows);",
        "",
        CPP,
    ),
    (
        "an expert's bias is not weighted in its gradient",
        "kernels/torch_ops/loop.py",
        "(grad_mD * weight_m1).sum(dim=0)",
        "grad_mD.sum(dim=0)",
        "tests/kernels/test_expert_mlp.py",
    ),
    (
        "a query sees the key behind it",
        "kernels/torch_ops/causal_attention.py",
        ".triu(1)",
        ".triu(2)",
        "tests/kernels/test_causal_attention.py",
    ),
]


def survives(copy: Path, path: str, line: str, broken: str, tests: str) -> bool:
    """Break the line, run the tests and restore the line; say whether the tests still passed."""
    source = (copy / path).read_text()
    assert source.count(line) == 1, f"{path} has {line!r} {source.count(line)} times"
    (copy / path).write_text(source.replace(line, broken))
    passed = pass_in(copy, tests)
    (copy / path).write_text(source)
    return passed


def pass_in(copy: Path, tests: str) -> bool:
    """Run tests in the copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    words = tests.split(" -k ")
    command += [words[0], *(["-k", words[1]] if len(words) > 1 else [])]
    env = {**os.environ, "PYTHONPATH": str(copy.parent)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, check=False)
    assert done.returncode in (0, 1), done.stdout.decode()[-2000:]
    return done.returncode == 0


def main() -> None:
    found = {}
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if word in mutation[1]]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "moeyard"
        aside = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=aside)
        for tests in dict.fromkeys(mutation[-1] for mutation in chosen):
            assert pass_in(copy, tests), f"{tests} fails before anything is broken"
        print("all tests pass while nothing is broken", flush=True)
        for name, *rest in chosen:
            found[name] = "SURVIVED" if survives(copy, *rest) else "caught"
            print(f"{found[name]:9} {name} ({rest[0]}; {rest[-1]})", flush=True)
    caught = sum(outcome == "caught" for outcome in found.values())
    print(f"{caught} of {len(found)} defects caught")
    if word:
        return
    path = write_results(
        "mutations", {"question": "do the tests see deliberate defects", "defects": found}
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
