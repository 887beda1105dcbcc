"""Slices of experts add up to the whole ones, in a layer and in checkpoints.

Equality of whole training steps on four ranks is in tests/parallel/test_paths.py.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from moeyard.errors import CheckpointError, ConfigError
from moeyard.moe.experts.inner_slice import InnerSlice
from moeyard.moe.experts.resident import Experts
from moeyard.parallel.experts.sliced_tensor import SlicedTensor
from moeyard.parallel.mesh import Mesh, check_expert_parallel
from moeyard.training.checkpoints.checkpoint import Checkpoints, StoredTensors
from moeyard.training.checkpoints.export import export
from moeyard.training.read_config import read_run_config

from launch import torchrun, training

D, F, E, COUNT = 6, 8, 3, 4
NAMES = ("fc1", "fc2", "fc1_bias", "fc2_bias")


def experts(inner_slice: InnerSlice | None = None) -> Experts:
    torch.manual_seed(0)
    made = Experts(D, F, E, backend="reference", bias=True).double()
    for name in ("fc1_bias", "fc2_bias"):
        torch.nn.init.normal_(made.get_parameter(name))
    if inner_slice is not None:
        made.keep_slice(inner_slice)
    return made


def slices() -> list[InnerSlice]:
    return [InnerSlice(index, COUNT) for index in range(COUNT)]


def pieces(inner_slice: InnerSlice, name: str) -> SlicedTensor:
    """Return a slice of expert 1's parameter, as it goes into a checkpoint."""
    part = experts(inner_slice).get_parameter(name).data[1]
    return SlicedTensor(inner_slice.whole_shape(name, part), inner_slice.pieces(name, part))


def test_the_outputs_and_gradients_of_slices_add_up_to_those_of_whole_experts():
    x_ND = torch.randn(9, D, dtype=torch.float64)
    experts_NK = torch.randint(-1, E, (9, 2))
    weights_NK = torch.rand(9, 2, dtype=torch.float64)
    inputs = []

    def run(made):
        inputs.append((x_ND.clone().requires_grad_(), weights_NK.clone().requires_grad_()))
        y_ND = made(inputs[-1][0], experts_NK, inputs[-1][1])
        y_ND.square().mean().backward() if not inputs[1:] else y_ND.backward(grad_ND)
        return y_ND.detach()

    whole = experts()
    y_ND = run(whole)
    grad_ND = 2 * y_ND / y_ND.numel()
    parts = [experts(inner_slice) for inner_slice in slices()]
    torch.testing.assert_close(sum(run(part) for part in parts), y_ND)
    for number in range(2):
        total = sum(of_part[number].grad for of_part in inputs[1:])
        torch.testing.assert_close(total, inputs[0][number].grad)
    for name in NAMES:
        gradient = whole.get_parameter(name).grad
        for part, inner_slice in zip(parts, slices(), strict=True):
            found = part.get_parameter(name).grad
            if inner_slice.holds(name):
                torch.testing.assert_close(found, inner_slice.cut(name, gradient))
            else:
                assert found is None


@pytest.mark.parametrize("name", NAMES)
def test_slices_are_stored_as_parts_of_one_tensor_and_loaded_from_it(tmp_path, name):
    whole = experts().get_parameter(name).data[1]
    checkpoints = Checkpoints(tmp_path, Mesh(), keep=2)
    checkpoints.save(1, {"weight/a": whole}, {})
    for inner_slice in slices():
        if inner_slice.holds(name):
            found = pieces(inner_slice, name)
            expected = [part.clone() for _, part in found.pieces]
            for _, part in found.pieces:
                part.zero_()
            checkpoints.load(tmp_path / "checkpoints" / "step-00000001", {"weight/a": found})
            for (_, part), values in zip(found.pieces, expected, strict=True):
                assert part.equal(values)
    # The only slice of one has everything, in two pieces or one.
    checkpoints.save(2, {"weight/a": pieces(InnerSlice(0, 1), name)}, {})
    assert StoredTensors(tmp_path / "checkpoints" / "step-00000002")["weight/a"].equal(whole)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, Mesh(), keep=2)
    checkpoints.save(1, {"weight/a": torch.ones(3, 3)}, {})
    with pytest.raises(CheckpointError, match="cannot be read"):
        found = pieces(slices()[0], "fc1")
        checkpoints.load(tmp_path / "checkpoints" / "step-00000001", {"weight/a": found})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("parallel.expert_tp=3", r"expert_tp is 3, which does not divide model.moe.d_expert = 16"),
        ("model.moe=null model.d_ff=8 parallel.expert_tp=2", "but the model has no experts"),
        ("parallel.expert_tp=2 parallel.ep=2 parallel.copies={}", "copies is .* slices of experts"),
        ("parallel.expert_tp=2 parallel.chunks=auto", "chunks is auto.* slices of experts"),
        ("parallel.expert_tp=2 parallel.ep=2 parallel.path=padded", "path is padded.* slices of"),
        ("parallel.expert_tp=2 parallel.path=all_gather", "all_gather, but parallel.ep is 1"),
        ("parallel.expert_tp=2 train.parameters=lora", r"low-rank updates.*\[attention\]"),
        (
            "parallel.expert_tp=2 model.moe.activation=reglu model.moe.router={kind: sparsity}",
            "sparsity routers read whole experts",
        ),
    ],
)
def test_what_does_not_go_with_slices_is_refused(config_file, overrides, message):
    options = overrides.replace(": ", ":~").split()
    with pytest.raises(ConfigError, match=message):
        read_run_config(config_file, [option.replace(":~", ": ") for option in options])


def test_ranks_that_do_not_fold_are_refused():
    with pytest.raises(ConfigError, match=r"ep = 2 times parallel.expert_tp = 3 is 6.*4 rank"):
        check_expert_parallel(2, 4, 8, expert_tp=3)
    with pytest.raises(ConfigError, match=r"ep is 8, which does not divide.*num_experts = 4"):
        check_expert_parallel(8, 16, 4, expert_tp=2)


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_with_slices_saves_resumes_and_exports_as_one_without(tmp_path, config_file):
    exact = ["train.precision=fp64", "parallel.backend=reference", "checkpoint.keep=9"]
    start = [str(config_file), *exact, f"run_dir={tmp_path}/one"]
    training(*start)
    expected = StoredTensors(tmp_path / "one" / "checkpoints" / "step-00000006")

    def check(name):
        found = StoredTensors(tmp_path / name / "checkpoints" / "step-00000006")
        for key, tensor in expected.items():
            if not key.startswith("rng"):
                torch.testing.assert_close(found[key], tensor, rtol=1e-11, atol=1e-13)

    def start_ranks(name, *options):
        arguments = [str(config_file), *exact, f"run_dir={tmp_path / name}", *options]
        torchrun(2, "-m", "moeyard.training", *arguments)

    start_ranks("slices", "parallel.expert_tp=2")
    check("slices")
    for name, source, options in (
        ("from-slices", "slices", ["parallel.ep=2"]),
        ("from-one", "one", ["parallel.expert_tp=2", "parallel.dense=fsdp"]),
    ):
        shutil.copytree(tmp_path / source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
        start_ranks(name, *options)
        check(name)
    for name in ("one", "slices"):
        export(tmp_path / name, tmp_path / f"{name}-folder")
    whole, joined = (
        load_file(tmp_path / f"{name}-folder" / "model.safetensors") for name in ("one", "slices")
    )
    assert whole.keys() == joined.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(joined[key], tensor, rtol=1e-6, atol=1e-8)
    again = f"start_from={tmp_path}/slices-folder"
    for name, ranks in (("again-one", False), ("again-slices", True)):
        options = [again, "model={}", "data.tokenizer=null", "train.steps=6"]
        if ranks:
            start_ranks(name, *options, "parallel.expert_tp=2")
        else:
            training(str(config_file), *exact, f"run_dir={tmp_path}/{name}", *options)
    expected = StoredTensors(tmp_path / "again-one" / "checkpoints" / "step-00000006")
    check("again-slices")
